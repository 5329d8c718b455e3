"""Modules of an objective that come with the initial weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame.checkpoints.storage import TensorReader
from flame.errors import UserError
from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options
from flame.weights.tensors import read_model_tensors
from tests.support.runs import final_weights, options, read_metrics, run_here


def list_initial_weights(workspace: Path, run: Path, **changes: object) -> dict[str, Tensor]:
    """What a new run begins with, by name."""
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, run, **changes), 1))
    try:
        trainer._resume()
        state = trainer.model.state_dict()
        return {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in state.items()}
    finally:
        trainer.lock.close()
        end_processes()


@pytest.fixture(scope="module")
def trained(exported_run) -> dict[str, Tensor]:
    tensors = read_model_tensors(exported_run / "checkpoint" / "step-6")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("objective.")}


@pytest.mark.parametrize("source", ["hf", "checkpoint/step-6"])
def test_predictor_and_estimator_come_along(workspace, tmp_path, exported_run, trained, caplog, source):
    found = list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=exported_run / source)
    assert trained and all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    label = f'checkpoint.initial_load_path = "{exported_run / source}"'
    assert f"predictor from {label}: 6 tensors" in caplog.messages and f"estimator from {label}: 1 tensors" in caplog.messages
    assert "starts fresh" not in caplog.text


def test_they_start_fresh_if_they_are_not_wanted(workspace, tmp_path, exported_run, trained, caplog):
    fresh = list_initial_weights(workspace, tmp_path / "seed")
    changes = {"checkpoint__initial_load_path": exported_run / "hf", "checkpoint__load_objective": False}
    found = list_initial_weights(workspace, tmp_path / "run", **changes)
    assert all(torch.equal(found[name], fresh[name]) for name in trained)
    assert "predictor starts fresh" in caplog.text and "predictor from" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"future_predictor__head_type": "gated"}, "they lack predictor.body.gate.weight, predictor."),
        ({"future_encoder__projection_dim": 8}, "weight is [32, 32] instead of [8, 32]"),
        ({"future_encoder__learnable_temperature": None}, "this run's has no estimator.log_temperature"),
    ],
)
def test_what_does_not_fit_starts_fresh(workspace, tmp_path, exported_run, caplog, changes, told):
    """Predictor and estimator are taken together or not at all."""
    fresh = list_initial_weights(workspace, tmp_path / "seed", **changes)
    caplog.clear()
    found = list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=exported_run / "hf", **changes)
    assert told in caplog.text
    misfits = [name for name in ("predictor", "estimator") if f"{name} of checkpoint.initial_load_path" in caplog.text]
    assert misfits == ["predictor", "estimator"]
    assert all(torch.equal(found[name], fresh[name]) for name in found if name.startswith("objective."))


@pytest.fixture(scope="module")
def taught_by_a_random_network(workspace, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "random"
    changes = {"future_encoder__target": "random", "future_encoder__projection_dim": 8, "checkpoint__export_hf": True}
    run_here(workspace, run, training__steps=1, **changes)
    return run


@pytest.mark.parametrize("source", ["hf", "checkpoint/step-1"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training__seed": 7}, "of training.seed = 42, and this run has a random network of training.seed = 7"),
        ({"future_encoder__target": "self"}, "of training.seed = 42, and this run has no random network"),
    ],
)
def test_what_was_trained_for_another_random_network_starts_fresh(
    workspace, tmp_path, taught_by_a_random_network, caplog, source, changes, told
):
    changes = {"future_encoder__target": "random", "future_encoder__projection_dim": 8} | changes
    fresh = list_initial_weights(workspace, tmp_path / "seed", **changes)
    caplog.clear()
    found = list_initial_weights(
        workspace, tmp_path / "run", checkpoint__initial_load_path=taught_by_a_random_network / source, **changes
    )
    (line,) = [message for message in caplog.messages if "not taken" in message]
    assert line.startswith("estimator and predictor of checkpoint.initial_load_path") and line.endswith(told)
    assert all(torch.equal(found[name], fresh[name]) for name in found if name.startswith("objective."))


def test_the_fixed_projection_comes_along(workspace, tmp_path, caplog):
    """Of another seed. What else differs is said."""
    width = {"future_encoder__projection_dim": 8}
    run_here(workspace, tmp_path / "first", training__steps=1, checkpoint__export_hf=True, **width)
    trained = {name: tensor for name, tensor in final_weights(tmp_path / "first").items() if name.startswith("objective.")}
    changes = width | {"training__seed": 7, "future_predictor__input": "embedding", "future_encoder__target": "ema"}
    caplog.clear()
    found = list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=tmp_path / "first" / "hf", **changes)
    assert "objective.estimator.projection" in trained
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    said = [message for message in caplog.messages if message.startswith("other than they were trained with")]
    assert said == [
        'other than they were trained with: future_encoder.target = "ema" instead of "self"',
        'other than they were trained with: future_predictor.input = "embedding" instead of "hidden_states"',
    ]


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [({"learnable_temperature": True}, True), ({"learnable_temperature": False}, False), ({"estimator_type": "bilinear"}, True)],
    ids=str,
)
def test_a_temperature_that_comes_with_the_weights_is_told(workspace, tmp_path, caplog, changes, is_told):
    settings = {"future_encoder__learnable_temperature": None} | {
        f"future_encoder__{name}": value for name, value in changes.items()
    }
    run_here(workspace, tmp_path / "first", training__steps=1, checkpoint__export_hf=True, **settings)
    caplog.clear()
    settings |= {"future_encoder__temperature": 0.5, "checkpoint__initial_load_path": tmp_path / "first" / "hf"}
    list_initial_weights(workspace, tmp_path / "run", **settings)
    said = [message for message in caplog.messages if message.startswith("future_encoder.temperature = 0.5 has no effect")]
    assert len(said) == is_told


def test_older_exports_are_taken_as_they_are(workspace, tmp_path, exported_run, trained, caplog):
    shutil.copytree(exported_run / "hf", tmp_path / "hf")
    modules = tmp_path / "hf" / "future_modules.safetensors"
    save_file(load_file(modules), modules)  # without metadata
    found = list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=tmp_path / "hf")
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    assert 'hf" does not say what they were trained for: it is unknown' in caplog.text


def test_a_damaged_predictor_in_a_checkpoint_is_found(workspace, tmp_path, exported_run):
    """A changed bit in its weights, which torch.load does not see."""
    checkpoint = tmp_path / "checkpoint" / "step-6"
    shutil.copytree(exported_run / "checkpoint" / "step-6", checkpoint)
    stored = TensorReader(checkpoint).read_metadata().storage_data
    (place,) = [info for index, info in stored.items() if index.fqn == "model.objective.predictor.out.weight"]
    content = bytearray((checkpoint / place.relative_path).read_bytes())
    weights = read_model_tensors(checkpoint)["objective.predictor.out.weight"].numpy().tobytes()
    content[content.index(weights[:64], place.offset) + 2] ^= 1
    (checkpoint / place.relative_path).write_bytes(content)
    with pytest.raises(UserError, match=r"distcp has other bytes than were written \(digest\)"):
        list_initial_weights(workspace, tmp_path / "run", checkpoint__initial_load_path=checkpoint)


def test_another_objective_takes_nothing(workspace, tmp_path, exported_run, caplog):
    changes = {"objective__name": "mtp", "future_encoder__learnable_temperature": None}
    for source in ("hf", "checkpoint/step-6"):
        list_initial_weights(workspace, tmp_path / source, checkpoint__initial_load_path=exported_run / source, **changes)
    assert " from checkpoint.initial_load_path" in caplog.text and "does not fit" not in caplog.text
    assert "starts fresh" in caplog.text and "predictor" not in caplog.text


def test_a_predictor_on_the_frozen_model_first_then_both(workspace, tmp_path):
    """The recipe of docs/models.md: the second stage begins with the base model and the trained predictor."""
    frozen, both = tmp_path / "frozen", tmp_path / "both"
    run_here(workspace, frozen, experimental__freeze_lm_for_infonce=True, training__steps=4, checkpoint__export_hf=True)
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
