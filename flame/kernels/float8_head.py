"""Matrix products of the output head in 8-bit floating point, for the cross entropy.

Of its three products, the logits H W^T and the gradient of the states G W are taken with both factors rounded to float8_e4m3
(Micikevicius et al. 2022, arXiv:2209.05433). The gradient of the weights, G^T H, is not: its factors would have to be rounded
along the tokens, where a label's -1 stands in a column with probabilities of 1e-6, which are then rounded to 0.

A factor is rounded along the summed dimension. Its rows are divided by a power of two, the smallest that brings the largest entry
into the range, so that scaling is exact. A row of G holds p_j - [j = o] of one token: column o, the label's, is left out of the
rounding and added exactly. Else the scale would follow the label's entry, and small probabilities would be rounded to 0.

On CUDA a Triton kernel rounds and `torch._scaled_mm` multiplies. Elsewhere plain PyTorch rounds to the same bits and multiplies
the rounded factors in float32.

Shape legend: c rows of a chunk, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.errors import UserError
from flame.kernels.fp8 import FIRST_CAPABILITY, SIZE_STEP, has_8_bit_products

LOWEST_EXPONENT = -100
"""Of a scale, so that its inverse is finite; that of a row of zeros."""
BLOCK = 2048


class Rounded(NamedTuple):
    """Rows in 8 bits; `rows * scales` is approximately what was rounded."""

    rows: Tensor
    """float8_e4m3 [m, n]"""
    scales: Tensor
    """float32 [m, 1], powers of two; NaN where a row is not finite."""


def round_rows(x: Tensor, left_out: Tensor | None = None) -> Rounded:
    """Round each row of x [m, n] with a scale of its own.

    Args:
        left_out: int64 [m], a column of each row that counts as 0; a negative one leaves out none.
    """
    return (_launch if x.is_cuda else _define)(x, left_out)


class Float8Head:
    """An output head's matrix, rounded for both products.

    Args:
        weight: [V, d].
    """

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._by_token = round_rows(weight)
        self._by_feature = round_rows(weight.t().contiguous())

    def project_(self, hidden_states: Tensor, logits: Tensor) -> None:
        """logits [c, V] = hidden_states [c, d] @ weight.T, in place."""
        states, weight = round_rows(hidden_states), self._by_token
        if not logits.is_cuda:
            logits.copy_(_multiply_wide(states.rows, weight.rows, logits.dtype) * states.scales * weight.scales.t())
            return
        torch._scaled_mm(
            states.rows,
            weight.rows.t(),
            scale_a=states.scales,
            scale_b=weight.scales.t(),
            out_dtype=logits.dtype,
            use_fast_accum=True,
            out=logits,
        )

    def multiply_gradient_(self, grad: Tensor, labels: Tensor, grad_hidden: Tensor) -> None:
        """grad_hidden [c, d] = grad [c, V] @ weight, in place.

        Args:
            labels: int64 [c], column of each row of `grad` whose part is exact; -100 of a row of zeros.
        """
        rounded, weight = round_rows(grad, labels), self._by_feature
        if grad.is_cuda:
            # Over as many terms as V, sums need full precision, which cuBLAS has with one scale alone. Those of the rows and
            # columns are powers of two, so they may follow.
            one = torch.ones((), dtype=torch.float32, device=grad.device)
            product = torch._scaled_mm(
                rounded.rows, weight.rows.t(), scale_a=one, scale_b=one, out_dtype=grad.dtype, use_fast_accum=False
            )
        else:
            product = _multiply_wide(rounded.rows, weight.rows, grad.dtype)
        own = labels.clamp(0, len(self._weight) - 1)
        exact = grad.gather(1, own[:, None]) * self._weight[own].to(torch.promote_types(grad.dtype, torch.float32))
        grad_hidden.copy_((product * rounded.scales) * weight.scales.t() + exact)


def find_float8_head_conflicts(vocabulary: int, width: int) -> Iterator[str]:
    """Sizes of the head that 8-bit products do not allow."""
    if vocabulary % SIZE_STEP or width % SIZE_STEP:
        yield (
            f"training.float8_head = true: the output head is {vocabulary} x {width}, and both must be multiples of {SIZE_STEP}: "
            "set it to false"
        )


def check_float8_head(device_type: str) -> None:
    """Reject devices without 8-bit products.

    Raises:
        UserError: the device is a CPU or a GPU below compute capability 8.9.
    """
    if not has_8_bit_products(device_type):
        needed = ".".join(map(str, FIRST_CAPABILITY))
        raise UserError(
            f"training.float8_head = true needs a GPU of compute capability {needed} or above, which this machine does not have: "
            "set it to false"
        )


def _multiply_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [m, k] @ b [n, k].T of 8-bit factors, summed in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return (a.to(wide) @ b.to(wide).t()).to(dtype)


def _define(x: Tensor, left_out: Tensor | None) -> Rounded:
    x = x.float()
    if left_out is not None:
        x = x.masked_fill(torch.arange(x.shape[1], device=x.device) == left_out[:, None], 0.0)
    largest = x.abs().amax(dim=1, keepdim=True)
    bits = largest.view(torch.int32)  # 448, the largest of float8_e4m3, is 1.75 x 2^8
    exponent = ((bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)).clamp(min=LOWEST_EXPONENT)
    scales = ((exponent + 127) << 23).view(torch.float32)
    inverse = ((127 - exponent) << 23).view(torch.float32)
    return Rounded((x * inverse).to(torch.float8_e4m3fn), torch.where(largest < torch.inf, scales, torch.nan))


@triton.jit
def _round_rows_kernel(
    x_ptr, row_stride, left_out_ptr, rows_ptr, scales_ptr, columns,
    HAS_LEFT_OUT: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, as `_define` says. The second reading of a row mostly hits the L2 cache."""
    row = tl.program_id(0)
    from_ptr = x_ptr + row.to(tl.int64) * row_stride
    to_ptr = rows_ptr + row.to(tl.int64) * columns
    offsets = tl.arange(0, BLOCK)
    left_out = row * 0 - 1
    if HAS_LEFT_OUT:
        left_out = tl.load(left_out_ptr + row).to(tl.int32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK):
        column = start + offsets
        value = tl.load(from_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        if HAS_LEFT_OUT:
            value = tl.where(column == left_out, 0.0, value)
        largest = tl.maximum(largest, tl.where(value == value, tl.abs(value), float("inf")))  # a maximum passes over NaN
    top = tl.max(largest, axis=0)
    bits = top.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(exponent, LOWEST)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales_ptr + row, tl.where(top < float("inf"), scale, float("nan")))
    for start in tl.range(0, columns, BLOCK):
        column = start + offsets
        value = tl.load(from_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        if HAS_LEFT_OUT:
            value = tl.where(column == left_out, 0.0, value)
        tl.store(to_ptr + column, (value * inverse).to(rows_ptr.dtype.element_ty), mask=column < columns)


def _launch(x: Tensor, left_out: Tensor | None) -> Rounded:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    rounded = Rounded(
        torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(rows, 1, dtype=torch.float32, device=x.device),
    )
    if rows:
        _round_rows_kernel[(rows,)](
            x, x.stride(0), x if left_out is None else left_out, rounded.rows, rounded.scales, columns,
            HAS_LEFT_OUT=left_out is not None, LOWEST=LOWEST_EXPONENT, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return rounded
