"""Which anchors are compared with which summaries: subsampling, excluded neighbours, the projection."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame.attention.masks import draw_anchors, find_anchors, find_neighbors
from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.models.mi_estimator import InfoNCEEstimator
from flame.models.wrapper import TrainingModel
from flame.objectives.future.anchors import choose_shift, count_anchors
from flame.objectives.future.options import FutureOptions
from flame.objectives.step import Requested, compute_losses
from flame.trainer.options import read_options
from flame.trainer.setup import build_modules
from tests.support.models import build_unsharded, future_config, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.refusals import expect_one_line

TOTAL = 40


@given(seed=st.integers(0, 1000), at_most=st.integers(1, TOTAL), chunks=st.integers(1, 12))
def test_drawn_anchors(seed, at_most, chunks):
    cu = random_cu_seqlens(TOTAL, chunks, seed)
    anchors = find_anchors(random_batch(cu).segment_ids[0], 1)
    positions, valid = draw_anchors(anchors, at_most, seed, torch.tensor(5))
    assert positions.tolist() == sorted(set(positions.tolist())) and len(positions) == at_most
    assert torch.equal(valid, anchors[positions])
    counted = count_anchors(random_batch(cu), 1, at_most)
    assert valid.sum() == counted == min(at_most, int(anchors.sum()))
    again, _ = draw_anchors(anchors, at_most, seed, torch.tensor(5))
    assert torch.equal(again, positions)


def test_every_anchor_is_drawn_in_time():
    anchors = find_anchors(random_batch(random_cu_seqlens(TOTAL, 5, seed=0)).segment_ids[0], 1)
    counts = sum(torch.bincount(positions[valid], minlength=TOTAL) for positions, valid in _draw(anchors, 400))
    assert not counts[~anchors].any()
    expected = 400 * 8 / int(anchors.sum())
    assert (counts[anchors] > 0.6 * expected).all() and (counts[anchors] < 1.4 * expected).all()


def _draw(anchors: torch.Tensor, times: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [draw_anchors(anchors, 8, 0, torch.tensor(number)) for number in range(times)]


@given(seed=st.integers(0, 1000), chunks=st.integers(1, 12), horizon=st.integers(0, 9))
def test_neighbors(seed, chunks, horizon):
    segment_ids = random_batch(random_cu_seqlens(TOTAL, chunks, seed)).segment_ids[0]
    first, last = find_neighbors(segment_ids, horizon)
    for t in range(TOTAL):
        near = [u for u in range(TOTAL) if segment_ids[u] == segment_ids[t] and abs(u - t) <= horizon]
        assert (int(first[t]), int(last[t])) == (min(near), max(near))


@cache
def build_once(horizon: int, at_most: int) -> TrainingModel:
    return build_unsharded(future_config(exclude_neighbors=horizon, max_anchors=at_most)).double()


@given(seed=st.integers(0, 1000), chunks=st.integers(1, 8), horizon=st.integers(0, 5), at_most=st.sampled_from([0, 3, 11]))
def test_the_contrast_is_its_definition(seed, chunks, horizon, at_most):
    """Against a loop over anchors and candidates, in float64, from the model's own hidden states and summaries."""
    model = build_once(horizon, at_most)
    batch = random_batch(random_cu_seqlens(TOTAL, chunks, seed), seed=seed)
    found = model(compute_losses, batch, Requested(aux=True)).aux

    with torch.no_grad():
        predictions, summaries = model.objective.predictor(model.encode_past(batch)), model.encode_future(batch, 0)
    anchors = find_anchors(batch.segment_ids[0], 1)
    rows = anchors.nonzero().flatten().tolist()
    if at_most:
        positions, valid = draw_anchors(anchors, at_most, model.objective.setup.seed, torch.tensor(batch.sequence_index))
        rows = positions[valid].tolist()
    segment = batch.segment_ids[0].tolist()
    total, mi = 0.0, 0.0
    for t in rows:
        kept = [u for u in rows if u == t or segment[u] != segment[t] or abs(u - t) > horizon]
        logits = [torch.cosine_similarity(predictions[t], summaries[u + 1], dim=0).item() / 0.1 for u in kept]
        loss = math.log(sum(math.exp(z) for z in logits)) - logits[kept.index(t)]
        total, mi = total + loss, mi + math.log(len(kept)) - loss
    assert found.num_items == len(rows)
    assert found.loss_sum.item() == pytest.approx(total, abs=1e-7)
    assert found.measures["mi_lower_bound"][0].item() == pytest.approx(mi, abs=1e-7)


