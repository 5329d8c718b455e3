"""Files of a run that are something else, or vanish while it runs: one line each, and the right exit code."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from flame.errors import MachineFault
from flame.logging.writers.json_lines import METRICS_FILE
from flame.runtime import disk
from flame.train import Trainer, main
from flame.trainer.guard import SKIPPED_FILE
from flame.weights.exporter import Exporter
from tests.support.paths import REPO
from tests.support.runs import measured, options, read_metrics, run_here

SHORT = {"training__steps": 4, "checkpoint__interval": 2, "metrics__diagnostics_interval": 0}


def read_refusal(workspace: Path, run: Path, capsys: pytest.CaptureFixture, code: int, **changes: object) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        main(options(workspace, run, **SHORT | changes))
    assert stop.value.code == code
    if dist.is_initialized():
        dist.destroy_process_group()
    return capsys.readouterr().err.strip().splitlines()


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    real = Trainer.train_step

    def train_step(self):
        real(self)
        if self.step == step:
            action()

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("name", [METRICS_FILE, SKIPPED_FILE, "config.toml", "starts.jsonl", "finished.json", "run.lock"])
def test_a_link_to_elsewhere_is_refused_and_not_followed(workspace, tmp_path, capsys, name):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.write_text("somebody's")
    (run / name).symlink_to(elsewhere)
    (line,) = read_refusal(workspace, run, capsys, 2)
    assert line == f'"{run / name}" is a link to "{elsewhere}": the run writes a file of this name: move it away'
    assert elsewhere.read_text() == "somebody's" and [path.name for path in run.iterdir()] == [name]


def test_folders_and_files_in_each_others_places_are_refused(workspace, tmp_path, capsys):
    run = tmp_path / "run"
    (run / METRICS_FILE).mkdir(parents=True)
    (run / "audit").write_text("")
    assert read_refusal(workspace, run, capsys, 2) == [
        f'"{run / METRICS_FILE}" is no file: the run writes a file of this name: move it away',
        f'"{run / "audit"}" is no folder: the run writes a folder of this name: move it away',
    ]


def test_the_folder_of_checkpoints_may_be_on_another_disk(workspace, tmp_path, plain_run):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "large").mkdir()
    (run / "checkpoint").symlink_to(tmp_path / "large")
    run_here(workspace, run)
    assert measured(read_metrics(run)) == measured(read_metrics(plain_run))


@pytest.mark.parametrize("name", ["hf", "hf-step-2"])
def test_something_else_in_the_place_of_an_export_is_told_before_the_first_step(workspace, tmp_path, capsys, name):
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    (run / name / "notes.txt").write_text("mine")
    (line,) = read_refusal(workspace, run, capsys, 2, checkpoint__export_hf=True, checkpoint__export_interval=2)
    assert f'/{name}" holds "notes.txt", which is no part of an export' in line
    assert not (run / METRICS_FILE).exists()


def test_metrics_that_are_deleted_meanwhile_are_written_anew(workspace, tmp_path, monkeypatch, caplog):
    run = tmp_path / "run"
    after_step(monkeypatch, 2, lambda: (run / METRICS_FILE).unlink())
    rows = run_here(workspace, run, **SHORT)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert f'"{run / METRICS_FILE}" was deleted: it is written anew' in caplog.messages


def test_a_folder_that_is_deleted_meanwhile_ends_the_run_in_one_line(workspace, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    after_step(monkeypatch, 3, lambda: shutil.rmtree(run))
    (line,) = read_refusal(workspace, run, capsys, MachineFault.EXIT_CODE)
    assert line.startswith(f'"{run}" was deleted while the run was writing to it')


def test_checkpoints_that_are_deleted_meanwhile_are_saved_anew_or_missed(workspace, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda: shutil.rmtree(run / "checkpoint"))
        run_here(workspace, run, **SHORT)
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-4"]
    run, real = tmp_path / "other", Exporter.export_when_due

    def lose(self, step, **options):
        if step == 4:
            shutil.rmtree(run / "checkpoint")
        real(self, step, **options)

    monkeypatch.setattr(Exporter, "export_when_due", lose)
    (line,) = read_refusal(workspace, run, capsys, MachineFault.EXIT_CODE)
    assert line.startswith(f'"{run / "checkpoint" / "step-4" / ".metadata"}" was deleted while the run was going on')


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_rename_that_fails_once_costs_nothing_and_for_good_one_line(workspace, tmp_path, monkeypatch, capsys, mode):
    real, failures = os.replace, [1]

    def fail(source, target):
        if Path(source).suffix == ".partial" and failures:
            failures.pop()
            raise OSError(errno.ESTALE, "Stale file handle", str(source))
        real(source, target)

    monkeypatch.setattr(disk, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(os, "replace", fail)
    run_here(workspace, tmp_path / "once", **SHORT, checkpoint__async_mode=mode)
    assert not failures
    failures += [1] * 99
    (line,) = read_refusal(workspace, tmp_path / "always", capsys, MachineFault.EXIT_CODE, checkpoint__async_mode=mode)
    assert "was not saved: OSError: [Errno 116] Stale file handle" in line


def test_a_file_system_that_becomes_read_only_is_one_line(workspace, tmp_path, monkeypatch, capsys):
    def close() -> None:
        def refuse(*args, **options):
            raise OSError(errno.EROFS, "Read-only file system", "file")

        monkeypatch.setattr("flame.runtime.appended_file.AppendedFile.write", refuse)

    after_step(monkeypatch, 2, close)
    (line,) = read_refusal(workspace, tmp_path / "run", capsys, 2)
    assert "cannot be written (Read-only file system)" in line


FAULTY = """
import sys
from flame.errors import MachineFault
from flame.train import Trainer, main
def train_step(self):
    raise MachineFault("the machine is tired")
Trainer.train_step = train_step
main(sys.argv[1:])
"""


@pytest.mark.long
def test_a_fault_of_the_machine_is_one_line_under_the_launcher_too(workspace, tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = [sys.executable, "-m", "flame.launch", "--standalone", "--nproc-per-node=2", "-m", "faulty"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(tmp_path)])}
    done = subprocess.run(
        [*command, *options(workspace, tmp_path / "run")], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "the machine is tired" and "Traceback" not in done.stdout + done.stderr
