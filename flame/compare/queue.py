"""Makes the runs that are not made yet, some at a time, each in a process of its own.

A run is known by its folder, so the queue keeps no state: after a kill, of a run or of the queue, the same command goes on. What
has ended is left alone, what was cut off goes on from its newest checkpoint, and what has failed is tried again. Several queues,
on machines that share the folder, take different runs: each locks the run that it makes.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import flame
from flame.compare.devices import Slot
from flame.compare.outcomes import (
    COMPLETE,
    ENDED,
    FAILED,
    LOG_FILE,
    STOPPED,
    UNFINISHED,
    Outcome,
    clear_outcome,
    read_last_line,
    read_outcome,
    write_outcome,
)
from flame.compare.results import Row, read_rows
from flame.compare.runs import Run, describe_changes, write_record
from flame.config.run import CHECKPOINT_FOLDER
from flame.errors import UserError
from flame.runtime.signals import PREEMPTED_EXIT_CODE, STOP_SIGNALS

LOCK_FILE = "compare.lock"
LOOK_SECONDS = 0.1
SECONDS_BETWEEN_ROWS = 1.0
"""Between looks at the metrics of a run that may end early."""
LOST_EXIT_CODE = 69
MOST_LOSSES = 2
"""How often one queue starts a run again that was killed or has lost a rank."""
PARENT_DEATH = 1
"""PR_SET_PDEATHSIG of linux/prctl.h."""

BuildCommand = Callable[[Run], list[str]]


class Active:
    """A run that is under way."""

    def __init__(self, run: Run, slot: Slot, lock: IO[str], command: list[str]):
        self.run, self.slot, self.lock = run, slot, lock
        self.started = self.looked = time.monotonic()
        self.is_done = False
        """Whether it was asked to end since it has reached what it is run for."""
        self.told = 0
        """Requests to stop that were passed on to it."""
        self.rows_before = read_rows(run.folder) if run.stops else []
        """Of an earlier start. The trainer discards those after its checkpoint."""
        environment = os.environ | slot.environment | _find_import_path()
        with (run.folder / LOG_FILE).open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the queue, which lets its runs save
                preexec_fn=_end_with_parent,
            )

    def look(self) -> None:
        """Ask the run to end if it has reached what it is run for."""
        if not self.run.stops or self.is_done or time.monotonic() - self.looked < SECONDS_BETWEEN_ROWS:
            return
        self.looked = time.monotonic()
        rows = read_rows(self.run.folder)
        # A trainer that has not begun to write may not listen to signals yet: one would kill it.
        if rows != self.rows_before and find_end(self.run, rows) is not None:
            self.is_done = True
            self.process.terminate()

    def pass_on(self, stop_requests: int) -> None:
        """The first request lets the run save, the second ends it."""
        if stop_requests > self.told:
            self.told = stop_requests
            if stop_requests == 1:
                self.process.terminate()
            else:
                self.process.kill()


class RunQueue:
    """Runs of a comparison and the slots that they share.

    Args:
        build_command: of a run; a test may start something else than the trainer.
    """

    def __init__(self, runs: Sequence[Run], slots: Sequence[Slot], build_command: BuildCommand | None = None):
        self.runs, self.slots = list(runs), list(slots)
        self.build_command = build_command or build_trainer_command
        self.stop_requests = 0
        self._waiting: list[Run] = []
        self._active: list[Active] = []
        self._losses: dict[str, int] = {}
        self._records: dict[str, dict[str, Any]] = {}
        """What each run was when the work began, by its name."""

    def make(self) -> bool:
        """Make all runs. Returns False if it was asked to stop, once its runs have saved.

        Raises:
            UserError: the options of a run are wrong.
        """
        self._waiting = [run for run in self.runs if read_outcome(run.folder).state not in ENDED]
        self._records = {run.name: run.describe() for run in self._waiting}
        free = list(self.slots)
        with self._listening():
            while self._active or (self._waiting and not self.stop_requests):
                while free and self._waiting and not self.stop_requests:
                    run = self._waiting.pop(0)
                    if self._start(run, free[0]):
                        free.pop(0)
                for active in list(self._active):
                    if active.process.poll() is None:
                        active.pass_on(self.stop_requests)
                        active.look()
                        continue
                    self._active.remove(active)
                    free.append(active.slot)
                    self._finish(active)
                time.sleep(LOOK_SECONDS)
        return not self.stop_requests

    def _start(self, run: Run, slot: Slot) -> bool:
        """Whether the run is under way now. Another queue may have made it, or be at it."""
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(run.folder / LOCK_FILE)
        if lock is None:
            say(f"{run.name}: another process is at it")
            return False
        if read_outcome(run.folder).state in ENDED:
            lock.close()
            return False
        if changed := self._find_change(run):
            write_outcome(run.folder, Outcome(FAILED, changed))
            lock.close()
            self._tell(run, f"{FAILED}: {changed}")
            return False
        if was_cut_off_at_its_end(run):
            write_outcome(run.folder, Outcome(STOPPED))
            lock.close()
            self._tell(run, STOPPED)
            return False
        write_record(run)
        clear_outcome(run.folder)
        self._active.append(Active(run, slot, lock, self.build_command(run)))
        return True

    def _find_change(self, run: Run) -> str | None:
        """A line if the run would not be what it was when the work began: its trainer reads the configuration file anew."""
        before = self._records[run.name]
        try:
            now = run.describe()
        except UserError as error:
            return f"not started, its options have changed since the command was started: {error.lines[0]}"
        if now == before:
            return None
        return f"not started, it has changed since the command was started: {describe_changes(before, now)}"

    def _finish(self, active: Active) -> None:
        run, code = active.run, active.process.returncode
        outcome = self._judge(active, code)
        if outcome.state != UNFINISHED:
            write_outcome(run.folder, outcome)
        active.lock.close()
        seconds = time.monotonic() - active.started
        again = ""
        if outcome.state == UNFINISHED and not self.stop_requests:
            self._losses[run.name] = self._losses.get(run.name, 0) + 1
            self._waiting.append(run)
            again = f" (exit code {code}), it is started again"
        reason = f": {outcome.line}" if outcome.line else ""
        self._tell(run, f"{outcome.state}{again}, {seconds:.0f} s{reason}")

    def _tell(self, run: Run, news: str) -> None:
        ended = sum(read_outcome(each.folder).state in ENDED for each in self.runs)
        say(f"[{ended}/{len(self.runs)}] {run.name}: {news}")

    def _judge(self, active: Active, code: int) -> Outcome:
        folder = active.run.folder
        if code == 0:
            return Outcome(COMPLETE)
        if active.is_done and code == PREEMPTED_EXIT_CODE:
            return Outcome(STOPPED)
        is_lost = code < 0 or code > 128 or code in (PREEMPTED_EXIT_CODE, LOST_EXIT_CODE)
        if is_lost and (self.stop_requests or self._losses.get(active.run.name, 0) < MOST_LOSSES):
            return Outcome(UNFINISHED)
        return Outcome(FAILED, f"exit code {code}: {read_last_line(folder / LOG_FILE) or 'its log is empty'}")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Pass the first request to stop on to the runs, which save; end them at the second."""
        signals = (signal.SIGINT, *STOP_SIGNALS)
        before = {each: signal.signal(each, self._request_stop) for each in signals}
        try:
            yield
        finally:
            for active in self._active:  # after a fault of the queue
                active.process.terminate()
            for each, handler in before.items():
                signal.signal(each, handler)

    def _request_stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stop_requests += 1
        if self.stop_requests == 1:
            say("asked to stop: the runs save; once more ends them at once")


