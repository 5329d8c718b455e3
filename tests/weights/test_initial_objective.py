"""Modules of an objective that come with the initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options
from flame.weights.tensors import read_model_tensors
from tests.support.runs import final_weights, options, read_metrics, run_here


def list_initial_weights(workspace: Path, run: Path, **changes: object) -> dict[str, Tensor]:
    """What a new run begins with, by name."""
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, run, **changes), 1))
    trainer._resume()
    state = trainer.model.state_dict()
    found = {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in state.items()}
    trainer.lock.close()
    end_processes()
    return found


@pytest.fixture(scope="module")
def trained(plain_run) -> dict[str, Tensor]:
    tensors = read_model_tensors(plain_run / "checkpoint" / "step-6")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("objective.")}


@pytest.mark.parametrize("source", ["hf", "checkpoint/step-6"])
def test_predictor_and_estimator_come_along(workspace, tmp_path, plain_run, trained, caplog, source):
    found = list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=plain_run / source)
    assert trained and all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    label = f'checkpoint.initial_load_path = "{plain_run / source}"'
    assert f"predictor from {label}: 6 tensors" in caplog.messages and f"estimator from {label}: 1 tensors" in caplog.messages
    assert "starts fresh" not in caplog.text


def test_they_start_fresh_if_they_are_not_wanted(workspace, tmp_path, plain_run, trained, caplog):
    fresh = list_initial_weights(workspace, tmp_path / "seed")
    changes = {"checkpoint__initial_load_path": plain_run / "hf", "checkpoint__load_objective": False}
    found = list_initial_weights(workspace, tmp_path / "run", **changes)
    assert all(torch.equal(found[name], fresh[name]) for name in trained)
    assert "predictor starts fresh" in caplog.text and "predictor from" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "told", "expected"),
    [
        ({"future_predictor__head_type": "gated"}, "they lack predictor.body.gate.weight, predictor.", ["predictor"]),
        ({"future_encoder__projection_dim": 8}, "weight is [32, 32] instead of [8, 32]", ["predictor", "estimator"]),
        ({"future_encoder__learnable_temperature": None}, "this run's has no estimator.log_temperature", ["estimator"]),
    ],
)
def test_what_does_not_fit_starts_fresh(workspace, tmp_path, plain_run, trained, caplog, changes, told, expected):
    fresh = list_initial_weights(workspace, tmp_path / "seed", **changes)
    caplog.clear()
    found = list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=plain_run / "hf", **changes)
    assert told in caplog.text
    misfits = [name for name in ("predictor", "estimator") if f"{name} of checkpoint.initial_load_path" in caplog.text]
    assert misfits == expected
    for name in found:
        if name.startswith("objective."):
            assert torch.equal(found[name], (fresh if name.split(".")[1] in misfits else trained)[name]), name


def test_another_objective_takes_nothing(workspace, tmp_path, plain_run, caplog):
    changes = {"objective__name": "mtp", "future_encoder__learnable_temperature": None}
    for source in ("hf", "checkpoint/step-6"):
        list_initial_weights(workspace, tmp_path / source, checkpoint__initial_load_path=plain_run / source, **changes)
    assert " from checkpoint.initial_load_path" in caplog.text and "does not fit" not in caplog.text
    assert "starts fresh" in caplog.text and "predictor" not in caplog.text


def test_a_predictor_on_the_frozen_model_first_then_both(workspace, tmp_path):
    """The recipe of docs/models.md: the second stage begins with the base model and the trained predictor."""
    frozen, both = tmp_path / "frozen", tmp_path / "both"
    run_here(workspace, frozen, experimental__freeze_lm_for_infonce=True, training__steps=4)
    modules = load_file(frozen / "hf" / "future_modules.safetensors")
    start = list_initial_weights(workspace, tmp_path / "start", checkpoint__initial_load_path=frozen / "hf")
    base = list_initial_weights(workspace, tmp_path / "base")
    assert all(torch.equal(start[name], base[name]) for name in base if name.startswith("lm."))
    assert all(torch.equal(start[f"objective.{name}"], tensor) for name, tensor in modules.items())
    assert any(not torch.equal(start[name], base[name]) for name in base if name.startswith("objective.predictor."))
    run_here(workspace, both, checkpoint__initial_load_path=frozen / "checkpoint" / "step-4", training__steps=3)
    first_stage, second_stage = read_metrics(frozen), read_metrics(both)
    assert "ce_loss" not in first_stage[0] and second_stage[-1]["ce_loss"] < second_stage[0]["ce_loss"]
    final = final_weights(both)
    assert any(not torch.equal(final[name], base[name]) for name in base if name.startswith("lm."))
