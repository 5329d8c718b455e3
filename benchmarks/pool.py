"""Jobs on disjoint GPUs of one host, several at once, each with a time limit.

A job that exceeds its limit is killed with all its processes: also those that a launcher has put in sessions of their own, as
torchrun does with its workers, and torch with those that compile. All of a job's processes inherit a variable that names the job,
and are found by it in /proc.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch

REPO = Path(__file__).parent.parent
MARK = "FLAME_BENCHMARK_JOB"
"""Variable that all processes of a job inherit."""
POLL = 0.05
"""Seconds between looks at the running jobs."""
GONE = 20.0
"""Seconds that killed processes get to go: their GPU memory is free then."""
TAIL = 12
"""Lines of a failed job's log that are shown."""


@dataclass(frozen=True)
class Job:
    """A command that uses some GPUs."""

    name: str
    """Of its log, too."""
    gpus: int
    command: Sequence[str]
    seconds: float = inf
    """Limit of its run."""


class Ended(NamedTuple):
    """What became of a job."""

    job: Job
    seconds: float
    problem: str | None
    """None: its exit code was 0."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    gpus: list[str]
    mark: str
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


def list_gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",") if allowed else [str(gpu) for gpu in range(torch.cuda.device_count())]


def launch(gpus: int, module: str, arguments: Sequence[str]) -> list[str]:
    """A module's command: with torchrun on a port that it chooses, or alone on one GPU."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    return [sys.executable, *torchrun, "-m", module, *arguments]


def run_jobs(jobs: Sequence[Job], gpus: Sequence[str], logs: Path, seconds: float = inf) -> Generator[Ended, None, None]:
    """Run jobs, and yield each as it ends. The first job that the free GPUs suffice for starts first.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        logs: folder of NAME.log, the output of each job.
        seconds: limit of them all. Jobs that run then are killed, the others not started.

    Closing the generator kills what runs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    pending, free, running = list(jobs), list(gpus), list[_Running]()
    for job in [job for job in pending if job.gpus > len(gpus)]:
        pending.remove(job)
        yield Ended(job, 0.0, f"needs {job.gpus} GPUs, of {len(gpus)}")
    share = max(1, (os.cpu_count() or 1) // max(1, len(gpus)))
    try:
        while pending or running:
            while time.monotonic() < deadline and (job := next((job for job in pending if job.gpus <= len(free)), None)):
                pending.remove(job)
                own, free = free[: job.gpus], free[job.gpus :]
                running.append(_start(job, own, logs / f"{job.name}.log", share))
            for each in list(running):
                code, limit = each.process.poll(), each.job.seconds
                is_late = each.seconds > limit or time.monotonic() > deadline
                if code is None and not is_late:
                    continue
                ended = Ended(each.job, each.seconds, None if code == 0 else f"ended with {code}")
                if code is None:
                    whose = "its limit" if each.seconds > limit else "the limit of all"
                    ended = ended._replace(problem=f"killed after {each.seconds:.0f} s, {whose}")
                _kill(each)  # of a job that has ended, what it left
                running.remove(each)
                free += each.gpus
                yield ended
            if not running and time.monotonic() >= deadline:
                yield from (Ended(job, 0.0, "not started: the time was over") for job in pending)
                return
            time.sleep(POLL)
    finally:
        for each in running:
            _kill(each)


def _start(job: Job, gpus: list[str], log: Path, threads: int) -> _Running:
    mark = uuid.uuid4().hex
    environment = os.environ | {MARK: mark, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    with log.open("wb") as file:
        process = subprocess.Popen(
            job.command, cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    return _Running(job, process, gpus, mark)


def _kill(running: _Running) -> None:
    """Kill the job's processes, and wait until they are gone."""
    if running.process.poll() is None:
        running.process.kill()  # first, so that it starts no others
        running.process.wait()
    until = time.monotonic() + GONE
    while (left := list_marked(running.mark)) and time.monotonic() < until:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL)


def list_marked(mark: str) -> list[int]:
    """Living processes of a job."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def explain(log: Path) -> list[str]:
    """The last lines of a log, before torchrun's report; and the first line that names an error, if it is not among them."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    report = next(
        (n for n, line in enumerate(lines) if re.search(r"torch/distributed/elastic/.*(closing signal|exitcode)", line)), 0
    )
    lines = lines[: report + 1] if report else lines
    first = next((n for n, line in enumerate(lines) if re.search(r"\b\w*(Error|Exception)\b.*:", line)), len(lines))
    return [*lines[first : max(first, min(first + 1, len(lines) - TAIL))], *lines[-TAIL:]]
