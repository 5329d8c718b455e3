"""The estimators beside InfoNCE, value and gradient, against plain loops in float64; and every one's failures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flame.data.buckets import round_up_to_bucket
from flame.models.estimator import _normalize
from flame.models.estimators import HIGHEST_LEARNED_TEMPERATURE, LOWEST_LEARNED_TEMPERATURE
from flame.models.mi_estimator import BilinearEstimator, InfoNCEEstimator, build_mi_estimator, read_temperature
from tests.support.losses import chunks_of
from tests.support.runs import run_here

NAMES = ["infonce", "bilinear", "cosine", "smooth_l1"]
ALL = torch.ones(6, dtype=torch.bool)


def learnable(name: str):
    return build_mi_estimator(name, 4, learnable_temperature=name == "infonce")


def cosine_loss(x, y):
    return 1 - x @ y / (x.norm() * y.norm())


def huber_of_layer_norms(x, y):
    a, b = ((v - v.mean()) / (v - v.mean()).square().mean().sqrt() for v in (x, y))
    return sum(r**2 / 2 if r.abs() <= 1 else r.abs() - 0.5 for r in a - b) / len(x)


@pytest.mark.parametrize("rows_per_chunk", [3, 4096])
@pytest.mark.parametrize(("name", "loss"), [("cosine", cosine_loss), ("smooth_l1", huber_of_layer_norms)])
@given(n=st.integers(1, 9), seed=st.integers(0, 1000))
def test_regressions_are_their_definition(rows_per_chunk, name, loss, n, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.rand(n, generator=generator) < 0.7
    found_x, exact_x = (x.clone().requires_grad_() for _ in range(2))
    with chunks_of(rows_per_chunk):
        found = build_mi_estimator(name, 5).compare(found_x, y, valid)
    (0.5 * found.loss_sum).backward()
    rows = valid.nonzero().flatten().tolist()
    exact = sum((loss(exact_x[i], y[i]) for i in rows), exact_x.sum() * 0.0)
    (0.5 * exact).backward()
    torch.testing.assert_close(found.loss_sum, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_x.grad, exact_x.grad, rtol=1e-9, atol=1e-9)

    shift = (lambda v: v - v.mean()) if name == "smooth_l1" else (lambda v: v)
    cosine = {(i, j): torch.cosine_similarity(shift(x[i]), shift(y[j]), dim=0).item() for i in rows for j in rows}
    others = max(len(rows) - 1, 1)
    expected = {
        "positive_cosine": sum(cosine[i, i] for i in rows),
        "negative_cosine": sum(cosine[i, j] / others for i in rows for j in rows if i != j),
    }
    assert {key: total.item() for key, (total, _) in found.measures.items()} == pytest.approx(expected, abs=1e-9)
    assert found.num_items == len(rows) and all(count == len(rows) for _, count in found.measures.values())


def test_smooth_l1_is_the_cosine_loss_of_centered_vectors_when_close():
    x = torch.randn(6, 64, dtype=torch.float64)
    y = x + 0.1 * torch.randn(6, 64, dtype=torch.float64)
    smooth, cosine = build_mi_estimator("smooth_l1", 64), build_mi_estimator("cosine", 64)
    centered = [v - v.mean(dim=-1, keepdim=True) for v in (x, y)]
    torch.testing.assert_close(smooth(x, y, ALL), cosine(*centered, ALL))


def test_a_new_bilinear_score_is_the_cosine_over_the_temperature():
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    for temperature in (0.1, 0.5):
        pair = BilinearEstimator(4, temperature), InfoNCEEstimator(4, temperature)
        ours, theirs = (estimator(x, y, ALL) for estimator in pair)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_a_bilinear_critic_learns_a_rotation():
    """Predictions that are a rotation of the summaries say nothing in cosines, and all to a learned W."""
    torch.manual_seed(0)
    y = torch.randn(64, 8)
    x = y @ torch.linalg.qr(torch.randn(8, 8)).Q
    estimator = BilinearEstimator(8, 0.5)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=0.1)
    valid = torch.ones(64, dtype=torch.bool)
    before = estimator(x, y, valid).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = estimator(x, y, valid)
        loss.backward()
        optimizer.step()
    assert before > math.log(64) - 0.5 and loss.item() < 0.5


@pytest.mark.slow
def test_each_bucket_of_anchors_has_its_compiled_functions(workspace, tmp_path):
    """Also where `training.compile` is off: a resumed run compiles anew what this one would have left uncompiled by then."""
    normalize = torch.compile(_normalize, dynamic=False, backend="eager")
    buckets = {
        round_up_to_bucket(count, 1 << 20)
        for octave in range(6, 20)
        for count in range(1 << octave, 2 << octave, 1 << octave - 3)
    }
    assert len(buckets) > 50
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        run_here(workspace, tmp_path / "run", training__steps=1, checkpoint__enable_checkpoint=False)
        for bucket in buckets:
            for is_learned in (False, True):
                vectors = torch.ones(bucket, 1, requires_grad=is_learned)
                with torch.set_grad_enabled(is_learned):
                    assert normalize(vectors).requires_grad == is_learned
    torch._dynamo.reset()


def test_an_estimator_has_only_what_it_learns():
    names = {name: {key for key, _ in learnable(name).named_parameters()} for name in NAMES}
    assert names == {"infonce": {"log_temperature"}, "bilinear": {"weight"}, "cosine": set(), "smooth_l1": set()}
    assert read_temperature(learnable("infonce"), torch.float32).item() == pytest.approx(0.1)
    used = learnable("infonce").to(torch.bfloat16).temperature(torch.empty(1))  # as under FSDP with mixed precision
    assert read_temperature(learnable("infonce"), torch.bfloat16).item() == used.item() != pytest.approx(0.1, rel=1e-3)
    for name in NAMES[1:]:
        assert build_mi_estimator(name, 4).log_temperature is None
        with pytest.raises(ValueError, match=name):
            build_mi_estimator(name, 4, learnable_temperature=True)


@pytest.mark.parametrize("name", NAMES)
def test_without_anchors_all_is_zero_and_the_backward_runs(name):
    x, y, estimator = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), learnable(name)
    outcome = estimator.compare(x, y, ~ALL)
    outcome.loss_sum.backward()
    assert outcome.loss_sum == outcome.num_items == outcome.failed == 0
    assert all(total == count == 0 for total, count in outcome.measures.values())
    assert not x.grad.any() and all(not p.grad.any() for p in estimator.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 16, generator=generator).bfloat16() for _ in range(2))
    valid = torch.rand(40, generator=generator) < 0.8
    estimator = build_mi_estimator(name, 16)
    found_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
    found, exact = estimator.compare(found_x, y, valid), estimator.double().compare(exact_x, y.double(), valid)
    assert found.loss_sum.dtype == torch.float32 and found_x.dtype == torch.bfloat16
    torch.testing.assert_close(found.loss_sum.double(), exact.loss_sum, rtol=1e-2, atol=0)
    found.loss_sum.backward()
    exact.loss_sum.backward()
    assert (found_x.grad - exact_x.grad).norm() / exact_x.grad.norm() < 3e-2


def draw_cone(count: int, width: int, cosine: float) -> tuple[Tensor, Tensor]:
    """Unit vectors [count, width] of this mean cosine, and predictions close to them, in float64."""
    generator = torch.Generator().manual_seed(0)
    axis, around, noise = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (1, count, count))
    axis = F.normalize(axis, dim=-1)
    around = F.normalize(around - (around @ axis.t()) * axis, dim=-1)
    targets = F.normalize(axis + math.sqrt((1 - cosine) / cosine) * around, dim=-1)
    return targets + 0.02 * F.normalize(noise, dim=-1), targets


@pytest.mark.parametrize("name", ["infonce", "bilinear"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("valid_share", [1.0, 0.7])
def test_a_narrow_cone_in_half_precision(name, temperature, valid_share):
    """With a mean cosine of 0.9975, cosines are closer to each other than numbers near 1 in bfloat16."""
    x, y = draw_cone(512, 256, 0.9975)
    valid = torch.rand(512, generator=torch.Generator().manual_seed(1)) < valid_share
    exact = build_mi_estimator(name, 256, temperature).double().compare(x, y, valid)
    found = build_mi_estimator(name, 256, temperature).bfloat16().compare(x.bfloat16(), y.bfloat16(), valid)
    for measure, tolerance in {"infonce_accuracy": 0.01, "mi_lower_bound": 0.01, "positive_cosine": 1e-3}.items():
        if measure in exact.measures:
            (total, count), (wanted, _) = found.measures[measure], exact.measures[measure]
            assert abs(float(total / count) - float(wanted / count)) < tolerance, measure
    assert exact.measures["infonce_accuracy"][0] == valid.sum()


def test_collapsed_summaries_stay_ties_in_half_precision():
    x, y = draw_cone(64, 32, 0.5)
    found = build_mi_estimator("infonce", 32).bfloat16().compare(x.bfloat16(), y[:1].expand(64, -1).bfloat16())
    assert found.measures["infonce_accuracy"][0] == 0 and abs(found.measures["mi_lower_bound"][0]) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_projected_summaries(name):
    y, x, valid = torch.randn(30, 16), torch.randn(30, 8), torch.rand(30) < 0.7
    estimator = build_mi_estimator(name, 16, projection_dim=8)
    torch.testing.assert_close(estimator(x, y, valid), build_mi_estimator(name, 8)(x, y @ estimator.projection, valid))


PLACES = [(name, where) for name in NAMES for where in ("x", "y")] + [("infonce", "log_temperature"), ("bilinear", "weight")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "where"), PLACES)
def test_a_contrast_that_is_not_finite_is_exactly_zero(bad, name, where):
    x, y, estimator = torch.randn(6, 4).requires_grad_(), torch.randn(6, 4), learnable(name)
    learned = dict(estimator.named_parameters())
    with torch.no_grad():
        ({"x": x, "y": y} | learned)[where].view(-1)[0] = bad
    outcome = estimator.compare(x, y, ALL)
    outcome.loss_sum.backward()
    assert outcome.failed == 1
    assert outcome.loss_sum == outcome.num_items == 0
    assert all(total == count == 0 for total, count in outcome.measures.values())
    # What was not finite itself still turns the zeros that reach it into NaN; the step guard deals with that.
    for key, tensor in ({"x": x} | learned).items():
        assert key == where or not tensor.grad.any()


def test_a_run_keeps_its_temperature_in_bounds(workspace, tmp_path):
    """With steps so long that each ends at one."""
    changes = {"training__steps": 2, "future_predictor__lr_scale": 1000, "checkpoint__enable_checkpoint": False}
    for row in run_here(workspace, tmp_path / "run", **changes):
        assert row["temperature"] in (pytest.approx(LOWEST_LEARNED_TEMPERATURE), pytest.approx(HIGHEST_LEARNED_TEMPERATURE))