def say(line: str) -> None:
    print(line, flush=True)


def find_end(run: Run, rows: Sequence[Row]) -> float | None:
    """The step at which a run has reached all that it is to stop at; None if it has not."""
    steps = [next((row["step"] for row in rows if metric.should_stop([row])), math.inf) for metric in run.stops]
    end = max(steps, default=math.inf)
    return end if math.isfinite(end) else None


def was_cut_off_at_its_end(run: Run) -> bool:
    """Whether a run was saved once it had reached all that it is to stop at: it is done, but no queue has seen it end."""
    end = find_end(run, read_rows(run.folder))
    if end is None:
        return False
    from flame.checkpoints.files import list_checkpoints  # imports torch, which takes seconds

    checkpoints = list_checkpoints(run.folder / CHECKPOINT_FOLDER)
    return bool(checkpoints) and int(checkpoints[-1].name.removeprefix("step-")) >= end


def build_trainer_command(run: Run) -> list[str]:
    """The trainer, under its launcher where a run has several processes."""
    words = ["-m", "flame.train", *run.spell_options()]
    if run.processes == 1:
        return [sys.executable, *words]
    launcher = ["-m", "flame.launch", "--nproc-per-node", str(run.processes), "--master-port", str(_find_free_port())]
    return [sys.executable, *launcher, *words]


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file until it is closed or this process ends; None if another process holds it."""
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        pass  # a file system without locks: the trainer's own lock warns
    return file


def _find_import_path() -> dict[str, str]:
    """So that the runs import this flame, and nothing from the folder they start in."""
    root = str(Path(flame.__file__).parents[1])
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{root}:{before}" if before else root, "PYTHONSAFEPATH": "1"}


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """In the new process: get SIGTERM, and so save and end, when the queue dies, even if it is killed."""
    _LIBC.prctl(PARENT_DEATH, signal.SIGTERM)
