"""How a process finds its place in a run."""

from __future__ import annotations

import os

import pytest

from flame.runtime.distributed import SINGLE_PROCESS, set_single_process_defaults
from flame.train import main


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in SINGLE_PROCESS:
        monkeypatch.delenv(key, raising=False)


def test_a_process_alone_is_a_run_of_one() -> None:
    set_single_process_defaults()
    assert SINGLE_PROCESS.items() <= os.environ.items()


def test_ranks_that_cannot_meet_end_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """They would wait for a port that nobody opens."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop:
        main([])
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in line
    assert line.startswith(
        "WORLD_SIZE = 2 (environment) without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start the run with train.sh"
    )
