"""Runs that are asked to stop, wherever they are: what is saved, and that the resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flame.train as train_module
from flame.checkpoints.manager import Checkpointer, list_checkpoints
from flame.data.prefetch import Prefetcher
from flame.errors import UserError
from flame.runtime import lock as run_lock
from flame.runtime.distributed import set_single_process_defaults
from flame.runtime.signals import PREEMPTED_EXIT_CODE
from flame.train import Trainer
from flame.trainer.guard import StepGuard
from flame.trainer.options import read_options
from flame.trainer.validation import Validator
from tests.support.paths import REPO
from tests.support.runs import final_weights, measured, options, read_metrics, run_here


class Request:
    """Stands for the signal."""

    def __init__(self) -> None:
        self.has_come = False

    def __call__(self) -> bool:
        return self.has_come


def train(workspace: Path, run: Path, request: Request, **changes: object) -> tuple[Trainer, bool]:
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, run, **changes), 1), request)
    finished = trainer.train()
    assert not dist.is_initialized()
    return trainer, finished


def check_resumed(workspace: Path, run: Path, plain: Path, **changes: object) -> None:
    rows = [row for row in run_here(workspace, run, **changes) if "loss" in row]
    assert measured(rows) == measured(read_metrics(plain))
    found, expected = final_weights(run), final_weights(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("moment", ["step", "data wait", "save", "start"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(workspace, tmp_path, monkeypatch, plain_run, moment, async_mode):
    """The request comes inside step 4, while waiting for the data of step 5, inside the save of step 3, or before step 1."""
    run, request, saves = tmp_path / "run", Request(), []

    def arrive(owner: type, name: str, is_now: Callable[..., bool], gives_up: bool = False) -> None:
        real = getattr(owner, name)

        def patched(self, *args):
            if is_now(self, *args):
                request.has_come = True
                if gives_up:
                    return None
            return real(self, *args)

        monkeypatch.setattr(owner, name, patched)

    takes: list[int] = []
    if moment == "step":
        arrive(StepGuard, "should_apply", lambda _, step, *__: step == 4)
    elif moment == "data wait":
        arrive(Prefetcher, "take", lambda *_: takes.append(1) or len(takes) == 5, gives_up=True)  # type: ignore[func-returns-value]
    elif moment == "save":
        arrive(Checkpointer, "save", lambda _, step, state: saves.append(step) or True)  # type: ignore[func-returns-value]
    else:
        request.has_come = True
    trainer, finished = train(workspace, run, request, checkpoint__async_mode=async_mode)
    expected = {"step": 4, "data wait": 4, "save": 3, "start": 0}[moment]
    assert not finished and trainer.step == expected
    kept = [path.name for path in list_checkpoints(run / "checkpoint")]
    assert kept == {4: ["step-3", "step-4"], 3: ["step-3"], 0: []}[expected]
    if moment == "save":
        assert saves == [3], "the checkpoint of this step is there already"
    monkeypatch.undo()
    check_resumed(workspace, run, plain_run, checkpoint__async_mode=async_mode)


def test_a_stop_while_validating_leaves_the_validation_to_the_resumed_run(workspace, tmp_path, monkeypatch):
    changes = {"validation__interval": 2, "validation__holdout_every": 5, "validation__num_sequences": 4}
    expected = run_here(workspace, tmp_path / "plain", **changes)
    run, request = tmp_path / "run", Request()
    real = Validator.run

    def interrupted(self, *args):
        request.has_come = self.calls_left == 0
        self.calls_left -= 1
        return real(self, *args)

    monkeypatch.setattr(Validator, "run", interrupted)
    monkeypatch.setattr(Validator, "calls_left", 1, raising=False)
    trainer, finished = train(workspace, run, request, **changes)
    assert not finished and trainer.step == 4
    assert [row["step"] for row in read_metrics(run) if "validation_loss" in row] == [2]
    monkeypatch.undo()
    found = run_here(workspace, run, **changes)
    assert [row for row in found if "validation_loss" in row] == [row for row in expected if "validation_loss" in row]
    assert measured([row for row in found if "loss" in row]) == measured([row for row in expected if "loss" in row])


def test_without_checkpoints_a_stopped_run_says_so(workspace, tmp_path, caplog):
    request = Request()
    request.has_come = True
    _, finished = train(workspace, tmp_path / "run", request, checkpoint__enable_checkpoint=False)
    assert not finished and "nothing is saved: checkpoints are off" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.long)])
def test_a_signal_to_the_launcher_stops_both_ranks_and_the_same_command_goes_on(workspace, tmp_path, plain_run, name):
    """Through train.sh: code 75, no report of a failure, a checkpoint of the last logged step."""
    run = tmp_path / "run"
    environment = os.environ | {"NGPU": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [
        "bash",
        str(REPO / "train.sh"),
        *options(workspace, run, training__gradient_accumulation_steps=2, training__steps=4000),
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (PREEMPTED_EXIT_CODE, "")
    assert "stopped on request after step" in out and "the same command goes on from" in out
    step = int(list_checkpoints(run / "checkpoint")[-1].name.removeprefix("step-"))
    assert read_metrics(run)[-1]["step"] == step


def test_a_stop_right_after_a_validation_saves(workspace, tmp_path, monkeypatch, plain_run):
    """Between two log lines, where a step has been validated but not logged."""
    run, request = tmp_path / "run", Request()
    changes = {"validation__interval": 2, "validation__dataset": "json", "validation__data_files": workspace / "corpus.jsonl"}
    changes |= {"metrics__log_freq": 5, "checkpoint__interval": 5, "validation__num_sequences": 3}
    real = Validator.run

    def validate(self, *args):
        values = real(self, *args)
        request.has_come = True
        return values

    monkeypatch.setattr(Validator, "run", validate)
    trainer, finished = train(workspace, run, request, **changes)
    assert not finished and trainer.step == 2
    assert [path.name for path in list_checkpoints(run / "checkpoint")] == ["step-2"]
    assert [row["step"] for row in read_metrics(run)] == [2, 2]
    monkeypatch.undo()
    run_here(workspace, run, **changes)
    found, expected = final_weights(run), final_weights(plain_run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_validation_that_is_owed_twice_is_logged_once(workspace, tmp_path, monkeypatch):
    """Killed after the owed validation of a resumed run and before its next checkpoint."""
    run, request = tmp_path / "run", Request()
    changes = {"validation__interval": 2, "validation__dataset": "json", "validation__data_files": workspace / "corpus.jsonl"}
    changes |= {"checkpoint__interval": 100, "validation__num_sequences": 3, "training__steps": 4}
    real_run, real_step = Validator.run, Trainer.train_step

    def stop(self, *args):
        request.has_come = True
        return real_run(self, *args)

    monkeypatch.setattr(Validator, "run", stop)
    trainer, _ = train(workspace, run, request, **changes)
    assert trainer.step == 2
    monkeypatch.undo()

    class PowerCut(Exception):
        pass

    def fail(self):
        raise PowerCut

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(PowerCut):
        train(workspace, run, Request(), **changes)
    dist.destroy_process_group()
    monkeypatch.setattr(Trainer, "train_step", real_step)
    rows = run_here(workspace, run, **changes)
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]


def test_two_starts_of_one_run_at_once(workspace, tmp_path, monkeypatch):
    """The second is refused before it touches anything; when the first has ended, the folder is free."""
    holder = tmp_path / "run"
    holder.mkdir()
    code = f"""
