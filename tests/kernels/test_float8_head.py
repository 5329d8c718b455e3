"""The output head in 8 bits against its definition in float64, and on GPUs against the arithmetic of the CPU."""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flame.errors import UserError
from flame.kernels import float8_head
from flame.kernels.cross_entropy import linear_cross_entropy
from flame.kernels.float8_head import Float8Head, check_float8_head, find_float8_head_conflicts, round_rows
from flame.models.output_head import LogitRule, OutputHead
from tests.support.losses import chunks_of

LARGEST = 448.0
"""Of float8_e4m3."""


def restore(x: Tensor) -> Tensor:
    """Each row to float8_e4m3 and back, by the smallest power of two that brings it into the range: float64."""
    scales = find_scales(x)
    return (x.double() / scales).float().to(torch.float8_e4m3fn).double() * scales


def find_scales(x: Tensor) -> Tensor:
    """The smallest powers of two that bring rows into the range, from 2^-100 on: float64 [m, 1]."""
    exponents = []
    for row in x.double():
        exponent = -100
        while row.abs().max() > LARGEST * 2.0**exponent:
            exponent += 1
        exponents.append(exponent)
    return torch.exp2(torch.tensor(exponents, dtype=torch.float64))[:, None]


@given(
    scale=st.sampled_from([0.0, 1e-35, 1e-6, 1.0, 448.0, 3e38]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_rows_are_rounded_by_the_smallest_power_of_two(scale, rows, columns, seed):
    x = (2 * torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) - 1) * scale
    x[0, 0] = scale  # on the edge of a power of two times 448, for one
    found = round_rows(x)
    assert torch.equal(found.scales.double(), find_scales(x))
    assert torch.equal(found.rows.double() * found.scales.double(), restore(x))
    left_out = torch.randint(-1, columns, (rows,), generator=torch.Generator().manual_seed(seed))
    without = x.clone()
    for row, column in enumerate(left_out.tolist()):
        if column >= 0:
            without[row, column] = 0
    found = round_rows(x, left_out)
    assert torch.equal(found.rows.double() * found.scales.double(), restore(without))


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_a_broken_row_stays_broken_and_alone(broken):
    x = torch.ones(3, 16)
    x[1, 5] = broken
    found = round_rows(x)
    restored = found.rows.float() * found.scales
    assert restored[1].isnan().any() and torch.equal(restored[[0, 2]], x[[0, 2]])


@pytest.mark.parametrize("rows_per_chunk", [2, 4096])
@given(
    tokens=st.integers(1, 9),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    cap=st.sampled_from([None, 0.7, 30.0]),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cross_entropy_in_float8_is_its_definition(rows_per_chunk, tokens, scale, cap, has_bias, seed):
    """Rounded factors, exact products: the loss and all gradients, with masked rows."""
    generator = torch.Generator().manual_seed(seed)
    h, w, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((tokens, 5), (7, 5), (7,)))
    labels = torch.randint(0, 7, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in (h, w, b))
    with chunks_of(rows_per_chunk):
        found = linear_cross_entropy(hidden, weight, labels, bias if has_bias else None, scale, cap, True)
    (0.5 * found).backward()

    product = (restore(h) @ restore(w).T + (b if has_bias else 0)).requires_grad_()
    logits = scale * product if cap is None else cap * torch.tanh(scale * product / cap)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (grad,) = torch.autograd.grad(0.5 * expected, product)
    others, exact = grad.clone(), torch.zeros_like(h)
    for t, label in enumerate(labels.tolist()):
        if label >= 0:
            others[t, label] = 0
            exact[t] = grad[t, label] * w[label]
    expected_hidden = restore(others / (0.5 * scale)) * (0.5 * scale) @ restore(w.T).T + exact
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hidden.grad, expected_hidden, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.grad, grad.T @ h, rtol=1e-9, atol=1e-9)
    if has_bias:
        torch.testing.assert_close(bias.grad, grad.sum(0), rtol=1e-9, atol=1e-9)


def test_a_tied_matrix_gets_the_sum_of_both_gradients():
    """Embedding and output head are one parameter."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(32, 16, generator=generator, requires_grad=True)
    ids, labels = torch.randint(0, 32, (2, 40), generator=generator)
    linear_cross_entropy(matrix[ids], matrix, labels, in_float8=True).backward()
    embedding, head = (matrix.detach().clone().requires_grad_() for _ in range(2))
    linear_cross_entropy(embedding[ids], head, labels, in_float8=True).backward()
    torch.testing.assert_close(matrix.grad, embedding.grad + head.grad)


def test_small_probabilities_survive():
    """With the label's entry in the scale, most of a flat distribution over 100,000 tokens would be rounded to 0 or doubled."""
    generator = torch.Generator().manual_seed(0)
    hidden = (0.3 * torch.randn(8, 16, generator=generator)).requires_grad_()
    weight = 0.3 * torch.randn(100_000, 16, generator=generator) + 0.1  # so that the sum of the small parts does not vanish
    labels = torch.randint(0, 100_000, (8,), generator=generator)
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, in_float8=True), hidden)
    (exact,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    assert (found - exact).norm() < 5e-3 * exact.norm()


def test_only_what_has_a_gradient_is_rounded():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 16, generator=generator), torch.randn(32, 16, generator=generator)
    labels = torch.arange(8)
    head = OutputHead(weight, None, LogitRule(), trains_in_float8=True)
    exact = linear_cross_entropy(hidden, weight, labels)
    assert head.sum_cross_entropy(hidden, labels) != exact
    with torch.no_grad():
        assert head.sum_cross_entropy(hidden, labels) == exact


