"""What this project changes in torchrun: how it ends the workers of this machine, and when it starts them again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed import launcher
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from flame.runtime.endings import ABORTS, LOST_EXIT_CODE

SETTLE_SECONDS = 5.0
"""After the first worker that waited in vain, the others get this long to end by the same timeout. What is left is silent."""
END_SECONDS = 5
"""How long the other workers of a failed one get to end."""
STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "in an uninterruptible wait, for a disk or a driver"}
"""By their letter in /proc/PID/stat."""


class Workers:
    """Watches how torchrun's workers end. A context manager, inside which torchrun runs.

    Args:
        may_restart: told the failures of workers, by rank, and the restarts that are left. Returns whether starting them again
            can help.
        is_request: whether an exit code means a worker that has stopped on request. Then the others get time to save.
    """

    def __init__(self, may_restart: Callable[[dict[int, ProcessFailure], int], bool], is_request: Callable[[int], bool]):
        self._may_restart, self._is_request = may_restart, is_request
        self._context: SubprocessContext | None = None
        self.ended: dict[int, int] = {}
        """Exit codes by local rank, first to last, of the workers that failed by themselves."""
        self.silent: dict[int, str] = {}
        """What the workers are at, by local rank, that did not end though another one waited for them until its timeout."""
        self.ranks: dict[int, int] = {}
        """Ranks of the run by local rank."""
        self.is_given_up = False

    @contextmanager
    def under_torchrun(self) -> Iterator[None]:
        """Let torchrun use this object. Inside, it runs once."""
        watching, close = self, SubprocessContext.close

        class Agent(LocalElasticAgent):
            def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
                watching._context = self._pcontext  # type: ignore[assignment]
                watching.ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
                result = super()._monitor_workers(worker_group)
                if result.state == WorkerState.FAILED and not watching._starts_again(result.failures, self._remaining_restarts):
                    self._remaining_restarts = 0
                return result

        def close_soon(context: SubprocessContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            if death_sig is None and watching._settle(context):
                timeout = END_SECONDS
            close(context, death_sig, timeout)

        agent_before = launcher.api.LocalElasticAgent
        launcher.api.LocalElasticAgent = Agent  # type: ignore[misc]
        SubprocessContext.close = close_soon  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            launcher.api.LocalElasticAgent = agent_before  # type: ignore[misc]
            SubprocessContext.close = close  # type: ignore[method-assign]

    def give_up(self) -> None:
        """Kill the workers, and do not start them again. May be called in any thread."""
        self._note_ended()
        self.is_given_up = True
        self._kill(list(self._processes))

    def find_silent(self) -> dict[int, str]:
        """Of the running workers those that are stopped or hang; all of them if none is seen to be. By local rank."""
        return self.find_held() or dict.fromkeys(self._running, "it runs, but has not come to where the others wait")

    def find_held(self) -> dict[int, str]:
        """Of the running workers those that are seen to be stopped or to hang, and how. By local rank."""
        states = {rank: _read_state(process.pid) for rank, process in self._running.items()}
        return {rank: STATES[state] for rank, state in states.items() if state in STATES}

    def _starts_again(self, failures: dict[int, ProcessFailure], restarts_left: int) -> bool:
        starts_again = not self.is_given_up and restarts_left > 0 and self._may_restart(failures, restarts_left)
        if starts_again:
            self.ended.clear()
            self.silent.clear()
        return starts_again

    def _settle(self, context: SubprocessContext) -> bool:
        """Before torchrun ends the rest: note who has failed by itself, and who is silent. Returns whether one has failed."""
        self._context = context
        self._note_ended()
        failed = [code for code in self.ended.values() if not self._is_request(code)]
        if not failed:
            return False
        if set(failed) <= {LOST_EXIT_CODE, *(-number for number in ABORTS)}:
            deadline = time.monotonic() + SETTLE_SECONDS
            while time.monotonic() < deadline and self._running:
                time.sleep(0.1)
                self._note_ended()
            self.silent = self.find_silent() if LOST_EXIT_CODE in failed else self.find_held()
            self._kill(list(self.silent))
        return True

    def _note_ended(self) -> None:
        if self.is_given_up:
            return
        for rank, process in self._processes.items():
            if process.poll() not in (None, 0):
                self.ended.setdefault(rank, process.returncode)

    def _kill(self, local_ranks: list[int]) -> None:
        for rank in local_ranks:
            with suppress(ProcessLookupError):
                self._processes[rank].kill()

    @property
    def _processes(self) -> dict[int, Any]:
        handlers = self._context.subprocess_handlers if self._context is not None else {}
        return {rank: handler.proc for rank, handler in handlers.items()}

    @property
    def _running(self) -> dict[int, Any]:
        return {rank: process for rank, process in self._processes.items() if process.poll() is None}


def _read_state(pid: int) -> str:
    """The letter of a process's state; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
