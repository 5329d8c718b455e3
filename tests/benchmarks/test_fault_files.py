"""The harness of changed files passes on what the trainer does, and fails where a check is taken out."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from benchmarks.fault_files import run_files
from benchmarks.faults import MODEL, OPTIONS
from flame.checkpoints import manager


@pytest.fixture(autouse=True)
def restore_log() -> Iterator[None]:
    logger = logging.getLogger("flame")
    before = logger.handlers[:]
    yield
    logger.handlers = before
    logging.disable(logging.NOTSET)


@pytest.mark.long
def test_nothing_that_changes_is_a_failure(tmp_path, capsys):
    assert run_files(tmp_path / "out", MODEL, OPTIONS, seed=1, share=0.04)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[1] for row in rows[1:]] == ["20", "20", "12"] and all(row.endswith("| 0 |") for row in rows[1:])


@pytest.mark.long
def test_a_check_that_is_taken_out_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(manager, "verify_files", lambda *args: None)
    assert not run_files(tmp_path / "out", MODEL, OPTIONS, seed=1, share=0.04)
    printed = capsys.readouterr().out
    assert "one bit of any file: __0_0.distcp: bit " in printed