import pathlib, sys
from flame.runtime.lock import lock_run
lock = lock_run(pathlib.Path({str(holder)!r}))
print("held", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserError, match=rf"is in use by another run \(process {process.pid} on .*\)"):
        train(workspace, holder, Request())
    assert [path.name for path in holder.iterdir()] == ["run.lock"]
    dist.destroy_process_group()
    process.kill()
    process.wait()
    _, finished = train(workspace, holder, Request(), training__steps=1)
    assert finished


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"validation__holdout_every": 5}, {}, "validation.holdout_every = 0, but the run in"),
        ({"sources": "ab"}, {"sources": "ac"}, 'source "b" of the checkpoint is not trained on any more (now: a, c)'),
        ({"sources": "b"}, {}, 'source "b" of the checkpoint is not trained on any more (now: json)'),
    ],
)
def test_what_would_shift_the_data_is_refused(workspace, tmp_path, capsys, before, after, expected):
    files = {"a": workspace / "corpus.jsonl", "b": tmp_path / "b.jsonl", "c": workspace / "corpus.jsonl"}
    files["b"].write_text(files["a"].read_text().replace("alpha", "omega"))

    def expand(changes: dict) -> dict:
        if "sources" not in changes:
            return changes
        named = {f"sources__{name}__dataset": "json" for name in changes["sources"]}
        named |= {f"sources__{name}__data_files": files[name] for name in changes["sources"]}
        return named | {"training__dataset": None, "training__data_files": None}

    quick = {"training__steps": 1}
    run_here(workspace, tmp_path / "run", **expand(before), **quick)
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **expand(after), **quick | {"training__steps": 2})
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_harmless_changes_are_listed(workspace, tmp_path, caplog):
    quick = {"training__steps": 1}
    run_here(workspace, tmp_path / "run", **quick)
    caplog.clear()
    run_here(workspace, tmp_path / "run", **quick | {"training__steps": 2, "optimizer__lr": 0.5})
    told = [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]
    assert told == [
        "changed since the checkpoint: training.steps: 1 -> 2",
        "changed since the checkpoint: optimizer.lr: 0.01 -> 0.5",
    ]


