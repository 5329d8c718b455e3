"""Names that users know from the method's first publication, at their edges."""

from __future__ import annotations

import pytest
import torch

from flame.kernels.cross_entropy import linear_cross_entropy
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import InfoNCEEstimator, build_mi_estimator
from flame.train import _future_valid_from_cu, _segment_ids_from_cu_seqlens, build_future_mask_from_cu

CU = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
ESTIMATORS = ["infonce", "bilinear", "cosine", "smooth_l1"]


@pytest.mark.parametrize("window", [None, 0, -1])
def test_no_window_is_written_in_three_ways(window):
    mask, valid = build_future_mask_from_cu(CU, window, torch.float32, "cpu")
    segments, total = _segment_ids_from_cu_seqlens(CU)
    ahead = torch.arange(total)[None, :] - torch.arange(total)[:, None]
    expected = (segments[:, None] == segments[None, :]) & (ahead > 0)
    assert mask is not None and torch.equal(mask[0, 0] == 0, expected)
    assert torch.equal(valid, expected.any(-1)[None])
    assert torch.equal(_future_valid_from_cu(CU, window, "cpu"), valid)


def test_a_window_below_minus_one_is_no_window_at_all():
    for call in (
        lambda: build_future_mask_from_cu(CU, -2, torch.float32, "cpu"),
        lambda: _future_valid_from_cu(CU, -2, "cpu"),
    ):
        with pytest.raises(ValueError, match="window_k = -2"):
            call()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_zero_rows_give_a_loss_of_zero(name, reduction):
    estimator = build_mi_estimator(name, 8)
    x = torch.empty(0, 8, requires_grad=True)
    loss = estimator(x, torch.empty(0, 8), torch.empty(0, dtype=torch.bool), reduction=reduction)
    loss.backward()
    assert loss.shape == () and loss.item() == 0.0
    assert x.grad is not None and x.grad.shape == (0, 8)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in estimator.parameters())


def test_zero_rows_of_a_learned_temperature_and_with_keys():
    estimator = InfoNCEEstimator(8, learnable_temperature=True)
    x = torch.empty(0, 8, requires_grad=True)
    nobody = torch.empty(0, dtype=torch.long)
    outcome = estimator.compare(x, torch.empty(0, 8), excluded=(nobody, nobody), keys=nobody)
    outcome.loss_sum.backward()
    assert outcome.loss_sum.item() == 0.0 and outcome.num_items.item() == 0.0 and outcome.failed.item() == 0.0
    assert estimator.log_temperature is not None and estimator.log_temperature.grad.item() == 0.0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_rows_are_valid_unless_said_otherwise(name):
    torch.manual_seed(0)
    estimator = build_mi_estimator(name, 8)
    x, y = FuturePredictorHead(8)(torch.randn(2, 5, 8)), torch.randn(2, 5, 8)
    assert torch.equal(estimator(x, y), estimator(x, y, torch.ones(2, 5, dtype=torch.bool)))
    assert estimator.compare(x, y).num_items == 10


def test_cross_entropy_of_zero_rows_is_zero():
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.shape == () and loss.item() == 0.0 and not weight.grad.any()
