"""A run that loses ranks, judged by an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fault_ranks import Stage, is_lossless, judge
from benchmarks.pool import REPO

ROW = {"loss": 4.0, "ce_loss": 3.0, "aux_loss": 1.0, "grad_norm": 0.5, "lr": 1e-3}


def write_run(run: Path, ranks: list[int], changed: dict[int, dict[str, float]] = {}, lost: int | None = None) -> Path:  # noqa: B006
    """A run of six steps of two sequences.

    Args:
        ranks: how many ranks each step had.
        changed: by step, what differs in its row.
        lost: a step whose second sequence holds other tokens.
    """
    (run / "audit").mkdir(parents=True)
    rows, audit = [], {rank: [] for rank in range(max(ranks))}
    for step in range(1, 7):
        rows.append({"step": step, "tokens_seen": 512 * step} | ROW | changed.get(step, {}))
        for place in range(2):
            sequence, first = 2 * step + place, 7 if step == lost and place else 0
            line = {"step": step, "sequence": sequence, "source": "s", "trained": True, "pieces": [[sequence, first, 9, 0, True]]}
            audit[place % ranks[step - 1]].append(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank, lines in audit.items():
        (run / "audit" / f"rank-{rank:05d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_run(tmp_path / "reference", [2] * 6)


def judge_stages(run: Path, reference: Path) -> list[Stage]:
    stages = [Stage(2, 1, 4, 137), Stage(1, 5, 6, 0)]
    judge(stages, run, reference)
    return stages


def test_rounding_is_allowed_on_fewer_ranks_alone(tmp_path: Path, reference: Path):
    run = write_run(tmp_path / "run", [2, 2, 2, 2, 1, 1], {6: {"loss": 4.001, "grad_norm": 0.51}})
    stages = judge_stages(run, reference)
    assert [stage.differing_steps for stage in stages] == [0, 1] and stages[1].largest_difference == pytest.approx(0.001 / 4)
    assert is_lossless(stages, 2)
    run = write_run(tmp_path / "early", [2, 2, 2, 2, 1, 1], {3: {"grad_norm": 0.5000001}})
    stages = judge_stages(run, reference)
    assert [stage.differing_steps for stage in stages] == [1, 0] and not is_lossless(stages, 2)
    run = write_run(tmp_path / "far", [2, 2, 2, 2, 1, 1], {6: {"ce_loss": 3.1}})
    assert not is_lossless(judge_stages(run, reference), 2)


@pytest.mark.parametrize("changes", [{"changed": {5: {"tokens_seen": 2559}}}, {"lost": 5}], ids=["tokens", "sequence"])
def test_other_tokens_are_never_allowed(tmp_path: Path, reference: Path, changes: dict):
    stages = judge_stages(write_run(tmp_path / "run", [2, 2, 2, 2, 1, 1], **changes), reference)
    assert [stage.miscounted_steps for stage in stages] == [0, 1] and not is_lossless(stages, 2)


def test_a_missing_step_is_a_loss(tmp_path: Path, reference: Path):
    run = write_run(tmp_path / "run", [2, 2, 2, 2, 1, 1])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    stages = judge_stages(run, reference)
    assert stages[1].miscounted_steps == 1 and stages[1].largest_difference == float("inf") and not is_lossless(stages, 2)


@pytest.mark.long
def test_a_run_survives_the_loss_of_ranks(tmp_path: Path):
    """Two processes, one killed, twice; the rest on one."""
    command = [sys.executable, "-m", "benchmarks.fault_ranks", str(tmp_path / "out"), "--ranks", "2", "--steps", "18"]
    done = subprocess.run(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = [Stage(**stage) for stage in json.loads((tmp_path / "out" / "result.json").read_text())]
    assert [stage.ranks for stage in stages] == [2, 2, 1] and stages[-1].last == 18
    assert [stage.exit_code == 0 for stage in stages] == [False, False, True]
