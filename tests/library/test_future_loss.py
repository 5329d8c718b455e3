"""The future loss of a loaded model against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame import FutureLoss, UserError, encode_future
from tests.support.families import build_toy
from tests.support.library import CU, Deaf, build, draw, list_documents

T = 30


def setting(**options: object):
    lm = build(dtype=torch.float64)
    return lm, FutureLoss(lm, **options).double(), draw()


def by_brute_force(
    predictions: Tensor, summaries: Tensor, shift: int, temperature: float, allowed=lambda anchor, other: True
) -> Tensor:
    """One anchor at a time, from the formula: mean over anchors of -log softmax of the cosines."""
    document = {t: number for number, (start, end) in enumerate(list_documents(CU)) for t in range(start, end)}
    ahead = max(shift, 1)
    anchors = [t for t in range(T) if t + ahead < T and document[t + ahead] == document[t]]
    losses = []
    for anchor in anchors:
        scores = {a: F.cosine_similarity(predictions[anchor], summaries[a + shift], dim=0) / temperature for a in anchors}
        kept = [scores[a] for a in anchors if a == anchor or allowed(anchor, a)]
        losses.append(torch.logsumexp(torch.stack(kept), 0) - scores[anchor])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("shift, window, temperature", [(1, 0, 0.1), (0, 0, 0.5), (3, 2, 0.1)])
def test_the_loss_and_its_gradients_are_the_formulas(shift, window, temperature):
    lm, future, tokens = setting(target_shift=shift, window_k=window, temperature=temperature)
    hidden = future.encode(tokens, CU).detach().requires_grad_()
    loss = future(hidden, tokens, CU)
    parameters = [hidden, *future.parameters()]
    found = torch.autograd.grad(loss, parameters)

    summaries = encode_future(lm, tokens, CU, window)
    expected = by_brute_force(future.predictor(hidden), summaries, shift, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert future.metrics["num_anchors"] == sum(max(end - start - max(shift, 1), 0) for start, end in list_documents(CU))
    torch.testing.assert_close(future.metrics["mi_lower_bound"], future.metrics["num_anchors"].log() - loss.detach())


def test_neighbors_and_duplicates_are_no_negatives():
    lm, future, tokens = setting(exclude_neighbors=2)
    hidden = future.encode(tokens, CU)
    predictions, summaries = future.predictor(hidden), encode_future(lm, tokens, CU)
    document = torch.bucketize(torch.arange(T), CU[1:-1], right=True)
    expected = by_brute_force(predictions, summaries, 1, 0.1, lambda a, b: document[a] != document[b] or abs(a - b) > 2)
    torch.testing.assert_close(future(hidden, tokens, CU), expected, rtol=1e-10, atol=1e-12)

    tokens[7:9] = tokens[22:24] = tokens[28:30] = torch.tensor([5, 6])  # three documents end alike
    future.exclude_neighbors, future.exclude_duplicates = 0, True
    hidden = future.encode(tokens, CU)
    predictions, summaries = future.predictor(hidden), encode_future(lm, tokens, CU)
    ends = dict.fromkeys(range(T))
    for start, end in list_documents(CU):
        ends.update({t: tuple(tokens[t:end].tolist()) for t in range(start, end)})
    assert ends[7] == ends[22] == ends[28]
    expected = by_brute_force(predictions, summaries, 1, 0.1, lambda a, b: ends[a + 1] != ends[b + 1])
    torch.testing.assert_close(future(hidden, tokens, CU), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labels", [None, "every third"])
def test_the_next_tokens_loss_is_cross_entropy(labels):
    lm, future, tokens = setting()
    expected_labels = torch.full((T,), -100)
    for start, end in list_documents(CU):
        expected_labels[start : end - 1] = tokens[start + 1 : end]
    if labels:
        expected_labels[torch.arange(T) % 3 != 0] = -100
    hidden = future.encode(tokens, CU)
    loss = future.next_token_loss(hidden, tokens, CU, None if labels is None else expected_labels)
    expected = F.cross_entropy(hidden @ lm.lm_head.weight.T, expected_labels)
    torch.testing.assert_close(loss, expected)
    parameters = list(lm.parameters())  # the head's is the embedding's
    theirs = torch.autograd.grad(expected, parameters, retain_graph=True)
    for one, other in zip(torch.autograd.grad(loss, parameters), theirs, strict=True):
        torch.testing.assert_close(one, other)
    total = future.next_token_loss(hidden, tokens, CU, None if labels is None else expected_labels, reduction="sum")
    torch.testing.assert_close(total, expected * (expected_labels != -100).sum())


def test_ten_lines_train_both_losses():
    torch.manual_seed(0)
    lm = build(attention="eager").train()
    future = FutureLoss(lm, target_shift=1, temperature=0.1)
    optimizer = torch.optim.AdamW([*lm.parameters(), *future.parameters()], lr=3e-3)
    tokens, first, last = draw(), None, (0.0, 0.0)
    for _ in range(30):
        hidden = future.encode(tokens, CU)
        next_token, ahead = future.next_token_loss(hidden, tokens, CU), future(hidden, tokens, CU)
        (next_token + 0.3 * ahead).backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or (next_token.item(), ahead.item())
        last = next_token.item(), ahead.item()
    assert last[0] < 0.5 * first[0] and last[1] < 0.5 * first[1]


def test_the_model_is_used_and_not_owned():
    lm, future, _ = setting(learnable_temperature=True)
    own = {name for name, _ in future.named_parameters()}
    assert own == set(future.state_dict()) and all(name.startswith(("predictor.", "estimator.")) for name in own)
    future.to(torch.float32)
    assert lm.dtype == torch.float64
    future.eval()
    lm.train()
    assert not future.predictor.training and lm.training


def test_summaries_may_come_from_elsewhere():
    _, future, tokens = setting()
    hidden = future.encode(tokens, CU)
    assert torch.equal(future(hidden, tokens, CU, summaries=future.summarize(tokens, CU)), future(hidden, tokens, CU))
    other = torch.randn(T, 32, dtype=torch.float64)
    torch.testing.assert_close(
        future(hidden[None], tokens, CU, summaries=other), by_brute_force(future.predictor(hidden), other, 1, 0.1)
    )


def test_masked_and_drawn_anchors():
    _, future, tokens = setting()
    hidden = future.encode(tokens, CU)
    future(hidden, tokens, CU, anchor_mask=torch.arange(T) < 9)
    assert future.metrics["num_anchors"] == 8
    total = future(hidden, tokens, CU, reduction="sum")
    torch.testing.assert_close(total / future.metrics["num_anchors"], future(hidden, tokens, CU))
    future.max_anchors = 5
    losses = {future(hidden, tokens, CU).item() for _ in range(5)}
    assert future.metrics["num_anchors"] == 5 and len(losses) > 1


@pytest.mark.parametrize("name", ["infonce", "bilinear", "cosine", "smooth_l1"])
@pytest.mark.parametrize("edges", [[0], [0, 1, 2, 3]])
def test_packs_without_anchors_give_exactly_zero(name, edges):
    """No tokens; and single-token documents, which have no future."""
    lm = build()
    future, tokens = FutureLoss(lm, estimator_type=name, exclude_duplicates=True, exclude_neighbors=1), draw(edges[-1])
    hidden = future.encode(tokens, torch.tensor(edges))
    loss = future(hidden, tokens, torch.tensor(edges)) + future.next_token_loss(hidden, tokens, torch.tensor(edges))
    loss.backward()
    assert loss.item() == 0.0 and future.metrics["num_anchors"] == 0
    assert all(p.grad is None or not p.grad.any() for p in [*lm.parameters(), *future.parameters()])


def test_what_is_not_finite_is_said():
    _, future, tokens = setting()
    hidden = future.encode(tokens, CU).detach()
    hidden[3] = math.inf
    hidden.requires_grad_()
    assert future(hidden, tokens, CU).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(dtype):
    lm, tokens = build(dtype=dtype), draw()
    future = FutureLoss(lm)
    assert {parameter.dtype for parameter in future.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        hidden = future.encode(tokens, CU)
        losses = future.next_token_loss(hidden, tokens, CU), future(hidden, tokens, CU)
    sum(losses).backward()
    wide = FutureLoss(lm.double()).double()
    wide.load_state_dict(future.state_dict())
    hidden = wide.encode(tokens, CU)
    expected = wide.next_token_loss(hidden, tokens, CU), wide(hidden, tokens, CU)
    for loss, reference in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32 and abs(loss.item() - reference.item()) < 0.03 * reference.item()


def test_a_learned_temperature_gets_its_gradient_and_its_limits():
    lm, future, tokens = setting(learnable_temperature=True)
    with torch.no_grad():
        future.estimator.log_temperature.fill_(5.0)
    hidden = future.encode(tokens, CU)
    loss = future(hidden, tokens, CU)
    assert future.estimator.log_temperature.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, future.estimator.log_temperature)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    reference = by_brute_force(future.predictor(hidden), encode_future(lm, tokens, CU), 1, log_temperature.exp())
    torch.testing.assert_close(gradient[0], torch.autograd.grad(reference, log_temperature)[0])


def test_mistakes_are_named():
    lm, future, tokens = setting()
    hidden = future.encode(tokens, CU)
    for call, message in (
        (lambda: future(hidden[:-1], tokens, CU), "must hold 30 states of width 32"),
        (lambda: future(hidden, tokens, CU, anchor_mask=torch.ones(T)), "anchor_mask must be bool"),
        (lambda: future(hidden, tokens, CU, summaries=hidden[:3]), "summaries has the shape"),
        (lambda: future(hidden, tokens, CU, reduction="none"), 'reduction = "none"'),
        (lambda: future.next_token_loss(hidden, tokens, CU, labels=tokens[:3]), "labels holds 3 entries for 30"),
        (lambda: future(hidden.to("meta"), tokens, CU), "hidden is on meta"),
        (lambda: FutureLoss(lm, target_shift=-1), "target_shift = -1"),
        (lambda: FutureLoss(lm, temperature=0.0), "temperature = 0.0"),
        (lambda: FutureLoss(lm, estimator_type="mine"), 'estimator_type = "mine"'),
        (lambda: FutureLoss(lm, head_type="deep"), 'head_type = "deep"'),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_logits_that_are_more_than_a_product_are_refused():
    lm, tokens = build("llama"), draw()

    def halve(module, args, outputs):
        outputs.logits = 0.5 * outputs.logits

    lm.register_forward_hook(halve)
    future = FutureLoss(lm)
    hidden = future.encode(tokens, CU)
    assert future(hidden, tokens, CU).isfinite()  # the future loss takes no logits
    with pytest.raises(UserError, match="next_token_loss cannot be used: its logits are not its base model"):
        future.next_token_loss(hidden, tokens, CU)
    lm = build("llama, untied head, biases")
    lm.lm_head = torch.nn.Sequential(lm.lm_head)
    with pytest.raises(UserError, match=r"its output head is not one nn\.Linear"):
        FutureLoss(lm).next_token_loss(hidden, tokens, CU)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "phi"])
def test_logits_are_changed_as_the_configuration_says(name):
    lm, tokens = build(name), draw()
    future = FutureLoss(lm)
    start, end = 0, int(CU[1])
    pack = tokens[start:end], torch.tensor([0, end])
    found = future.next_token_loss(future.encode(*pack), *pack)
    expected = lm(tokens[None, start:end], labels=tokens[None, start:end]).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(loss, list(lm.parameters())) for loss in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_leaky_model_is_refused_when_the_loss_is_built():
    with pytest.raises(UserError, match="cannot be used: LEAK"):
        FutureLoss(Deaf(build_toy("llama")))
