"""scripts/*.sbatch, with commands that stand for Slurm's: which job is queued again after which exit code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPO

RUNNING = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "a"}
ALONE = RUNNING | {"SLURM_JOB_ID": "7"}
# Slurm gives the number of the array to its last element.
LAST = ALONE | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "FOLDER": "seeds"}
COMMANDS = {
    # A signal to the shell, too, as a preemption sends.
    "srun": "kill -USR1 $PPID; exit $RUN_EXIT_CODE",
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >>requeued; else echo a; fi',
    # Of an array's number, a line for each element.
    "squeue": 'case "$3" in 7) echo $STATE; [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || echo PENDING;; 7_3) echo $STATE;; esac',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def end_run(folder: Path, script: str, code: int, variables: dict[str, str], state: str = "RUNNING") -> list[str]:
    """Let the run of a job end with a code. The jobs that were queued again since the first."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    path = f"{folder}:{os.environ['PATH']}"
    environment = inherited | variables | {"PATH": path, "RUN_EXIT_CODE": str(code), "STATE": state}
    command = ["bash", str(REPO / "scripts" / script), "spec.toml"]
    assert subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == code
    requeued = folder / "requeued"
    return requeued.read_text().split() if requeued.exists() else []


@pytest.mark.parametrize(
    ("script", "variables", "job"),
    [("slurm.sbatch", ALONE, "7"), ("slurm.sbatch", LAST, "7_3"), ("compare.sbatch", LAST, "7_3")],
    ids=["a job", "an element", "an element of a comparison"],
)
def test_a_run_that_was_asked_to_stop_is_queued_again_unless_its_job_was_cancelled(
    folder: Path, script: str, variables: dict[str, str], job: str
) -> None:
    for code in (0, 1, 2):
        assert end_run(folder, script, code, variables) == []
    for code in (75, 143):
        assert end_run(folder, script, code, variables, state="COMPLETING") == []
    assert end_run(folder, script, 75, variables) == [job]
    assert end_run(folder, script, 143, variables) == [job, job]


def test_a_job_is_queued_again_after_three_losses_whatever_else_it_was_queued_for(folder: Path) -> None:
    restarts = 0
    for code in (75, 143, 75, 69, 75, 137, 69):
        restarts += 1
        variables = ALONE | {"SLURM_RESTART_COUNT": str(restarts)}
        assert end_run(folder, "slurm.sbatch", code, variables) == ["7"] * restarts
    assert end_run(folder, "slurm.sbatch", 69, ALONE) == ["7"] * restarts
    assert len((folder / "flame-7.losses").read_text().splitlines()) == 4