def test_projected_summaries():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(30, 64, generator=generator)
    torch.manual_seed(1)
    estimator = InfoNCEEstimator(64, 0.1, projection_dim=48)
    predictions = torch.randn(30, 48, generator=generator)
    valid = torch.ones(30, dtype=torch.bool)
    projected = InfoNCEEstimator(48, 0.1)(predictions, y @ estimator.projection, valid)
    torch.testing.assert_close(estimator(predictions, y, valid), projected)
    # cosines survive to about 1 / sqrt(48)
    exact, kept = (torch.nn.functional.normalize(v, dim=-1) for v in (y, y @ estimator.projection))
    assert (exact @ exact.T - kept @ kept.T).std() < 0.2


def test_a_projected_run_trains_and_its_projection_is_saved():
    model = build_unsharded(future_config(projection_dim=8))
    batch = random_batch(random_cu_seqlens(TOTAL, 4, seed=0))
    losses = model(compute_losses, batch, Requested(aux=True))
    losses.aux.loss_sum.backward()
    assert model.objective.predictor.out.weight.shape == (8, 32) and model.objective.predictor.out.weight.grad.any()
    assert "objective.estimator.projection" in model.state_dict()


def test_more_anchors_than_tokens_are_all_of_them():
    batch = random_batch(random_cu_seqlens(TOTAL, 4, seed=0))
    every, many = (model(compute_losses, batch, Requested(aux=True)).aux for model in (build_once(0, 0), build_once(0, TOTAL)))
    assert every.loss_sum == many.loss_sum and every.num_items == many.num_items
    assert many.num_items == count_anchors(batch, 1, 0)


def make_batch(index: int) -> PackedBatch:
    batch = random_batch(random_cu_seqlens(TOTAL, 4, seed=index), seed=index)
    return replace(batch, sequence_index=index)


def test_shifts_are_drawn_evenly_by_run_and_sequence():
    batches = [make_batch(index) for index in range(300)]
    options = FutureOptions(target_shift=0, target_shift_max=3)
    shifts = [choose_shift(batch, options, 7) for batch in batches]
    assert all(80 < shifts.count(each) < 120 for each in (1, 2, 3)) and set(shifts) == {1, 2, 3}
    assert (
        shifts == [choose_shift(batch, options, 7) for batch in batches] != [choose_shift(batch, options, 8) for batch in batches]
    )


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_a_drawn_shift_is_the_same_as_a_given_one(one_process, negatives):
    """For the loss, its gradient and its count; each sequence of a step with its own."""
    model = build_unsharded(future_config(target_shift_max=3, negatives=negatives, max_anchors=16))
    drawn, found = get_own(model), []
    batches = [make_batch(index) for index in range(6)]
    assert {choose_shift(batch, drawn.options, drawn.setup.seed) for batch in batches} == {1, 2, 3}
    for batch in batches:
        shift = choose_shift(batch, drawn.options, drawn.setup.seed)
        given = build_unsharded(future_config(target_shift=shift, negatives=negatives, max_anchors=16))
        results = []
        for each in (model, given):
            (prepared,) = get_own(each).prepare_step(each, [batch])
            aux = each(compute_losses, batch, Requested(aux=True), prepared).aux
            aux.loss_sum.backward()
            results.append((aux.loss_sum.detach(), each.lm.get_input_embeddings().weight.grad.clone()))
            each.zero_grad()
            assert get_own(each).count(batch) == aux.num_items
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        found.append(results[0][0])
    assert len(set(found)) == len(found)


def test_options_that_cannot_be(tmp_path):
    base = ["--model.config", "configs/models/llama_quickstart.json", "--model.tokenizer_path", "bytes"]
    base += ["--objective.name", "future"]
    for options, parts in (
        (["--future_encoder.max_anchors", "1"], ("future_encoder.max_anchors = 1 leaves no negatives",)),
        (
            ["--future_encoder.precision", "fp8", "--training.mixed_precision_param", "float32"],
            ('future_encoder.precision = "fp8"', 'training.mixed_precision_param = "float32"'),
        ),
    ):
        with pytest.raises(UserError) as caught:
            read_options([*base, *options], 1)
        expect_one_line(caught.value, *parts)
    with pytest.raises(UserError) as caught:
        build_modules(future_config(precision="fp8"), tiny_llama(), "cpu")
    expect_one_line(caught.value, 'future_encoder.precision = "fp8"', "8.9", '"bf16"')
