"""Cross entropy of weighted candidates against its definition: all logits, one row at a time, autograd in float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flame.kernels import softmax_rows
from flame.kernels.candidate_cross_entropy import TokenCandidates, linear_candidate_cross_entropy
from flame.kernels.cross_entropy import IGNORED_LABEL, linear_cross_entropy

Tensors = list[Tensor]


def draw(n: int, d: int, vocab: int, seed: int, device: str = "cpu") -> tuple[Tensors, Tensor, Tensor]:
    """States, output embedding and bias with gradient; labels, some ignored; preferences [n, V]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((n, d), (vocab, d), (vocab,))]
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.3] = IGNORED_LABEL
    preferences = torch.randn(n, vocab, dtype=torch.float64, generator=generator)
    return [each.to(device).requires_grad_() for each in tensors], labels.to(device), preferences.to(device)


def weigh_by(preferences: Tensor):
    """Weights that depend on row and token."""

    def weigh(rows: slice, found: TokenCandidates) -> Tensor:
        scores = preferences[rows].gather(1, found.tokens).masked_fill(~found.is_member, -torch.inf)
        return scores.softmax(dim=1)

    return weigh


def compute_by_loop(tensors: Tensors, labels: Tensor, top_k: int, preferences: Tensor, scale: float, cap: float | None) -> Tensor:
    states, weight, bias = tensors
    total = states.new_zeros(())
    for state, label, liked in zip(states, labels.tolist(), preferences, strict=True):
        if label == IGNORED_LABEL:
            continue
        logits = scale * (weight @ state + bias)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        candidates = sorted({*logits.topk(top_k).indices.tolist(), label})
        weights = torch.softmax(liked[candidates], dim=0)
        total = total - (weights * torch.log_softmax(logits, dim=0)[candidates]).sum() / len(candidates)
    return total


def differentiate(total: Tensor, tensors: Tensors) -> Tensors:
    return [total.detach(), *torch.autograd.grad(2.5 * total, tensors)]


@given(
    st.integers(1, 9),
    st.integers(3, 12).flatmap(lambda vocab: st.tuples(st.just(vocab), st.integers(1, vocab))),
    st.sampled_from([(1.0, None), (0.5, None), (1.0, 2.0), (0.25, 1.5)]),
    st.integers(0, 1000),
)
def test_it_is_its_definition(n, sizes, rule, seed):
    vocab, top_k = sizes
    tensors, labels, preferences = draw(n, 4, vocab, seed)
    states, weight, bias = tensors
    ours = linear_candidate_cross_entropy(states, weight, labels, top_k, weigh_by(preferences), bias, *rule)
    assert ours.is_finite
    found = differentiate(ours.total, tensors)
    if (labels == IGNORED_LABEL).all():
        assert not any(each.any() for each in found)
        return
    expected = differentiate(compute_by_loop(tensors, labels, top_k, preferences, *rule), tensors)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-11)


def test_chunks_change_nothing_and_no_chunk_holds_all_logits():
    tensors, labels, preferences = draw(300, 4, 11, seed=1)
    states, weight, _ = tensors
    sizes: list[int] = []

    def weigh(rows: slice, found: TokenCandidates) -> Tensor:
        sizes.append(len(found.tokens))
        return weigh_by(preferences)(rows, found)

    whole = differentiate(linear_candidate_cross_entropy(states, weight, labels, 3, weigh).total, tensors[:2])
    with patch.object(softmax_rows, "CHUNK_BYTES", 100 * 11 * 8):
        parts = differentiate(linear_candidate_cross_entropy(states, weight, labels, 3, weigh).total, tensors[:2])
    assert sizes == [300, 128, 128, 44]
    for each, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-11, atol=1e-12)


def test_with_all_weight_on_the_label_it_is_the_cross_entropy_over_the_number_of_candidates():
    tensors, labels, _ = draw(40, 8, 13, seed=2)
    states, weight, bias = tensors

    def weigh(rows: slice, found: TokenCandidates) -> Tensor:
        return (found.is_label & found.is_member).double()

    found = differentiate(linear_candidate_cross_entropy(states, weight, labels, 13, weigh, bias).total * 13, tensors)
    expected = differentiate(linear_cross_entropy(states, weight, labels, bias), tensors)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("broken", ["state", "weights"])
def test_a_number_that_is_not_finite_leaves_no_loss_and_no_gradient(broken):
    tensors, labels, preferences = draw(20, 4, 11, seed=3)
    states, weight, _ = tensors
    labels[5] = 1
    with torch.no_grad():
        (states if broken == "state" else preferences)[5] = torch.nan
    ours = linear_candidate_cross_entropy(states, weight, labels, 3, weigh_by(preferences))
    assert not ours.is_finite
    assert not any(each.any() for each in differentiate(ours.total, tensors[:2]))


def expect_rounding_alone(n: int, width: int, vocab: int, top_k: int, rule: tuple[float, float | None], device: str) -> None:
    """In bfloat16, loss and gradients are those of float64 with the same candidates and weights."""
    tensors, labels, preferences = draw(n, width, vocab, seed=4, device=device)
    narrow = [each.detach().bfloat16().requires_grad_() for each in tensors]
    wide = [each.detach().double().requires_grad_() for each in narrow]
    best = (wide[0] @ wide[1].t()).argmax(dim=1)  # where p - r is small
    labels = torch.where(labels == IGNORED_LABEL, labels, best)
    chosen: list[tuple[TokenCandidates, Tensor]] = []

    def weigh(rows: slice, found: TokenCandidates) -> Tensor:
        chosen.append((found, weigh_by(preferences)(rows, found)))
        return chosen[-1][1]

    ours = linear_candidate_cross_entropy(narrow[0], narrow[1], labels, top_k, weigh, narrow[2], *rule)
    ((found, weights),) = chosen
    scale, cap = rule
    logits = scale * (wide[0] @ wide[1].t() + wide[2])
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = -(weights * logits.log_softmax(dim=1).gather(1, found.tokens)).sum(dim=1) / found.is_member.sum(dim=1)
    expected = differentiate(loss[labels != IGNORED_LABEL].sum(), wide)
    for each, other in zip(differentiate(ours.total, narrow), expected, strict=True):
        assert (each.double() - other).norm() < 0.02 * other.norm()


def test_bfloat16_adds_rounding_alone():
    expect_rounding_alone(200, 16, 50, 5, (1.0, None), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [(1.0, None), (0.5, 3.0)])
def test_on_a_gpu_too(rule):
    expect_rounding_alone(500, 64, 5000, 16, rule, "cuda")