def test_what_nobody_has_set_is_not_listed_as_changed(workspace, tmp_path, caplog):
    """A corpus that becomes a source: neither the source's defaults nor what it replaces in [training]."""
    quick = {"training__steps": 1}
    run_here(workspace, tmp_path / "run", **quick)
    caplog.clear()
    source = {"sources__json__dataset": "json", "sources__json__data_files": workspace / "corpus.jsonl"}
    replaced = {"training__dataset": None, "training__data_files": None}
    run_here(workspace, tmp_path / "run", **quick | source | replaced | {"training__steps": 2})
    told = [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]
    assert told == [
        "changed since the checkpoint: training.steps: 1 -> 2",
        'changed since the checkpoint: sources.json.dataset: unset -> "json"',
        f'changed since the checkpoint: sources.json.data_files: unset -> "{workspace}/corpus.jsonl"',
    ]


def test_a_source_that_has_not_been_drawn_from_is_not_new(workspace, tmp_path, caplog):
    def name_sources(*names: str) -> dict[str, object]:
        corpus = {"dataset": "json", "data_files": workspace / "corpus.jsonl"}
        named = {f"sources__{name}__{option}": value for name in names for option, value in corpus.items()}
        weights = {f"sources__{name}__weight": 0.0 for name in names[1:]}
        return named | weights | {"training__dataset": None, "training__data_files": None}

    run_here(workspace, tmp_path / "run", **name_sources("a", "b"), training__steps=1)
    caplog.clear()
    run_here(workspace, tmp_path / "run", **name_sources("a", "b", "c"), training__steps=2)
    told = [record.getMessage() for record in caplog.records if "is new" in record.getMessage()]
    assert told == ['changed since the checkpoint: source "c" is new and begins at its first document']


@pytest.mark.slow
def test_ctrl_c_ends_at_once_without_a_traceback(workspace, tmp_path):
    run = tmp_path / "run"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(REPO / "train.sh"), *options(workspace, run, training__steps=40000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while not list_checkpoints(run / "checkpoint"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in out + err
    assert "interrupted: the same command goes on from " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("step", "changes", "told"),
    [
        (2, {}, "interrupted: nothing is saved yet: the same command begins anew"),
        (4, {}, "interrupted: the same command goes on from {run}/checkpoint/step-3"),
        (4, {"checkpoint__enable_checkpoint": False}, "interrupted: nothing is saved: checkpoints are off"),
    ],
)
def test_ctrl_c_says_what_is_saved(workspace, tmp_path, monkeypatch, caplog, step, changes, told):
    real = Trainer.train_step

    def interrupt(self):
        real(self)
        if self.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **changes)
    assert stop.value.code == 130
    assert caplog.messages[-1] == told.format(run=tmp_path / "run")


def test_ctrl_c_before_a_run_goes_on_knows_of_its_checkpoint(workspace, monkeypatch, caplog, plain_run):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "start_processes", interrupt)
    with pytest.raises(SystemExit):
        run_here(workspace, plain_run)
    assert caplog.messages[-1] == f"interrupted: the same command goes on from {plain_run}/checkpoint/step-6"
