"""Processes spread over the GPUs of this machine: one after another on each, so that nothing else runs beside what is timed.

All processes start at once and import their libraries, which takes many seconds and no GPU. Each then waits for its turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

REPO = Path(__file__).parent.parent
GO = "go\n"
GRACE = 10.0
"""Seconds that a process may go on after the deadline, which it keeps itself where it can."""


class Job(NamedTuple):
    """A process that calls `wait_for_turn` once it has its libraries."""

    name: str
    words: list[str]
    """After the Python interpreter."""
    seconds: float
    """About how long it has the GPU, by which jobs are dealt."""


def deal(jobs: Sequence[Job], gpus: Sequence[str]) -> dict[str, list[Job]]:
    """The jobs of each GPU, in order: the longest first, each to the GPU that is free first."""
    dealt: dict[str, list[Job]] = {gpu: [] for gpu in gpus}
    for job in sorted(jobs, key=lambda job: -job.seconds):
        first_free = min(dealt, key=lambda gpu: sum(own.seconds for own in dealt[gpu]))
        dealt[first_free].append(job)
    return dealt


def run_jobs(
    jobs: Sequence[Job], gpus: Sequence[str], folder: Path, deadline: float, on_end: Callable[[Job, str | None], None]
) -> None:
    """Run all, on all GPUs at once. What a process prints goes to `folder`/NAME.log.

    Args:
        deadline: `time.time()` after which no job starts, and those that run are ended, `GRACE` later.
        on_end: called with each job and, if it failed, why. Never twice at once.
    """
    one_at_a_time, everyone = Lock(), list[subprocess.Popen[str]]()

    def end(job: Job, fault: str | None) -> None:
        with one_at_a_time:
            on_end(job, fault)

    def run_on(gpu: str, own: list[Job]) -> None:
        started = [_start(job, gpu, folder) for job in own]
        everyone.extend(started)
        for job, process in zip(own, started, strict=True):
            end(job, _finish(process, folder / f"{job.name}.log", deadline))

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for ended in [pool.submit(run_on, gpu, own) for gpu, own in deal(jobs, gpus).items()]:
                ended.result()
        finally:
            for process in everyone:
                process.kill()
                process.wait()


def _start(job: Job, gpu: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    with (folder / f"{job.name}.log").open("w") as log:
        command = [sys.executable, *job.words]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, cwd=REPO)


def _finish(process: subprocess.Popen[str], log: Path, deadline: float) -> str | None:
    """Let a process go, and wait for it. Returns why it failed."""
    if time.time() > deadline:
        return "no time was left"
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(GO)
        process.stdin.close()
    try:
        code = process.wait(timeout=max(0.0, deadline - time.time()) + GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return "ended when no time was left"
    return f"ended with {code}; its last words:\n{log.read_text()[-3000:]}" if code else None


def wait_for_turn() -> bool:
    """In a job's process: wait until the GPU is free. False if it never will be."""
    return sys.stdin.readline() == GO
