"""What holds of every objective, the documented example included: counts, sequences without any, FLOPs, diagnostics."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flame.data.batch import PackedBatch
from flame.models.flops import ModelFlops
from flame.models.wrapper import TrainingModel
from flame.objectives.future.options import PredictorOptions
from flame.objectives.probe import measure_step
from flame.objectives.step import Requested, compute_losses
from tests.support.answers import build_pack, pack_documents, split_documents
from tests.support.models import build_unsharded, count_flops, get_own, random_batch, random_cu_seqlens
from tests.support.objectives import OPTIONS, build_objective, choose

every_objective = pytest.mark.parametrize("name", OPTIONS)


def pack_answers() -> PackedBatch:
    """Most tokens are prompt."""
    return build_pack([(17, 3), (30, 2), (4, 0), (9, 5)])


@every_objective
@pytest.mark.parametrize("answers_only", [False, True])
def test_what_is_counted_before_is_what_the_loss_sums(name, answers_only):
    model = build_objective(name)
    batch = pack_answers() if answers_only else random_batch(random_cu_seqlens(40, 6, seed=1))
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    assert get_own(model).count(batch) == aux.num_items > 0
    assert aux.loss_sum > 0 and aux.loss_sum.dtype == torch.float32 and aux.failed == 0


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("distance", [1, 2, 3, 9])
def test_labels_are_counted_alike_from_tensors(distance, answers_only):
    batch = pack_answers() if answers_only else random_batch(random_cu_seqlens(40, 6, seed=1))
    expected = batch.num_labels if distance == 1 else batch.count_labels_ahead(distance)
    assert batch.sum_labels(distance) == expected == batch.count_labels_ahead(distance)


WITHOUT_PARAMETERS = ("regret", "stp")
WITHOUT_ANY = {
    "single tokens": lambda: random_batch(torch.arange(9, dtype=torch.int32)),
    "no answers": lambda: pack_documents([[1, 2, 3, 4]], 24, 9, 1)[0],
}


@every_objective
@pytest.mark.parametrize("make", WITHOUT_ANY.values(), ids=WITHOUT_ANY)
def test_a_sequence_in_which_nothing_counts_is_exactly_zero_with_a_backward(name, make):
    model, batch = build_objective(name), make()
    losses = model(compute_losses, batch, Requested(aux=True))
    aux = losses.aux
    assert aux.loss_sum == 0 and aux.loss_sum.requires_grad and aux.num_items == aux.failed == 0
    assert get_own(model).count(batch) == 0
    assert all(total == items == 0 for total, items in aux.measures.values())
    (losses.ce_sum + aux.loss_sum).backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}
    assert all(gradient is None or not gradient.any() for gradient in gradients.values())
    own = [gradient for key, gradient in gradients.items() if key.startswith("objective.")]
    assert any(gradient is not None for gradient in own) == (name not in WITHOUT_PARAMETERS)


READ_NO_FUTURE = ("mtp", "mtp_sequential", "top", "fsp_bow", "fsp_revlm", "nitp", "nextlat", "stp")


COMPARE_DOCUMENTS = ("future", "stp")
"""The future loss has negatives in other documents; STP draws for all documents of a sequence at once (test_stp.py)."""


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in COMPARE_DOCUMENTS])
@pytest.mark.parametrize("answers_only", [False, True])
def test_a_pack_is_the_sum_of_its_documents(name, answers_only):
    """Loss and gradients: nothing crosses a boundary."""
    model = build_objective(name).double()
    batch = pack_answers() if answers_only else random_batch(random_cu_seqlens(40, 6, seed=1))

    def differentiate_all(batches: list[PackedBatch]) -> tuple[float, Tensor]:
        model.zero_grad()
        total = sum(model(compute_losses, each, Requested(aux=True, ce=False)).aux.loss_sum for each in batches)
        total.backward()
        found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
        return total.item(), torch.cat([gradient.flatten() for gradient in found])

    (whole, gradient), (parts, expected) = differentiate_all([batch]), differentiate_all(split_documents(batch))
    assert whole == pytest.approx(parts, rel=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


def test_the_anti_causal_pass_that_is_read_is_named():
    """A model of an unknown family is checked in it; where an objective of one's own says nothing, in the language model's."""
    assert all(get_own(build_objective(name)).find_future_pass() is None for name in READ_NO_FUTURE)
    assert get_own(build_objective("skip_token")).find_future_pass() == (0, None, 0)
    assert get_own(build_objective("future", future_k=3)).find_future_pass() == (3, None, 0)
    taught = get_own(build_objective("future", future_k=3, target="random"))
    assert taught.find_future_pass() == (3, taught.teacher, 0) and taught.teacher is not None
    assert all(get_own(build_objective("future", target=t)).find_future_pass() is None for t in ("causal", "mean_embedding"))


# ---------------------------------------------------------------- arithmetic

LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
"""Weights of a layer of the model: query and output, key and value, the MLP."""
TABLE = 61 * 32
PREDICTOR = 32 * 32 + 32 * 32


def count_pairs(batch: PackedBatch, own: bool) -> int:
    """Pairs of a token and one before it in its document, or itself."""
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens.tolist())]
    return sum(n * (n - 1) // 2 + (n if own else 0) for n in lengths)


def count_privileged_pairs(batch: PackedBatch) -> int:
    """Pairs of two tokens of a document, in both orders, but those of a token and the next one."""
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens.tolist())]
    return sum(n * n - (n - 1) for n in lengths)


@pytest.mark.parametrize("answers_only", [False, True])
def test_flops_of_objectives_of_labels_by_hand(answers_only):
    """A layer runs over all tokens, forward and backward, with attention; an output head only where something is predicted."""
    batch = pack_answers() if answers_only else random_batch(random_cu_seqlens(40, 6, seed=1))
    total = batch.input_ids.shape[1]
    predicted = batch.num_labels if answers_only else total
    layer = 6 * LAYER * total + 12 * 32 * count_pairs(batch, own=True)
    network = 2 * 2 * LAYER * total + 4 * 2 * 32 * count_pairs(batch, own=True)
    seeing = 2 * 2 * LAYER * total + 4 * 2 * 32 * count_privileged_pairs(batch)
    forwards = {"regret": seeing, "fsp_revlm": network}
    expected = {
        "mtp": 2 * (layer + 6 * TABLE * predicted),
        "mtp_sequential": 2 * (layer + 6 * 2 * 32 * 32 * total + 6 * TABLE * predicted),
        "top": 6 * TABLE * predicted,
        "fsp_bow": layer + 6 * TABLE * predicted,
        "nextlat": 2 * 6 * (2 * 32 * 32 + 32 * 32 + 32 * 32 + TABLE) * predicted,
        "fsp_revlm": layer + 2 * network + 6 * TABLE * predicted,
        "regret": 8 * TABLE * predicted,
        "nitp": 6 * 12 * 32 * 32 * predicted,
        "stp": 0,
        "skip_token": 0,  # it tells nothing of its arithmetic
    }
    for name, heads in expected.items():
        flops = count_flops(build_objective(name), batch)
        forward = forwards.get(name, 0)
        assert (flops.aux_forward, flops.heads) == (forward, heads), name
        assert flops.total == flops.next_token + forward + heads


@pytest.mark.parametrize(
    ("changes", "forward", "heads"),
    [
        ({}, "later", lambda n, t: 6 * PREDICTOR * t + 4 * n * n * 32),
        ({"target": "random", "future_k": 1}, "next", lambda n, t: 6 * PREDICTOR * t + 4 * n * n * 32),
        ({"target": "causal"}, "own", lambda n, t: 6 * PREDICTOR * t + 4 * n * n * 32),
        ({"target": "mean_embedding", "estimator_type": "cosine"}, "none", lambda n, t: 6 * PREDICTOR * t),
        ({"estimator_type": "bilinear"}, "later", lambda n, t: 6 * PREDICTOR * t + 4 * n * n * 32 + 6 * n * 32 * 32),
        ({"max_anchors": 7}, "later", lambda n, t: 6 * PREDICTOR * 7 + 4 * 7 * 7 * 32),
        ({"projection_dim": 8}, "later", lambda n, t: 6 * (32 * 32 + 32 * 8) * t + 4 * n * n * 8),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_flops_of_the_future_loss_by_hand(changes, forward, heads):
    batch = random_batch(random_cu_seqlens(40, 6, seed=1))
    lengths = batch.cu_seqlens.diff().tolist()
    pairs = {
        "own": count_pairs(batch, own=True),
        "later": count_pairs(batch, own=False),
        "next": sum(n - 1 for n in lengths),
    }
    expected = 0 if forward == "none" else 2 * 2 * LAYER * 40 + 4 * 2 * 32 * pairs[forward]
    flops = count_flops(build_objective("future", **{"learnable_temperature": False} | changes), batch)
    assert (flops.aux_forward, flops.heads) == (expected, heads(sum(n - 1 for n in lengths), 40))


def test_global_negatives_are_compared_with_the_candidates_of_the_step():
    batch = random_batch(random_cu_seqlens(40, 6, seed=1))
    config = choose("future", negatives="global")
    config.training.gradient_accumulation_steps, config.world_size = 3, 2
    model, local = build_unsharded(config), build_objective("future")
    more = count_flops(model, batch).heads - count_flops(local, batch).heads
    assert more == 5 * 4 * get_own(model).count(batch) ** 2 * 32


# ---------------------------------------------------------------- diagnostics


def differentiate(model: TrainingModel, batch: PackedBatch) -> dict[str, Tensor]:
    """Gradients of a step, dropout included."""
    torch.manual_seed(7)
    losses = model(compute_losses, batch, Requested(aux=True))
    (losses.ce_sum + losses.aux.loss_sum).backward()
    return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}


MEASURE_A_SAMPLE = ("future", "fsp_revlm", "nitp", "nextlat")
"""Objectives with diagnostics of their own beside the gradients."""


@every_objective
def test_diagnostics_change_nothing_of_training(name, one_process):
    """Weights, buffers, waiting gradients, random numbers and modes; and the step after them is the same to the bit."""
    further = [PredictorOptions(dropout=0.5)] if name == "future" else []
    measured, plain = build_objective(name, *further), build_objective(name, *further)
    batch = random_batch(random_cu_seqlens(40, 5, seed=2))
    before = {key: value.clone() for key, value in measured.state_dict().items()}
    waiting = {key: torch.full_like(weight, 3.0) for key, weight in measured.named_parameters()}
    for key, weight in measured.named_parameters():
        weight.grad = waiting[key]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = measure_step(measured, batch, 42, 0.5, None)
    assert torch.equal(torch.get_rng_state(), state) and measured.training
    assert all(torch.equal(value, before[key]) for key, value in measured.state_dict().items())
    assert all(weight.grad is waiting[key] and (weight.grad == 3).all() for key, weight in measured.named_parameters())

    measured.zero_grad()
    ours, theirs = differentiate(measured, batch), differentiate(plain, batch)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], gradient) for key, gradient in theirs.items())

    values = {key: (total / items).item() for key, (total, items) in found.items()}
    gradients = {f"{name}/grad_{what}" for what in ("norm_ce", "norm_aux", "cosine", "ratio")}
    assert gradients <= values.keys() and all(key.startswith(f"{name}/") for key in values)
    assert (values.keys() > gradients) == (name in MEASURE_A_SAMPLE)
    ratio = 0.5 * values[f"{name}/grad_norm_aux"] / values[f"{name}/grad_norm_ce"]
    assert values[f"{name}/grad_ratio"] == pytest.approx(ratio) and ratio > 0


@every_objective
def test_gradients_of_diagnostics_are_those_of_each_loss(name, one_process):
    model, batch = build_objective(name).double(), random_batch(random_cu_seqlens(40, 5, seed=2))
    found = measure_step(model, batch, 42, 0.5, None)
    vectors = []
    for requested in (Requested(aux=False), Requested(aux=True, ce=False)):
        model.zero_grad()
        losses = model(compute_losses, batch, requested)
        loss = losses.ce_sum / batch.num_labels if requested.ce else losses.aux.loss_sum / get_own(model).count(batch)
        loss.backward()
        vectors.append(torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in model.lm.parameters()]))
    ce, aux = vectors
    expected = {"norm_ce": ce.norm(), "norm_aux": aux.norm(), "cosine": torch.cosine_similarity(ce, aux, dim=0)}
    for what, value in expected.items():
        torch.testing.assert_close(found[f"{name}/grad_{what}"].total, value, rtol=1e-7, atol=1e-9)


def test_beside_a_frozen_model_there_are_no_gradients_to_compare(one_process):
    config = choose("future")
    config.experimental.freeze_lm_for_infonce = True
    model, batch = build_unsharded(config), random_batch(random_cu_seqlens(40, 5, seed=2))
    found = measure_step(model, batch, 42, 0.5, None)
    assert "future/rank_hidden" in found and not any("grad" in key for key in found)


def test_a_model_without_an_objective_has_the_flops_of_the_next_token_alone():
    batch = random_batch(random_cu_seqlens(40, 6, seed=1))
    counter = ModelFlops(build_objective("top").lm)
    expected = 3 * (2 * 2 * LAYER * 40 + 4 * 2 * 32 * count_pairs(batch, own=True) + 2 * TABLE * 40)
    assert counter.count_next_token(batch, is_frozen=False) == expected
