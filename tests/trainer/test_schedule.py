"""The schedule of learning rate and loss weight over starts of a run."""

from __future__ import annotations

import pytest
import torch

from tests.support.options import read_mistakes
from tests.support.runs import final_weights, measured, options, read_metrics, run_here

DECAYING = {"objective__warmup_steps": 2, "objective__decay_steps": 3}


def test_half_a_run_is_the_first_half_of_the_whole_one(workspace, tmp_path, caplog):
    run_here(workspace, tmp_path / "whole", **DECAYING)
    half = DECAYING | {"lr_scheduler__total_steps": 6}
    run_here(workspace, tmp_path / "half", **half, training__steps=3)
    caplog.clear()
    run_here(workspace, tmp_path / "half", **half)
    whole, found = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "half")
    assert measured(found) == measured(whole)
    assert [row["loss_weight"] for row in found] == [row["loss_weight"] for row in whole]
    expected, weights = final_weights(tmp_path / "whole"), final_weights(tmp_path / "half")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "the schedule jumps" not in caplog.text


def test_a_jump_is_said_with_both_values(workspace, tmp_path, caplog):
    """A finished run that goes on: the rate, which had decayed, and the loss weight rise again."""
    run = tmp_path / "run"
    run_here(workspace, run, **DECAYING, training__steps=5)
    rows = run_here(workspace, run, **DECAYING, training__steps=8)
    (told,) = [message for message in caplog.messages if message.startswith("the schedule jumps: ")]
    old, new = rows[4], rows[5]
    assert told == (
        f"the schedule jumps: learning rate {old['lr']:.3g} at step 5 -> {new['lr']:.3g} at step 6, loss weight "
        f"{old['loss_weight']:.3g} at step 5 -> {new['loss_weight']:.3g} at step 6 (scheduled over 8 steps instead of 5)"
    )
    assert new["lr"] > 1.5 * old["lr"] and new["loss_weight"] > 2 * old["loss_weight"]


def test_a_jump_of_the_predictors_own_rate_is_said(workspace, tmp_path, caplog):
    """The schedule before was of fewer steps than its warm-up: no warning is about it at the resume."""
    run, plain = tmp_path / "run", {"lr_scheduler__total_steps": 6}
    run_here(workspace, run, **plain, training__steps=1)
    rows = run_here(workspace, run, **plain, training__steps=3, future_predictor__warmup_steps=4)
    (told,) = [message for message in caplog.messages if message.startswith("the schedule jumps: ")]
    old, new = rows[0]["lr/predictor"], rows[1]["lr/predictor"]
    assert told == (f"the schedule jumps: learning rate of future_predictor {old:.3g} at step 1 -> {new:.3g} at step 2")


def test_the_schedule_before_gives_no_warning(workspace, tmp_path, caplog):
    """It was of fewer steps than its warm-up."""
    run_here(workspace, tmp_path / "run", training__steps=1)
    assert "exceed total steps" in caplog.text
    caplog.clear()
    run_here(workspace, tmp_path / "run", training__steps=3)
    assert "exceed total steps" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_scheduler__total_steps": 5}, ["lr_scheduler.total_steps = 5 is less than training.steps = 6: "]),
        ({"lr_scheduler__total_steps": 9, "objective__start_step": 8}, []),
    ],
)
def test_the_horizon_is_not_before_the_end(workspace, tmp_path, changes, expected):
    argv = options(workspace, tmp_path / "run", **changes)
    lines = read_mistakes([*argv, "--training.seed=-1"])[1:]  # one mistake that is always there
    assert len(lines) == len(expected) and all(part in line for part, line in zip(expected, lines, strict=True))
