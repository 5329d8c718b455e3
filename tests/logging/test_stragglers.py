"""A slow rank is named with its host and what it is slow at; ranks that are alike are not."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
import torch

from flame.logging.stragglers import LINES_BETWEEN_REPORTS, LINES_KEPT, OwnTimes, StragglerWatch, find_stragglers
from tests.support.ranks import run_on_ranks
from tests.support.runs import run_here

ALIKE = OwnTimes(data=0.01, launch=0.2, product=0.005)


@pytest.mark.parametrize(
    ("own", "phase"),
    [
        (ALIKE._replace(data=0.12), "data"),
        (ALIKE._replace(launch=0.35), "launch"),
        (ALIKE._replace(product=0.006), "product"),
    ],
)
@pytest.mark.parametrize("ranks", [2, 5])
def test_the_slow_rank_is_found(own: OwnTimes, phase: str, ranks: int):
    times = [ALIKE] * (ranks - 1) + [own]
    assert [(found.rank, found.phase) for found in find_stragglers(times, step_seconds=1.0)] == [(ranks - 1, phase)]


def test_a_rank_within_a_tenth_of_a_step_is_not_slow():
    times = [ALIKE, ALIKE._replace(data=0.1, launch=0.29, product=0.0054)]
    assert find_stragglers(times, step_seconds=1.0) == []


def test_the_worst_comes_first():
    times = [ALIKE, ALIKE._replace(data=0.4, launch=0.4)]
    assert [found.phase for found in find_stragglers(times, step_seconds=1.0)] == ["data", "launch"]


def _watch(folder: Path) -> list[list[str]]:
    rank = torch.distributed.get_rank()
    watch = StragglerWatch(torch.device("cpu"))
    watch._time_product = lambda: 0.01  # type: ignore[method-assign]  # real times would make the test depend on the machine
    return [watch.compare(0.5 if rank == 1 else 0.0, 0.0, 1.0) for _ in range(LINES_KEPT + LINES_BETWEEN_REPORTS + 2)]


def test_it_is_named_once_in_a_while(tmp_path: Path):
    first, second = run_on_ranks(2, tmp_path, _watch)
    assert first == second
    named = [index for index, lines in enumerate(first) if lines]
    assert named == [LINES_KEPT - 1, LINES_KEPT + LINES_BETWEEN_REPORTS]
    line = f"rank 1 on {socket.gethostname()} waits for data 0.500 s a step, the others 0.000 s"
    assert first[LINES_KEPT - 1] == [line]


def test_one_rank_is_compared_with_nobody(workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    monkeypatch.setattr(StragglerWatch, "_time_product", lambda self: pytest.fail("measured for nothing"))
    with caplog.at_level(logging.WARNING, logger="flame"):
        run_here(workspace, tmp_path / "run")
    assert not [record for record in caplog.records if "on " + socket.gethostname() in record.getMessage()]
