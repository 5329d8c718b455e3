"""`--dry-run` starts a run like the run itself, and leaves nothing behind."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import pytest

from flame.train import main
from tests.support.runs import options, run_here


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def dry_run(caplog: pytest.LogCaptureFixture, argv: list[str]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="flame"):
        main([*argv, "--dry-run"])
    return [record.getMessage() for record in caplog.records]


def test_it_makes_the_first_step_of_the_run_and_keeps_nothing(workspace: Path, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    argv = options(workspace, tmp_path / "run", training__steps=50, validation__holdout_every=2, validation__interval=25)
    lines = dry_run(caplog, argv)
    assert not (tmp_path / "run").exists() and not list_files(tmp_path / "temporary")
    first = run_here(workspace, tmp_path / "run", training__steps=1, validation__holdout_every=2, validation__interval=1)[0]
    (step,) = (line for line in lines if line.startswith("step 1/4 "))
    assert f"ce {first['ce_loss']:6.3f}" in step and f"aux {first['aux_loss']:6.3f}" in step
    assert lines[-1].endswith(f"The run itself begins in {tmp_path / 'run'}")
    assert any(line.startswith("validation: 1 held-out sequences") for line in lines)


def test_a_run_that_is_under_way_is_not_touched(workspace: Path, tmp_path: Path, plain_run: Path, caplog):
    shutil.copytree(plain_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in list_files(tmp_path / "run")}
    lines = dry_run(caplog, options(workspace, tmp_path / "run", training__steps=12))
    assert {path: path.stat().st_mtime_ns for path in list_files(tmp_path / "run")} == before
    assert lines[-1].endswith(f"The run itself goes on from {tmp_path / 'run' / 'checkpoint' / 'step-6'}")


def test_mistakes_are_found(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([*options(workspace, tmp_path / "run", training__data_files=tmp_path / "none.jsonl"), "--dry-run"])
    assert ended.value.code == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_loss_that_begins_later_is_computed(workspace: Path, tmp_path: Path, caplog):
    lines = dry_run(caplog, options(workspace, tmp_path / "run", training__steps=50, objective__start_step=40))
    assert any(line.startswith("step 1/4 ") and " aux " in line for line in lines)
