"""Requests to stop: STOP_SIGNALS, which schedulers send before they take a machine away.

After the first signal, the run saves at the end of the step and ends with PREEMPTED_EXIT_CODE. A second one ends the process at
once with 128 + its number. Then all work since the last checkpoint is lost.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# EX_TEMPFAIL of sysexits.h: the same command continues the run.
PREEMPTED_EXIT_CODE = 75

# Environment variable of the workers: process id of `flame.launch`.
LAUNCHER_PID = "FLAME_LAUNCHER_PID"

# A worker may get one request twice: from a scheduler that signals all processes of a job, and from the launcher.
SAME_REQUEST_SECONDS = 1.0
LOOK_SECONDS = 1.0


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block Ctrl-C and STOP_SIGNALS. Processes started inside never get them; this process gets them after the block."""
    resource_tracker.ensure_running()  # if it started inside, it would unblock the signals
    before = block_signals()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def block_signals() -> set[signal.Signals]:
    """Block Ctrl-C and STOP_SIGNALS in this thread, and return what was blocked before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *STOP_SIGNALS))  # type: ignore[return-value]


class SignalThread:
    """Handles STOP_SIGNALS in a separate thread, so that they work even while the main thread is inside a C function.

    Started and closed in the main thread. Meanwhile, processes must be spawned and not forked: a forked one would write its
    signals to this process.
    """

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stop-signals", daemon=True)

    def note(self, stop: signal.Signals) -> None:
        """Called in the main thread before its next Python statement."""

    def act(self, stops: list[signal.Signals]) -> None:
        """Called at once in the thread, with the signals since the last call: at least one, oldest first."""

    def look(self) -> None:
        """Called in the thread at its start, and then at least every LOOK_SECONDS, unless `act` takes longer."""

    def start(self) -> None:
        assert threading.current_thread() is threading.main_thread()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {stop: signal.signal(stop, self._handle) for stop in STOP_SIGNALS}
        self._thread.start()

    def close(self) -> None:
        """Restore the previous handlers and end the thread."""
        for stop, handler in self._handlers_before.items():
            signal.signal(stop, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._closed.set()
        self._writing.send(b"\0")
        self._thread.join()
        self._reading.close()
        self._writing.close()

    def ignore_for(self, seconds: float) -> None:
        """For use in `act`: ignore the signals that come within this time."""
        self._closed.wait(seconds)
        self._receive(0.0)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.note(signal.Signals(number))

    def _run(self) -> None:
        while not self._closed.is_set():
            self.look()
            if stops := self._receive(LOOK_SECONDS):
                self.act(stops)

    def _receive(self, seconds: float) -> list[signal.Signals]:
        """Return the signals since the last call. Waits for at most this time if there are none."""
        self._reading.settimeout(seconds)
        try:
            numbers = self._reading.recv(4096)
        except (TimeoutError, BlockingIOError):
            return []
        return [signal.Signals(number) for number in numbers if number in STOP_SIGNALS]


class StopListener(SignalThread):
    """Notes that a training process should stop. A context manager, entered and left in the main thread.

    The second request ends the process at once with 128 + the signal's number. If the launcher dies, the process ends with 1:
    otherwise it would keep writing to the folder of a run that may have been resumed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._requested: str | None = None
        self._asked = False
        self._launcher = _find_launcher()

    @property
    def requested(self) -> str | None:
        """Name of the first signal, such as "SIGTERM"; None if there was none."""
        return self._requested

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        self.close()

    def note(self, stop: signal.Signals) -> None:
        self._requested = self._requested or stop.name

    def act(self, stops: list[signal.Signals]) -> None:
        if self._asked:
            os._exit(128 + stops[0])
        self._asked = True
        self.ignore_for(SAME_REQUEST_SECONDS)

    def look(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            os._exit(1)


def _find_launcher() -> int | None:
    """Process id of the launcher; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # Not always the current parent: the launcher may have died while this process was importing modules.
    return int(os.environ.get(LAUNCHER_PID, os.getppid()))
