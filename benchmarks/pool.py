"""Jobs on the GPUs of one host, several at once, each with GPUs of its own and a time limit.

Where a job's processes call `wait_for_turn`, they start while another job has their GPUs, and import their libraries, which takes
many seconds. All that uses a GPU comes after: compilation too, so that nothing runs beside what is timed.

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
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch

REPO = Path(__file__).parent.parent
MARK = "FLAME_BENCHMARK_JOB"
"""Variable that all processes of a job inherit."""
GO = b"g"
"""What each rank of a job that waits reads from its input when its turn has come."""
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
    """Limit of its turn."""
    expected: float = 0.0
    """About how many seconds its turn takes. The longest start first; jobs of the same length, in their order."""
    waits: bool = False
    """Whether each of its ranks calls `wait_for_turn` before it uses a GPU, so that they may start early."""


class Ended(NamedTuple):
    """What became of a job."""

    job: Job
    seconds: float
    """From its turn on; 0 if it had none."""
    problem: str | None = None
    """None: its exit code was 0."""
    lines: Sequence[str] = ()
    """If it failed: what `explain` shows of its log."""

    def __str__(self) -> str:
        return f"{time.strftime('%H:%M:%S')} {self.job.name}: {self.problem or 'done'}, {self.seconds:.0f} s"


class _Started:
    """A job's processes. They wait for their turn, if the job does."""

    def __init__(self, job: Job, gpus: list[str], log: Path, threads: int):
        self.job, self.log = job, log
        self.unclaimed, self.next = gpus, list[_Started]()  # GPUs for which no job waits, and those that wait for the others
        self.begun = inf
        self._mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self._mark, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        stdin = subprocess.PIPE if job.waits else subprocess.DEVNULL
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                job.command, cwd=REPO, env=environment, stdin=stdin, stdout=file, stderr=file, start_new_session=True
            )

    def begin(self) -> None:
        self.begun = time.monotonic()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError), self.process.stdin as stdin:
                stdin.write(GO * self.job.gpus)

    def find_end(self, is_over: bool) -> Ended | None:
        """What became of it; None if it goes on."""
        code, seconds = self.process.poll(), time.monotonic() - self.begun
        if code is None and seconds <= self.job.seconds and not is_over:
            return None
        whose = "its limit" if seconds > self.job.seconds else "the limit of all"
        problem = f"killed after {seconds:.0f} s, {whose}" if code is None else f"ended with {code}" if code else None
        return Ended(self.job, seconds, problem, explain(self.log) if problem else ())

    def kill(self) -> None:
        """Kill its processes, and return when they are gone."""
        if self.process.poll() is None:
            self.process.kill()  # first, so that it starts no others
            self.process.wait()
        until = time.monotonic() + GONE
        while (left := list_marked(self._mark)) and time.monotonic() < until:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL)


def wait_for_turn() -> bool:
    """In a rank of a job that `waits`: return when its GPUs are free. False if they never will be, since the scheduler is gone.

    A process that is no job's has its turn at once.
    """
    return MARK not in os.environ or os.read(sys.stdin.fileno(), 1) == GO


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

    Then jobs that can wait start early, on GPUs of one running job each, so that no GPU is idle until others are free: the job
    that is expected to end first has the first ones. Nothing waits for what waits.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        logs: folder of NAME.log, the output of each job.
        seconds: limit of them all. Jobs that run then are killed, the others not started.

    Closing the generator kills what runs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    pending, free, running = sorted(jobs, key=lambda job: -job.expected), list(gpus), list[_Started]()
    for job in [job for job in pending if job.gpus > len(gpus)]:
        pending.remove(job)
        yield Ended(job, 0.0, f"needs {job.gpus} GPUs, of {len(gpus)}")
    share = max(1, (os.cpu_count() or 1) // max(1, len(gpus)))

    def start_on(available: list[str], kinds: Sequence[bool]) -> Generator[_Started, None, None]:
        """Start jobs, those that wait or others too, while the GPUs suffice, and take these."""
        while job := next((job for job in pending if job.gpus <= len(available) and job.waits in kinds), None):
            pending.remove(job)
            own, available[:] = available[: job.gpus], available[job.gpus :]
            yield _Started(job, own, logs / f"{job.name}.log", share)

    try:
        while pending or running:
            is_over = time.monotonic() >= deadline
            if not is_over:
                for each in start_on(free, (True, False)):
                    running.append(each)
                    each.begin()
                for each in sorted(running, key=lambda each: each.begun + each.job.expected):
                    for early in start_on(each.unclaimed, (True,)):
                        each.next.append(early)
            elif not running:
                yield from (Ended(job, 0.0, "not started: the time was over") for job in pending)
                return
            for each in list(running):
                if (ended := each.find_end(is_over)) is None:
                    continue
                each.kill()  # of a job that has ended, what it left
                for early in each.next:
                    if is_over:
                        early.kill()
                        pending.append(early.job)
                    else:
                        running.append(early)
                        early.begin()
                running.remove(each)
                free += each.unclaimed
                yield ended
            time.sleep(POLL)
    finally:
        for each in running:
            for one in (*each.next, each):
                one.kill()


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
