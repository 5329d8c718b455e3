"""What learns from what, and what a summary can see, on real small models."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from flame.attention.backends import RecurrentBackend, reverse_documents
from flame.config.schema import Experimental
from flame.models.wrapper import TrainingModel
from flame.objectives.future.options import PredictorOptions
from flame.objectives.step import Requested, compute_losses
from tests.support.models import RunningMean, build_unsharded, future_config, pack, random_batch, random_cu_seqlens, tiny_llama

# Families whose layers differ: grouped heads and tied embeddings; QK-norm; norms after the sub-layers; biases.
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None, "attention_dropout": 0.0, "hidden_dropout": 0.0},
}


def family_config(family: str):
    if family == "llama":
        return tiny_llama()
    shape = tiny_llama().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    wanted = {name: shape[name] for name in names} | {"max_position_embeddings": 256} | FAMILIES[family]
    return AutoConfig.for_model(family, **{name: value for name, value in wanted.items() if value is not None})


@torch.no_grad()
def summarize(model: TrainingModel, batch, direction: str, window_k: int = 0) -> torch.Tensor:
    return model.encode_past(batch) if direction == "causal" else model.encode_future(batch, window_k)


@pytest.mark.parametrize("window_k", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_leak(family, window_k):
    """Change one token: F changes nowhere but at or before it in its own document, and there it does."""
    cu = torch.tensor([0, 5, 6, 13, 20, 21], dtype=torch.int32)
    model = build_unsharded(future_config(), family_config(family))
    layers = model.lm.config.num_hidden_layers
    batch = random_batch(cu)
    base = summarize(model, batch, "future", window_k)
    for j in range(int(cu[-1])):
        tokens = batch.input_ids[0].clone()
        tokens[j] = (tokens[j] + 1) % 61
        changed = (summarize(model, pack(tokens, cu), "future", window_k) != base).any(-1)
        start = int(cu[cu <= j].max())
        horizon = layers * window_k if window_k else j - start
        expected = torch.zeros_like(changed)
        expected[max(start, j - horizon) : j + 1] = True
        assert torch.equal(changed, expected), f"token {j}: {changed.nonzero().flatten().tolist()}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["causal", "future"])
def test_packed_equals_one_document_at_a_time(family, direction):
    cu = torch.tensor([0, 7, 8, 20, 23], dtype=torch.int32)
    model = build_unsharded(future_config(), family_config(family)).double()
    batch = random_batch(cu)
    packed = summarize(model, batch, direction)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        alone = pack(batch.input_ids[0, start:end], torch.tensor([0, end - start], dtype=torch.int32))
        torch.testing.assert_close(summarize(model, alone, direction), packed[start:end], rtol=1e-10, atol=1e-10)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_reversal_is_its_own_inverse_and_stays_in_documents(lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    expected = [t for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) for t in reversed(range(a, b))]
    order = reverse_documents(cu, sum(lengths))
    assert order.tolist() == expected
    assert order[order].tolist() == list(range(sum(lengths)))


def test_reversed_passes_of_a_recurrence():
    """Summary t is the state of the recurrence over t .. end of its document, read backwards."""
    cu = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    batch = random_batch(cu)
    model = SimpleNamespace(base_model=RunningMean(), config=SimpleNamespace(model_type="gla"))
    past, future = RecurrentBackend().encode_past(model, batch), RecurrentBackend().encode_future(model, batch, 0)
    tokens = torch.nn.functional.one_hot(batch.input_ids[0], 61).double()
    for a, b in itertools.pairwise(cu.tolist()):
        for t in range(a, b):
            torch.testing.assert_close(past[t], tokens[a : t + 1].mean(0))
            torch.testing.assert_close(future[t], tokens[t:b].mean(0))


def gradients(model: TrainingModel, batch, weight: float | None = None) -> dict[str, torch.Tensor]:
    """Gradients of the aux loss alone, or of ce + weight * aux."""
    model.zero_grad()
    losses = model(compute_losses, batch, Requested(aux=True))
    loss = losses.aux.loss_sum if weight is None else losses.ce_sum + weight * losses.aux.loss_sum
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head_type", ["linear", "mlp", "gated"])
def test_aux_loss_reaches_backbone_predictor_and_estimator(head_type):
    config = future_config(PredictorOptions(head_type=head_type), learnable_temperature=True)
    model = build_unsharded(config, tiny_llama(tie_word_embeddings=False))
    grads = gradients(model, random_batch(random_cu_seqlens(40, 4, seed=1)))
    unreached = {name for name, p in model.named_parameters() if name not in grads or not grads[name].abs().sum() > 0}
    assert unreached == {"lm.lm_head.weight"}  # the output embedding takes no part in the future loss


def test_summaries_are_labels():
    """The gradient of the aux loss is that of a run in which the summaries are constants, computed beforehand."""
    config = future_config()
    model = build_unsharded(config).double()
    batch = random_batch(random_cu_seqlens(30, 3, seed=2))
    found = gradients(model, batch)

    segment_ids = batch.segment_ids[0]
    constants = summarize(model, batch, "future")
    model.zero_grad()
    predictions = model.objective.predictor(model.encode_past(batch))
    pairs = [t for t in range(29) if segment_ids[t + 1] == segment_ids[t]]
    x = torch.nn.functional.normalize(predictions[pairs], dim=-1)
    y = torch.nn.functional.normalize(constants[[t + 1 for t in pairs]], dim=-1)
    torch.nn.functional.cross_entropy(x @ y.T / 0.1, torch.arange(len(pairs)), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_anti_causal_pass_builds_no_graph_and_no_logits(monkeypatch):
    config = future_config()
    model = build_unsharded(config)
    seen = []

    def spy(inner):
        def run(*args):
            seen.append((torch.is_grad_enabled(), inner(*args)))
            return seen[-1][1]

        return run

    monkeypatch.setattr(model, "encode_past", spy(model.encode_past))
    monkeypatch.setattr(model, "encode_future", spy(model.encode_future))
    monkeypatch.setattr(model.lm.lm_head, "forward", lambda *_: pytest.fail("logits were computed"))
    model(compute_losses, random_batch(random_cu_seqlens(20, 2, seed=3)), Requested(aux=True))
    (future_grad, summaries), (causal_grad, hidden) = seen
    assert causal_grad and hidden.requires_grad
    assert not future_grad and summaries.grad_fn is None and not summaries.requires_grad


def test_frozen_language_model_gets_no_gradient_and_no_cross_entropy():
    config = future_config(learnable_temperature=True)
    config.experimental = Experimental(freeze_lm_for_infonce=True)
    model = build_unsharded(config)
    batch = random_batch(random_cu_seqlens(30, 3, seed=4))
    losses = model(compute_losses, batch, Requested(aux=True, ce=False))
    assert losses.ce_sum is None
    losses.aux.loss_sum.backward()
    assert all(p.grad is None for p in model.lm.parameters())
    assert all(p.grad is not None for m in (model.objective.predictor, model.objective.estimator) for p in m.parameters())


@given(st.integers(0, 4), st.integers(0, 100))
def test_targets_are_shifted_inside_documents(shift, seed):
    """The aux loss of a pack equals InfoNCE over explicitly listed (t, t + shift) pairs."""
    config = future_config(target_shift=shift)
    model = build_unsharded(config).double()
    cu = random_cu_seqlens(24, 4, seed)
    batch = random_batch(cu, seed=seed)
    losses = model(compute_losses, batch, Requested(aux=True))
    with torch.no_grad():
        hidden, summaries = summarize(model, batch, "causal"), summarize(model, batch, "future")
        pairs = [
            (t, t + shift)
            for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
            for t in range(start, end)
            if t + max(shift, 1) < end
        ]
        if not pairs:
            assert losses.aux.loss_sum == 0
            return
        x = torch.nn.functional.normalize(model.objective.predictor(hidden[[t for t, _ in pairs]]), dim=-1)
        y = torch.nn.functional.normalize(summaries[[u for _, u in pairs]], dim=-1)
        expected = torch.nn.functional.cross_entropy(x @ y.T / 0.1, torch.arange(len(pairs)), reduction="sum")
    torch.testing.assert_close(losses.aux.loss_sum, expected, rtol=1e-9, atol=1e-9)


def test_a_pack_without_anchors_adds_exactly_zero_and_runs_backward():
    config = future_config(learnable_temperature=True)
    model = build_unsharded(config)
    batch = random_batch(torch.arange(9, dtype=torch.int32))  # single-token documents
    grads = gradients(model, batch, weight=0.5)
    assert all((grad == 0).all() for grad in grads.values())
    losses = model(compute_losses, batch, Requested(aux=True))
    assert losses.aux.loss_sum == 0 and losses.aux.num_items == 0 and losses.ce_sum == 0


def test_the_language_model_starts_the_same_with_and_without_the_future_loss():
    with_future = build_unsharded(future_config())
    without = build_unsharded(future_config(loss_weight=0.0))
    assert without.objective is None
    for a, b in zip(with_future.lm.parameters(), without.lm.parameters(), strict=True):
        assert torch.equal(a, b)
