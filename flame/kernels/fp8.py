"""Matrix products of the anti-causal pass in 8-bit floating point.

Each row of the activations and of the weight is scaled to the range of float8_e4m3 by its largest entry. So no state is kept
between steps. Micikevicius et al. 2022 (arXiv:2209.05433) describe the format. No gradient passes through the rounding: the
summaries are targets, which it changes slightly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flame.errors import UserError

logger = logging.getLogger("flame")

LARGEST = torch.finfo(torch.float8_e4m3fn).max
FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with 8-bit matrix products."""
SIZE_STEP = 16
"""Both dimensions of a weight must be multiples of this."""


class Fp8Switch:
    """Switches the layers that `install_fp8` has changed between 8-bit and ordinary products."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Use 8-bit products inside the `with` block."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


class _Fp8Linear(nn.Linear):
    switch: Fp8Switch

    def forward(self, x: Tensor) -> Tensor:
        return multiply_fp8(x, self.weight, self.bias) if self.switch.is_on else super().forward(x)


def install_fp8(layers: nn.ModuleList) -> Fp8Switch:
    """Let all linear layers inside `layers` multiply in 8 bits while the returned switch is on. Call before sharding.

    Layers with unsupported sizes stay as they are. The log says how many were changed.

    Raises:
        UserError: no layer can use 8-bit products.
    """
    switch = Fp8Switch()
    matrices = sum(parameter.ndim > 1 for parameter in layers.parameters())
    changed = 0
    for module in layers.modules():
        if type(module) is nn.Linear and module.in_features % SIZE_STEP == 0 and module.out_features % SIZE_STEP == 0:
            module.__class__ = _Fp8Linear
            module.switch = switch  # type: ignore[assignment]  # mypy does not see the new class
            changed += 1
    if not changed:
        raise UserError(
            'future_encoder.precision = "fp8": the decoder layers have no linear layer with sizes that are multiples of '
            f'{SIZE_STEP}: set it to "bf16"'
        )
    logger.info("anti-causal pass in fp8: %d of the %d matrices of the decoder layers", changed, matrices)
    return switch


def multiply_fp8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias with both factors rounded to 8 bits and sums in float32.

    Args:
        x: [..., d], bfloat16.
        weight: [n, d].
        bias: [n] or None.

    Returns:
        [..., n], bfloat16.
    """
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    columns, column_scale = quantize_rows(weight)
    product = torch._scaled_mm(
        rows, columns.t(), scale_a=row_scale, scale_b=column_scale.t(), out_dtype=x.dtype, use_fast_accum=True
    )
    product = product if bias is None else product + bias
    return product.reshape(*x.shape[:-1], -1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [m, d] to float8_e4m3 [m, d] and float32 scales [m, 1]; their product is approximately x."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def has_8_bit_products(device_type: str) -> bool:
    """Whether the current device multiplies 8-bit floats: a GPU of compute capability 8.9 or above."""
    return device_type == "cuda" and torch.cuda.get_device_capability() >= FIRST_CAPABILITY


def check_fp8(device_type: str) -> None:
    """Reject devices without 8-bit products.

    Raises:
        UserError: the device is a CPU or a GPU below compute capability 8.9.
    """
    if has_8_bit_products(device_type):
        return
    needed = ".".join(map(str, FIRST_CAPABILITY))
    raise UserError(
        f'future_encoder.precision = "fp8" needs a GPU of compute capability {needed} or above, which this machine does not '
        'have: set it to "bf16"'
    )
