"""Which errors of a rank are the user's, the machine's, another rank's, or the program's own."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from flame.config.run import Job
from flame.config.schema import JobConfig
from flame.errors import MachineFault, UserError
from flame.runtime.endings import LOST_EXIT_CODE
from flame.trainer.failures import explain_failure

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "ranks", "code"),
    [
        (UserError("a = 1: wrong"), 2, 2),
        (caused_by(UserError("a = 1: wrong"), LOST), 2, 2),
        (MachineFault("the disk is gone"), 2, 1),
        (caused_by(MachineFault("a save failed"), LOST), 2, LOST_EXIT_CODE),
        (LOST, 2, LOST_EXIT_CODE),
        (LOST, 1, None),
        (OSError(errno.EROFS, "Read-only file system"), 1, 2),
        (ValueError("a fault of the program"), 2, None),
    ],
)
def test_who_is_to_blame(error: Exception, ranks: int, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    failure = explain_failure(error, JobConfig(job=Job(dump_folder=str(tmp_path))))
    assert (failure and failure.exit_code) == code


def test_a_mistake_in_the_options_is_told_before_there_are_any(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    mistake = UserError("a = 1: wrong")
    failure = explain_failure(mistake, None)
    assert failure is not None and failure.told is mistake
