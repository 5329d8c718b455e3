"""Going back to an earlier step of a run, and what is kept to go back to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flame.models.output_head
from flame.checkpoints.files import list_checkpoints
from flame.errors import UserError
from flame.train import Trainer
from tests.support.runs import cut_power_after, final_weights, measured, options, read_metrics, run_here

EACH_STEP = {"checkpoint__interval": 1, "checkpoint__keep_latest_k": 0}


@pytest.fixture(scope="module")
def finished_run(workspace, tmp_path_factory) -> Path:
    """With a checkpoint of each step, and an export at step 3."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run_here(workspace, run, **EACH_STEP, checkpoint__export_hf=True, checkpoint__export_interval=3)
    (run / "skipped.jsonl").write_text('{"step": 2}\n{"step": 5}\n')
    return run


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def list_steps(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoint")]


def read_starts(run: Path) -> list[int]:
    return [json.loads(line)["start_step"] for line in (run / "starts.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path) -> None:
    assert measured(read_metrics(run)) == measured(read_metrics(other))
    found, expected = final_weights(run), final_weights(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()


def test_going_back_is_as_if_the_run_had_been_stopped_there(workspace, run, finished_run, caplog):
    newer = {name: (run / "checkpoint" / name / "trainer.json").read_bytes() for name in ("step-3", "step-6")}
    old_metrics = (run / "metrics.jsonl").read_bytes()
    cut_power_after(4, options(workspace, run, **EACH_STEP, checkpoint__load_step=2))
    assert list_steps(run) == ["step-1", "step-2", "step-3"]
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4][: len(read_metrics(run))]
    assert (run / "skipped.jsonl").read_text() == '{"step": 2}\n'
    for name, content in newer.items():
        assert (run / "checkpoint" / f"{name}.set-aside-1" / "trainer.json").read_bytes() == content
    assert (run / "metrics.jsonl.set-aside-1").read_bytes() == old_metrics
    assert (run / "hf.set-aside-1").is_dir() and (run / "hf-step-3.set-aside-1").is_dir() and not (run / "hf").exists()
    assert "back to step 2: step-3, step-4, step-5, step-6, hf, hf-step-3 and a copy of metrics.jsonl" in caplog.text
    # The same command, as a scheduler repeats it, goes on and does not go back again.
    run_here(workspace, run, **EACH_STEP, checkpoint__load_step=2)
    assert read_starts(run) == [0, 2, 3] and "checkpoint.load_step = 2 was done at" in caplog.text
    assert_same_run(run, finished_run)
    before = read_metrics(run)
    run_here(workspace, run, **EACH_STEP, checkpoint__load_step=2)
    assert read_metrics(run) == before and "nothing is left to do" in caplog.text


def test_a_start_without_the_option_lets_the_run_go_back_again(workspace, run, finished_run):
    for load_step in (4, None, 4):
        run_here(workspace, run, **EACH_STEP, checkpoint__load_step=load_step)
    assert read_starts(run) == [0, 4, 4]  # the start between them finds the run finished
    assert (run / "checkpoint" / "step-6.set-aside-2").is_dir()
    assert_same_run(run, finished_run)


@pytest.mark.parametrize(
    ("load_step", "expected"),
    [(7, "has no checkpoint of this step (there are 1, 2, 3, 4, 5, 6)"), (5, "cannot be read: OSError: ")],
)
def test_a_step_that_cannot_be_loaded_changes_nothing(workspace, run, capsys, load_step, expected):
    (run / "checkpoint" / "step-5" / "__0_0.distcp").write_bytes(b"")
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, run, **EACH_STEP, checkpoint__load_step=load_step)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == UserError.EXIT_CODE and "\n" not in line
    assert line.startswith(f"checkpoint.load_step = {load_step}: ") and expected in line
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_no_good_checkpoint_is_purged_while_steps_are_skipped(workspace, tmp_path, monkeypatch, capsys):
    """From step 4 on the loss is not finite. The run ends, and so does the next start; both say how to go back."""
    run, real, is_broken = tmp_path / "run", flame.models.output_head.linear_cross_entropy, [False]
    monkeypatch.setattr(
        flame.models.output_head, "linear_cross_entropy", lambda *a: real(*a) * (float("nan") if is_broken[0] else 1.0)
    )
    saved = {"checkpoint__interval": 1, "training__max_skipped_steps": 4}
    run_here(workspace, run, **saved, training__steps=3)
    is_broken[0] = True
    for expected_step in (7, 8):
        with pytest.raises(SystemExit):
            run_here(workspace, run, **saved, training__steps=9)
        dist.destroy_process_group()
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"step {expected_step}: loss nan") and "\n" not in line
        assert line.endswith("go back to before them with --checkpoint.load_step 3 (or 2, if that fails too)")
        assert list_steps(run) == ["step-2", "step-3", f"step-{expected_step - 1}"]
        saved |= {"training__max_skipped_steps": 5}
    is_broken[0] = False
    run_here(workspace, run, **saved, checkpoint__load_step=3)
    assert list_steps(run) == ["step-5", "step-6"] and (run / "checkpoint" / "step-7.set-aside-1").is_dir()
    run_here(workspace, tmp_path / "whole", **saved)
    assert_same_run(run, tmp_path / "whole")


def test_a_state_whose_weights_are_lost_is_never_saved(workspace, tmp_path, monkeypatch, capsys):
    """They become NaN in step 5 itself, whose loss is finite. Without a look at them, step 6 would push out step 4."""
    run, real = tmp_path / "run", Trainer.train_step

    def train_step(self):
        real(self)
        if self.step == 5:
            next(iter(self.model.parameters())).data.mul_(float("nan"))

    saved = {"checkpoint__interval": 2, "checkpoint__keep_latest_k": 1, "training__steps": 12}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(SystemExit) as stop:
            run_here(workspace, run, **saved, training__max_skipped_steps=6)
    dist.destroy_process_group()
    line = capsys.readouterr().err.strip()
    assert stop.value.code == UserError.EXIT_CODE and "\n" not in line
    assert line.startswith("step 6: there are weights that are not finite, first lm.") and "--checkpoint.load_step 4" in line
    assert list_steps(run) == ["step-4"]
    run_here(workspace, run, **saved)
    assert list_steps(run) == ["step-12"]
