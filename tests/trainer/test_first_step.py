"""The fingerprints of a run's start: the same for runs that differ in their objective alone, others with another seed or data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import run_here


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "first_step.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(workspace: Path, tmp_path_factory) -> dict:
    run = tmp_path_factory.mktemp("first")
    run_here(workspace, run, training__steps=1)
    (line,) = read_lines(run)
    return line


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"objective__name": "next_token"}, ("weights", "data")),
        ({"objective__name": "mtp"}, ("weights", "data")),
        ({"training__seed": 7}, ()),
        ({"training__num_streams": 6}, ("weights",)),
        ({"training__gradient_accumulation_steps": 3}, ("weights",)),
    ],
    ids=str,
)
def test_what_two_runs_share(workspace: Path, tmp_path: Path, first: dict, changes: dict, same: tuple[str, ...]):
    run_here(workspace, tmp_path, training__steps=1, checkpoint__enable_checkpoint=False, **changes)
    (line,) = read_lines(tmp_path)
    assert tuple(name for name in ("weights", "data") if line[name] == first[name]) == same
    assert line["step"] == 1 and line["device"]


def test_a_resumed_run_adds_a_line(workspace: Path, tmp_path: Path):
    run_here(workspace, tmp_path, training__steps=3)
    run_here(workspace, tmp_path, training__steps=4)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 4] and lines[0]["weights"] != lines[1]["weights"]