def test_heads_and_devices_that_cannot_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"training\.float8_head = true needs a GPU of compute capability 8\.9.*set it to false"):
        check_float8_head("cpu")
    monkeypatch.setattr(float8_head, "has_8_bit_products", lambda device_type: True)
    check_float8_head("cuda")
    assert not list(find_float8_head_conflicts(32, 16))
    for sizes in ((50_257, 768), (32, 24)):
        (line,) = find_float8_head_conflicts(*sizes)
        assert f"the output head is {sizes[0]} x {sizes[1]}, and both must be multiples of 16" in line


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("has_left_out", [False, True])
def test_the_kernel_compiles_for_hopper(dtype, has_left_out):
    """To machine code, which needs no GPU."""
    kernel = float8_head._round_rows_kernel
    settings = {"HAS_LEFT_OUT": has_left_out, "LOWEST": float8_head.LOWEST_EXPONENT, "BLOCK": float8_head.BLOCK}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(settings, "constexpr")
    signature |= {"x_ptr": f"*{dtype}", "left_out_ptr": "*i64", "rows_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    constants = {(kernel.arg_names.index(name),): value for name, value in settings.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert "cubin" in compiled.asm


# ---------------------------------------------------------------- on GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [16, 2048, 6000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_rounds_to_the_same_bits(columns, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, columns, generator=generator) * torch.logspace(-30, 30, 65)[:, None]
    x[3], x[4, 0], x[5, 0] = 0, torch.inf, torch.nan
    x = x.to(dtype)
    for left_out in (None, torch.randint(-1, columns, (65,), generator=generator)):
        expected = round_rows(x, left_out)
        found = round_rows(x.cuda(), None if left_out is None else left_out.cuda())
        assert torch.equal(found.scales.cpu().isnan(), expected.scales.isnan())
        whole = ~expected.scales[:, 0].isnan()
        assert whole.sum() >= 63
        assert torch.equal(found.scales.cpu()[whole], expected.scales[whole])
        assert torch.equal(found.rows.cpu().float()[whole], expected.rows.float()[whole])
        restored = found.rows.cpu().float() * found.scales.cpu()
        assert not restored[~whole].isfinite().all(dim=1).any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 107, 512])
def test_the_gpu_takes_the_same_products(rows):
    """Much closer to the arithmetic of the CPU than that is to exact products."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).bfloat16() for size in ((rows, 256), (6016, 256)))
    grad = torch.rand(rows, 6016, generator=generator).bfloat16()
    labels = torch.full((rows,), -100)
    labels[0] = 7
    results = []
    for device in ("cuda", "cpu"):
        head = Float8Head(weight.to(device))
        logits = torch.empty(rows, 6016, dtype=torch.bfloat16, device=device)
        head.project_(hidden.to(device), logits)
        grad_hidden = torch.empty(rows, 256, dtype=torch.bfloat16, device=device)
        head.multiply_gradient_(grad.to(device), labels.to(device), grad_hidden)
        results.append((logits.cpu().double(), grad_hidden.cpu().double()))
    products = hidden.double() @ weight.T.double(), grad.double() @ weight.double()
    for found, expected, exact in zip(*results, products, strict=True):
        assert (found - expected).norm() < 5e-3 * expected.norm()
        assert (expected - exact).norm() > 2e-2 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_chunk", [128, 4096])
@pytest.mark.parametrize(("scale", "cap", "has_bias"), [(1.0, None, False), (0.5, 3.0, True)])
def test_cross_entropy_on_the_gpu(rows_per_chunk, scale, cap, has_bias):
    """An odd number of tokens, a last chunk that is not full, and masked rows, one chunk's all."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((1003, 256), (6016, 256), (6016,)))
    hidden, weight = hidden / 4, weight / 4
    labels = torch.randint(0, 6016, (1003,), generator=generator)
    labels[::7], labels[128:256] = -100, -100
    results = []
    for device in ("cuda", "cpu"):
        h, w, b = (tensor.detach().to(device).requires_grad_() for tensor in (hidden, weight, bias))
        with chunks_of(rows_per_chunk):
            loss = linear_cross_entropy(h, w, labels.to(device), b if has_bias else None, scale, cap, True)
        loss.backward()
        assert not h.grad[labels.to(device) < 0].any()
        results.append([loss.detach().cpu().float(), h.grad.cpu().float(), w.grad.cpu().float()])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()
    assert (results[0][0] - results[1][0]).abs() < 2e-3 * results[1][0].abs()
