"""The chunked divergence against torch's own in float64, value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flame.kernels.divergence import linear_divergence
from tests.support.losses import chunks_of


def draw(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rows_per_chunk", [3, 4096])
@given(
    rows=st.integers(1, 9),
    rule=st.sampled_from([(1.0, None), (0.5, None), (2.0, 1.5)]),
    has_bias=st.booleans(),
    trains_head=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_its_definition(rows_per_chunk, rows, rule, has_bias, trains_head, seed):
    (scale, cap), generator = rule, torch.Generator().manual_seed(seed)
    states, targets = draw(rows, 4, seed=seed).requires_grad_(), draw(rows, 4, seed=seed + 1).requires_grad_()
    weight, bias = draw(7, 4, seed=seed + 2).requires_grad_(), draw(7, seed=seed + 3).requires_grad_() if has_bias else None
    counted = torch.rand(rows, generator=generator) < 0.7
    labels = torch.where(counted, torch.randint(0, 7, (rows,), generator=generator), -100)

    def find_logits(vectors, matrix, offset):
        logits = (vectors @ matrix.T + (0 if offset is None else offset)) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    head = (weight, bias) if trains_head else (weight.detach(), None if bias is None else bias.detach())
    trained = [states, *([weight] if trains_head else []), *([bias] if trains_head and has_bias else [])]
    with chunks_of(rows_per_chunk):
        found = linear_divergence(states, head[0], targets, counted, labels, head[1], scale, cap)
        gradients = torch.autograd.grad(3.0 * found.total, trained)

    logits = find_logits(states, *head)
    wanted = find_logits(targets, weight, bias).detach()
    expected = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)[counted].sum()
    torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-9)
    for gradient, wanted_gradient in zip(gradients, torch.autograd.grad(3.0 * expected, trained), strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-9)
    ce = F.cross_entropy(wanted[counted], labels[counted], reduction="sum")
    torch.testing.assert_close(found.target_ce, ce, rtol=1e-9, atol=1e-9)
    assert found.agreed == (logits.argmax(-1) == wanted.argmax(-1))[counted].sum()
    assert not found.target_ce.requires_grad


def test_half_precision_states():
    """Sums are float32, gradients in the dtype of what they belong to, all near the float64 result."""
    states, targets, weight = (draw(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(40, 8), (40, 8), (30, 8)]))
    counted, results = torch.ones(40, dtype=torch.bool), []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        found = linear_divergence(*inputs, targets.to(dtype), counted)
        results.append((found.total, *torch.autograd.grad(found.total, inputs)))
    (total, *gradients), (exact, *exact_gradients) = results
    assert total.dtype == torch.float32 and all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    torch.testing.assert_close(total.double(), exact, rtol=0.02, atol=0.0)
    assert all((g.double() - e).norm() < 0.03 * e.norm() for g, e in zip(gradients, exact_gradients, strict=True))


def test_without_gradients_none_are_made():
    found = linear_divergence(draw(3, 4, seed=0), draw(7, 4, seed=1), draw(3, 4, seed=2), torch.tensor([True, False, True]))
    assert not found.total.requires_grad and found.total > 0 and found.target_ce == 0
