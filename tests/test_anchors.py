"""Which anchors are compared with which summaries: subsampling, excluded neighbours, the projection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame.components.seeds import derive_seed
from flame.config_reader import read_config
from flame.errors import UserError
from flame.models.future_lm import build_future_lm
from flame.models.future_mask import count_anchors, draw_anchors, find_anchors, find_neighbors
from flame.models.mi_estimator import InfoNCEEstimator
from flame.objective import Parts, compute_losses
from tests.helpers import build_unsharded, future_config, random_batch, random_cu_seqlens, tiny_llama
from tests.test_bad_input import expect_one_line

TOTAL = 40


@given(seed=st.integers(0, 1000), at_most=st.integers(1, TOTAL), pieces=st.integers(1, 12))
def test_drawn_anchors(seed, at_most, pieces):
    cu = random_cu_seqlens(TOTAL, pieces, seed)
    anchors = find_anchors(random_batch(cu).segment_ids[0], 1)
    positions, valid = draw_anchors(anchors, at_most, seed)
    assert positions.tolist() == sorted(set(positions.tolist())) and len(positions) == at_most
    assert torch.equal(valid, anchors[positions])
    assert valid.sum() == count_anchors(cu, 1, at_most) == min(at_most, int(anchors.sum()))
    again, _ = draw_anchors(anchors, at_most, seed)
    assert torch.equal(again, positions)


def test_every_anchor_is_drawn_in_time():
    anchors = find_anchors(random_batch(random_cu_seqlens(TOTAL, 5, seed=0)).segment_ids[0], 1)
    counts = sum(torch.bincount(positions[valid], minlength=TOTAL) for positions, valid in _draw(anchors, 400))
    assert not counts[~anchors].any()
    expected = 400 * 8 / int(anchors.sum())
    assert (counts[anchors] > 0.6 * expected).all() and (counts[anchors] < 1.4 * expected).all()


def _draw(anchors: torch.Tensor, times: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [draw_anchors(anchors, 8, seed) for seed in range(times)]


@given(seed=st.integers(0, 1000), pieces=st.integers(1, 12), reach=st.integers(0, 9))
def test_neighbors(seed, pieces, reach):
    segment_ids = random_batch(random_cu_seqlens(TOTAL, pieces, seed)).segment_ids[0]
    first, last = find_neighbors(segment_ids, reach)
    for t in range(TOTAL):
        near = [u for u in range(TOTAL) if segment_ids[u] == segment_ids[t] and abs(u - t) <= reach]
        assert (int(first[t]), int(last[t])) == (min(near), max(near))


@given(seed=st.integers(0, 1000), pieces=st.integers(1, 8), reach=st.integers(0, 5), at_most=st.sampled_from([0, 3, 11]))
def test_the_contrast_is_its_definition(seed, pieces, reach, at_most):
    """Against a loop over anchors and candidates, in float64, from the model's own hidden states and summaries."""
    config = future_config(exclude_neighbors=reach, max_anchors=at_most)
    model = _cached_model().double()
    batch = random_batch(random_cu_seqlens(TOTAL, pieces, seed), seed=seed)
    found = model(compute_losses, batch, config, Parts(aux=True)).aux

    with torch.no_grad():
        guesses, summaries = model.predictor(model.encode_past(batch)), model.encode_future(batch, 0)
    anchors = find_anchors(batch.segment_ids[0], 1)
    rows = anchors.nonzero().flatten().tolist()
    if at_most:
        positions, valid = draw_anchors(anchors, at_most, derive_seed(config.training.seed, batch.sequence_index))
        rows = positions[valid].tolist()
    segment = batch.segment_ids[0].tolist()
    total, mi = 0.0, 0.0
    for t in rows:
        kept = [u for u in rows if u == t or segment[u] != segment[t] or abs(u - t) > reach]
        logits = [torch.cosine_similarity(guesses[t], summaries[u + 1], dim=0).item() / 0.1 for u in kept]
        loss = math.log(sum(math.exp(z) for z in logits)) - logits[kept.index(t)]
        total, mi = total + loss, mi + math.log(len(kept)) - loss
    assert found.num_anchors == len(rows)
    assert found.loss_sum.item() == pytest.approx(total, abs=1e-7)
    assert found.measures["mi_lower_bound"][0].item() == pytest.approx(mi, abs=1e-7)


_models: list = []


def _cached_model():
    if not _models:
        _models.append(build_unsharded(future_config()))
    return _models[0]


def test_projected_summaries():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(30, 64, generator=generator)
    torch.manual_seed(1)
    estimator = InfoNCEEstimator(64, 0.1, projection_dim=48)
    guesses = torch.randn(30, 48, generator=generator)
    valid = torch.ones(30, dtype=torch.bool)
    projected = InfoNCEEstimator(48, 0.1)(guesses, y @ estimator.projection, valid)
    torch.testing.assert_close(estimator(guesses, y, valid), projected)
    # cosines survive to about 1 / sqrt(48)
    exact, kept = (torch.nn.functional.normalize(v, dim=-1) for v in (y, y @ estimator.projection))
    assert (exact @ exact.T - kept @ kept.T).std() < 0.2


def test_a_projected_run_trains_and_its_projection_is_saved():
    model = build_unsharded(future_config(projection_dim=8))
    batch = random_batch(random_cu_seqlens(TOTAL, 4, seed=0))
    losses = model(compute_losses, batch, future_config(projection_dim=8), Parts(aux=True))
    losses.aux.loss_sum.backward()
    assert model.predictor.out.weight.shape == (8, 32) and model.predictor.out.weight.grad.any()
    assert "estimator.projection" in model.state_dict()


def test_options_that_cannot_be(tmp_path):
    base = ["--model.config", "configs/models/llama_quickstart.json", "--model.tokenizer_path", "bytes"]
    for options, parts in (
        (["--future_encoder.max_anchors", "1"], ("future_encoder.max_anchors = 1 leaves no negatives",)),
        (["--future_encoder.max_anchors", "8192"], ("future_encoder.max_anchors = 8192", "training.seq_len = 8192")),
        (
            ["--future_encoder.precision", "fp8", "--training.mixed_precision_param", "float32"],
            ('future_encoder.precision = "fp8"', 'training.mixed_precision_param = "float32"'),
        ),
    ):
        with pytest.raises(UserError) as caught:
            read_config([*base, *options], 1)
        expect_one_line(caught.value, *parts)
    with pytest.raises(UserError) as caught:
        build_future_lm(future_config(precision="fp8"), tiny_llama(), "cpu")
    expect_one_line(caught.value, 'future_encoder.precision = "fp8"', "8.9", '"bf16"')
