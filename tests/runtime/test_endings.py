"""Which of several endings is the cause, and how it is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from flame.runtime import torchrun
from flame.runtime.endings import LOST_EXIT_CODE, Ending, Kind, WorkerEnd, find_ending, find_peer_failure
from flame.runtime.machines import retell
from flame.runtime.torchrun import Workers

LOST = WorkerEnd(0, LOST_EXIT_CODE, "PeerFailure: has lost its connection to another rank")
WAITED = WorkerEnd(0, LOST_EXIT_CODE, "PeerFailure: waited for another rank until comm.timeout_seconds")
KILLED = WorkerEnd(1, -signal.SIGKILL)
ABORTED = WorkerEnd(2, -signal.SIGABRT)
ABORT_LINE = "rank 2 on a was ended by SIGABRT (often torch, when a GPU fails or NCCL loses another rank: see the lines above)"
KILL_LINE = "rank 1 on a was ended by SIGKILL (often the kernel, when memory runs out: see dmesg)"


@pytest.mark.parametrize(
    ("workers", "silent", "kind", "code", "line"),
    [
        ([LOST, KILLED], {}, Kind.CAUSE, 137, KILL_LINE),
        ([WAITED], {1: "stopped by a signal"}, Kind.CAUSE, 69, "rank 1 on a is silent (stopped by a signal)"),
        ([ABORTED], {1: "stopped by a signal"}, Kind.CAUSE, 69, "rank 1 on a is silent (stopped by a signal)"),
        ([KILLED], {3: "it runs"}, Kind.CAUSE, 137, KILL_LINE),
        ([ABORTED], {}, Kind.SUSPECT, 134, ABORT_LINE),
        ([LOST, ABORTED], {}, Kind.SUSPECT, 134, ABORT_LINE),
        ([ABORTED, KILLED], {}, Kind.CAUSE, 137, KILL_LINE),
        ([LOST], {}, Kind.CONSEQUENCE, 69, "rank 0 on a has lost its connection to another rank"),
        ([WAITED], {}, Kind.CONSEQUENCE, 69, "rank 0 on a waited for another rank until comm.timeout_seconds"),
        ([LOST, WorkerEnd(3, 7)], {}, Kind.CAUSE, 7, "rank 3 on a ended with exit code 7"),
        ([WorkerEnd(3, 1, "ValueError: wrong")], {}, Kind.CAUSE, 1, "rank 3 on a failed: ValueError: wrong (traceback above)"),
        ([WorkerEnd(3, 1, "ValueError: w", is_shown=False)], {}, Kind.CAUSE, 1, "rank 3 on a failed: ValueError: w"),
    ],
)  # fmt: skip
def test_the_cause_is_said(workers: list[WorkerEnd], silent: dict[int, str], kind: Kind, code: int, line: str) -> None:
    ending = find_ending(workers, silent, "a")
    assert (ending.kind, ending.exit_code, ending.lines) == (kind, code, [line])
    assert ending.is_timeout == (workers == [WAITED] and not silent)
    assert Ending.from_json(ending.to_json()) == ending


def test_a_traceback_that_nobody_has_seen_is_kept() -> None:
    assert find_ending([WorkerEnd(3, 1, "ValueError: w", "Traceback", is_shown=False)], {}, "a").trace == "Traceback"
    assert find_ending([WorkerEnd(3, 1, "ValueError: w", "Traceback")], {}, "a").trace == ""


def test_another_machines_ending_is_a_loss_here() -> None:
    """A mistake stays one, and says where; a signal there is none here."""
    assert retell(Ending(Kind.CAUSE, 137, ["x"], 1, "b")).exit_code == LOST_EXIT_CODE
    mistake = retell(Ending(Kind.MISTAKE, 2, ["x = 1: wrong"], 1, "b"))
    assert (mistake.exit_code, mistake.lines) == (2, ["machine 1 (b): x = 1: wrong"])


def chain(outer: Exception, inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise outer from error
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:25523"), "has lost its connection"),
        (RuntimeError("[a/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 30000ms for send"), "waited for another"),
        (dist.DistNetworkError("The client socket has timed out after 30000ms"), "waited for another"),
        (dist.DistBackendError("NCCL error: remote process exited"), "has lost its connection"),
        (chain(ValueError("x"), dist.DistStoreError("wait timeout after 30000ms, keys: /x")), "waited for another"),
        (CheckpointException("save", {0: (RuntimeError("gloo/x: Connection reset by peer"), None)}), "has lost its connection"),  # type: ignore[dict-item]
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError("Connection closed by peer"), None),
        (ValueError("gloo/ timed out"), None),
    ],
)
def test_a_failure_of_another_rank_is_known_by_its_error(error: Exception, told: str | None) -> None:
    found = find_peer_failure(error)
    assert found is None if told is None else found is not None and found.startswith(told)


class Processes:
    """Stands for torchrun's context: children that sleep, and that end as asked."""

    def __init__(self, *commands: str):
        self.subprocess_handlers: dict[int, Any] = {
            rank: SimpleNamespace(proc=subprocess.Popen([sys.executable, "-c", f"import time, sys, os; {command}"]))
            for rank, command in enumerate(commands)
        }

    def __getitem__(self, rank: int) -> subprocess.Popen[bytes]:
        return self.subprocess_handlers[rank].proc

    def end(self) -> None:
        for handler in self.subprocess_handlers.values():
            handler.proc.kill()
            handler.proc.wait()


def settle(processes: Processes, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> tuple[bool, Workers]:
    monkeypatch.setattr(torchrun, "SETTLE_SECONDS", seconds)
    workers = Workers(lambda *_: False, lambda code: code == 75)
    return workers._settle(processes), workers  # type: ignore[arg-type]


def test_a_stopped_worker_is_the_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the third, which still runs."""
    processes = Processes(f"sys.exit({LOST_EXIT_CODE})", "time.sleep(60)", "time.sleep(60)")
    try:
        processes[1].send_signal(signal.SIGSTOP)
        processes[0].wait()
        failed, workers = settle(processes, monkeypatch)
        assert failed and workers.ended == {0: LOST_EXIT_CODE} and workers.silent == {1: "stopped by a signal"}
        assert processes[1].wait(10) == -signal.SIGKILL and processes[2].poll() is None
    finally:
        processes.end()


def test_a_worker_that_does_not_come_is_silent_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends by the same timeout, a moment later, is not."""
    late = f"time.sleep(0.5); sys.exit({LOST_EXIT_CODE})"
    processes = Processes(f"sys.exit({LOST_EXIT_CODE})", "time.sleep(60)", late)
    try:
        processes[0].wait()
        _, workers = settle(processes, monkeypatch, 3.0)
        assert set(workers.ended) == {0, 2} and set(workers.silent) == {1}
    finally:
        processes.end()


def test_workers_beside_a_killed_one_are_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("os.kill(os.getpid(), 9)", "time.sleep(60)")
    try:
        processes[0].wait()
        began = time.monotonic()
        failed, workers = settle(processes, monkeypatch, 30.0)
        assert failed and workers.ended == {0: -signal.SIGKILL} and not workers.silent and time.monotonic() - began < 30
    finally:
        processes.end()


def test_workers_that_stop_on_request_get_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("sys.exit(75)", "time.sleep(60)")
    try:
        processes[0].wait()
        assert settle(processes, monkeypatch)[0] is False
    finally:
        processes.end()
