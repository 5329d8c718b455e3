"""A run that begins where another one is, and what a run needs of what it began from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flame.checkpoints.manager import TRAINER_FILE, list_checkpoints
from flame.errors import UserError
from tests.support.runs import cut_power_after, final_weights, measured, options, read_metrics, run_here

LOGGER = """
import uuid
from flame.logging.writers.base import MetricWriter

class Known(MetricWriter):
    name = "known"

    def __init__(self, run):
        self.known_id = run.service_id or uuid.uuid4().hex

    @property
    def service_id(self):
        return self.known_id

    def log(self, step, values):
        pass
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, object]:
    path = tmp_path_factory.mktemp("logger") / "known_logger.py"
    path.write_text(LOGGER)
    return {"metrics__logger_path": path}


@pytest.fixture(scope="module")
def finished_parent(workspace, tmp_path_factory, logged) -> Path:
    run = tmp_path_factory.mktemp("parent") / "run"
    run_here(workspace, run, **logged)
    return run


@pytest.fixture
def parent(finished_parent, tmp_path) -> Path:
    return shutil.copytree(finished_parent, tmp_path / "parent")


def read_service_id(run: Path) -> str:
    return json.loads((list_checkpoints(run / "checkpoint")[-1] / TRAINER_FILE).read_text())["service_ids"]["known"]


def assert_goes_on_from_step_3(run: Path, parent: Path) -> None:
    assert measured(read_metrics(run)) == measured(read_metrics(parent))[3:]
    found, expected = final_weights(run), final_weights(parent)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_branch_goes_on_in_a_folder_of_its_own(workspace, tmp_path, parent, finished_parent, logged, caplog):
    """With everything of the parent's at that step but its identity, and later without the parent; its model and tokenizer are
    the parent's where no others are named."""
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    changes = logged | {"checkpoint__branch_from": parent / "checkpoint" / "step-3", "model__config": None}
    changes |= {"model__tokenizer_path": None, "checkpoint__interval": 1}
    run = tmp_path / "branch"
    cut_power_after(5, options(workspace, run, **changes))
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    assert [path.name for path in list_checkpoints(run / "checkpoint")] == ["step-4"]
    shutil.rmtree(parent)
    run_here(workspace, run, **changes)
    assert_goes_on_from_step_3(run, finished_parent)
    assert [json.loads(line)["start_step"] for line in (run / "starts.jsonl").read_text().splitlines()] == [3, 4]
    assert read_service_id(run) != read_service_id(finished_parent)


def test_a_branch_that_saves_nothing(workspace, tmp_path, parent, finished_parent):
    changes = {"checkpoint__branch_from": parent / "checkpoint" / "step-3", "checkpoint__enable_checkpoint": False}
    rows = run_here(workspace, tmp_path / "branch", **changes)
    assert measured(rows) == measured(read_metrics(finished_parent))[3:] and not (tmp_path / "branch" / "checkpoint").exists()


def test_a_branch_at_another_rate_says_what_has_changed(workspace, tmp_path, parent, logged, caplog):
    changes = {"checkpoint__branch_from": parent / "checkpoint" / "step-3", "optimizer__lr": 1e-3, "training__steps": 4}
    changes |= {"checkpoint__initial_load_path": "not/needed/here"}
    rows = run_here(workspace, tmp_path / "branch", **logged | changes)
    assert [row["step"] for row in rows] == [4]
    assert f'a branch of checkpoint.branch_from = "{parent}/checkpoint/step-3", from step 3 on' in caplog.messages
    assert "changed since the checkpoint: optimizer.lr: 0.01 -> 0.001" in caplog.messages
    assert "without effect in this run: checkpoint.initial_load_path" in caplog.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training__seed": 7}, 'training.seed = 7, but checkpoint.branch_from = "{parent}/checkpoint/step-3" was made with 42'),
        ({"training__steps": 3}, 'training.steps = 3, but checkpoint.branch_from = "{parent}/checkpoint/step-3" is at step 3'),
        ({"checkpoint__branch_from": "{parent}"}, 'is a folder of checkpoints: name one of them, such as "{parent}/checkpoint/'),
        ({"checkpoint__branch_from": "{parent}/none"}, 'checkpoint.branch_from = "{parent}/none": no such folder'),
        ({"checkpoint__branch_from": "{model}"}, "is no step-N checkpoint folder: name one, or take the weights alone"),
        ({"job__dump_folder": "{parent}"}, "is in this run's own folder: to go back to it, set checkpoint.load_step"),
    ],
)
def test_what_cannot_be_branched_from_is_one_line(workspace, tmp_path, parent, capsys, changes, expected):
    places = {"parent": parent, "model": workspace / "model"}
    changes = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "branch", **{"checkpoint__branch_from": parent / "checkpoint" / "step-3"} | changes)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == UserError.EXIT_CODE and "\n" not in line and expected.format(**places) in line
    assert not (tmp_path / "branch" / "metrics.jsonl").exists()


def test_a_copied_checkpoint_does_not_log_into_its_runs_curves(workspace, tmp_path, parent, finished_parent, logged):
    copy = tmp_path / "copy"
    shutil.copytree(parent / "checkpoint" / "step-3", copy / "checkpoint" / "step-3")
    run_here(workspace, copy, **logged)
    assert_goes_on_from_step_3(copy, finished_parent)
    assert read_service_id(copy) != read_service_id(parent)

    moved = parent.rename(tmp_path / "moved")
    run_here(workspace, moved, **logged, training__steps=7)
    assert read_service_id(moved) == read_service_id(finished_parent)


def test_initial_weights_that_are_gone_are_not_needed_to_resume(workspace, tmp_path, parent, logged):
    base = shutil.copytree(parent / "checkpoint" / "step-6", tmp_path / "base")
    run, started = tmp_path / "run", logged | {"model__config": None, "model__tokenizer_path": None}
    started |= {"checkpoint__initial_load_path": base}
    run_here(workspace, tmp_path / "whole", **started)
    cut_power_after(4, options(workspace, run, **started))
    shutil.rmtree(base)
    run_here(workspace, run, **started)
    assert measured(read_metrics(run)) == measured(read_metrics(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        run_here(workspace, tmp_path / "new", **started)
    if dist.is_initialized():
        dist.destroy_process_group()
