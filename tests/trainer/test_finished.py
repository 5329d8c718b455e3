"""Starting a run again: one that is done, one that is to go on longer, and one of another release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import flame.train
from flame.checkpoints.manager import list_checkpoints
from tests.support.checkpoints import edit_state
from tests.support.runs import final_weights, measured, read_metrics, run_here

LOGGER = """
from flame.logging.writers.base import MetricWriter

class Unwanted(MetricWriter):
    def __init__(self, run):
        raise AssertionError("a logger has been opened")
"""


EXPORTS = {"checkpoint__export_hf": True}


@pytest.fixture
def done_run(exported_run, tmp_path) -> Path:
    """A copy of a finished run, to be started with `EXPORTS`."""
    return shutil.copytree(exported_run, tmp_path / "run")


def read_files(run: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of each file but the lock, which says who has it."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_says_so_and_touches_nothing(workspace, tmp_path, done_run, monkeypatch, caplog, capsys):
    """No logger, no worker of the loader, no line anywhere; also with options that have changed and are let pass."""
    (tmp_path / "own_logger_unwanted.py").write_text(LOGGER)

    def refuse(*_args, **_options):
        raise AssertionError("a finished run has been opened")

    for name in ("RunMeters", "PackedLoader", "Prefetcher", "open_validator", "record_run", "rewind_records"):
        monkeypatch.setattr(flame.train, name, refuse)
    before = read_files(done_run)
    changes = {
        "metrics__logger_path": tmp_path / "own_logger_unwanted.py",
        "training__num_workers": 2,
        "job__description": "again",
    }
    run_here(workspace, done_run, **EXPORTS | changes)
    assert read_files(done_run) == before
    assert "nothing is left to do: this run is done" in caplog.messages and "done: step 6 of 6" in caplog.messages
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err and not dist.is_initialized()


def test_a_validation_that_is_asked_for_later_is_made_up_for(workspace, done_run):
    validated = {"validation__interval": 2, "validation__dataset": "json", "validation__data_files": workspace / "corpus.jsonl"}
    rows = run_here(workspace, done_run, **EXPORTS, **validated)
    assert rows[-1]["step"] == 6 and rows[-1]["validation_loss"] > 0
    before = read_files(done_run)
    run_here(workspace, done_run, **EXPORTS, **validated)
    assert read_files(done_run) == before


def test_an_older_outcome_does_not_speak_for_a_run_begun_anew(workspace, done_run):
    """The checkpoints are deleted, and the new run stops before its model is exported."""
    shutil.rmtree(done_run / "checkpoint")
    run_here(workspace, done_run, **EXPORTS, training__seed=7, training__steps=3)
    run_here(workspace, done_run, **EXPORTS, training__seed=7)
    weights = final_weights(done_run)
    exported = AutoModelForCausalLM.from_pretrained(done_run / "hf", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, weights[f"lm.{name}"]) for name, tensor in exported.items())


def test_a_finished_run_goes_on_with_more_steps(workspace, done_run, caplog):
    rows = run_here(workspace, done_run, **EXPORTS, training__steps=8)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "changed since the checkpoint: training.steps: 6 -> 8" in caplog.messages
    starts = [json.loads(line)["start_step"] for line in (done_run / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 6] and "steps = 8" in (done_run / "config.toml").read_text()
    weights = final_weights(done_run)
    exported = AutoModelForCausalLM.from_pretrained(done_run / "hf", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, weights[f"lm.{name}"]) for name, tensor in exported.items())
    caplog.clear()
    assert run_here(workspace, done_run, **EXPORTS, training__steps=8) == rows and "nothing is left to do" in caplog.text


def test_a_finished_run_whose_model_is_missing_exports_it_again(workspace, done_run):
    before = measured(read_metrics(done_run))
    expected = (done_run / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(done_run / "hf")
    assert measured(run_here(workspace, done_run, **EXPORTS)) == before
    assert (done_run / "hf" / "model.safetensors").read_bytes() == expected


def test_a_run_of_another_release_is_refused_in_one_line(workspace, done_run, capsys):
    """As its checkpoints were before they had a format."""
    for checkpoint in list_checkpoints(done_run / "checkpoint"):
        edit_state(checkpoint, lambda state: (state.pop("format"), state.pop("objective")))
    before = read_files(done_run)
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, done_run, **EXPORTS, training__steps=8)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "step-6" in line and "another release" in line and "checkpoint.initial_load_path" in line
    assert read_files(done_run) == before


def test_options_without_effect_are_not_refused_at_a_resume(workspace, done_run, caplog):
    changes = {"mtp__tokens": 2, "pathstar__labels": 50, "siblings__children": 50, "optimizer__lr": 5e-3}
    run_here(workspace, done_run, **EXPORTS, **changes)
    assert "changed since the checkpoint: optimizer.lr: 0.01 -> 0.005" in caplog.messages
    assert "nothing is left to do" in caplog.text


def test_a_picture_that_fails_does_not_fail_the_run(workspace, tmp_path, monkeypatch, caplog):
    def fail(_folder):
        raise ValueError("no font\nis here")

    monkeypatch.setattr("flame.logging.plots.plot_run", fail)
    run_here(workspace, tmp_path / "run", training__steps=1)
    assert "no curves: they could not be drawn (no font is here)" in caplog.messages
    assert "done: step 1 of 1" in caplog.messages and (tmp_path / "run" / "finished.json").is_file()
