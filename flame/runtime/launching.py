"""Runs torchrun on this machine, and makes of its outcome an exit code and the line that says why."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import DistError, TCPStore
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from flame.errors import MachineFault, UserError
from flame.runtime.endings import LOST_EXIT_CODE, Ending, Kind, WorkerEnd, find_ending
from flame.runtime.machines import Machines, MachinesLost, Watch, retell
from flame.runtime.network import GLOO_INTERFACE, listen_on_loopback
from flame.runtime.rendezvous import Place, set_rendezvous
from flame.runtime.signals import PREEMPTED_EXIT_CODE
from flame.runtime.torchrun import SETTLE_SECONDS, Workers

TORCHRUN_LOGGERS = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")
# How long the workers of this machine get to end by a mistake that all ranks have met together.
OWN_MISTAKE_SECONDS = 2.0
# Signals on which torchrun stops the workers and ends with a traceback.
TORCHRUN_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"


class Launching:
    """The workers of this machine from their start to their end.

    Args:
        argv: torchrun's options, module, and the module's arguments.
        timeout: `comm.timeout_seconds`.
        forwarded: stop signals that have been passed on to the workers; it grows while they run.
        describe_saved: what the run has saved, and what the same command does.
    """

    def __init__(self, argv: list[str], place: Place, timeout: int, forwarded: set[int], describe_saved: Callable[[], str]):
        self._options = torchrun.parse_args(argv)
        self._options.signals_to_handle = TORCHRUN_SIGNALS
        self._place, self._timeout = place, timeout
        self._forwarded, self._describe_saved = forwarded, describe_saved
        self._host = socket.gethostname()
        self._workers = Workers(self._may_restart, self._is_request)
        self._machines: Machines | None = None
        self._watch: Watch | None = None
        self._server: TCPStore | None = None

    def run(self) -> int:
        """Run torchrun, and say why it failed.

        Returns:
            the exit code, as in `flame.launch`.
        """
        code = self._run()
        if self._watch is not None and not self._watch.close():
            sys.stderr.flush()
            os._exit(code)
        return code

    def _run(self) -> int:
        try:
            self._meet()
        except UserError as error:
            print(error, file=sys.stderr)
            return UserError.EXIT_CODE
        except MachinesLost as error:
            return self._report(error.ending, is_saved_told=False)
        with _hold_logs() as held, self._workers.under_torchrun():
            try:
                torchrun.run(self._options)
                held.clear()  # of workers that were started again
                return 0
            except SignalException as error:
                held.clear()
                return 128 + error.sigval
            except ChildFailedError as error:
                held.clear()
                ending = self._find_ending(error.failures)
            except (RendezvousError, DistError) as error:
                if not self._place.meets_others:
                    raise
                held.clear()
                line = f"machine {self._place.number} ({self._host}) has lost the others: {_shorten(error)}"
                ending = Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, [line])
        return self._report(self._agree(ending))

    def _meet(self) -> None:
        """Wait for the other machines, and tell torchrun where the processes meet."""
        place = self._place
        if place.meets_others:
            self._machines = Machines(place, self._timeout)
            self._machines.meet()
            set_rendezvous(self._options, place, self._machines.address, self._timeout)
            self._watch = self._machines.watch(self._end_with)
        elif place.is_ours:
            descriptor, port = listen_on_loopback()
            # torchrun finds this server by its port. One of its own would listen on all interfaces.
            self._server = TCPStore("127.0.0.1", port, is_master=True, multi_tenant=True, master_listen_fd=descriptor)
            os.environ.setdefault(GLOO_INTERFACE, "lo")
            set_rendezvous(self._options, place._replace(host="127.0.0.1", port=port), "127.0.0.1", self._timeout)

    def _end_with(self, other: Ending) -> None:
        """End the workers of this machine after those of another have ended. Called in a thread of its own, for it may wait."""
        if other.kind == Kind.STOPPED:
            return
        if self._place.is_elastic and other.kind != Kind.MISTAKE:
            print(f"machine {other.machine} has left: {' '.join(other.lines)}", file=sys.stderr, flush=True)
            return
        if other.kind in (Kind.SUSPECT, Kind.CONSEQUENCE):
            time.sleep(SETTLE_SECONDS)  # those that wait for the same rank end by the same timeout
            find = self._workers.find_silent if other.is_timeout else self._workers.find_held
            self._workers.silent.update(find())
        elif other.kind == Kind.MISTAKE:
            time.sleep(OWN_MISTAKE_SECONDS)
        self._workers.give_up()

    def _is_request(self, exit_code: int) -> bool:
        """Whether a worker's exit code is that of one that has stopped on request."""
        return exit_code == PREEMPTED_EXIT_CODE or -exit_code in self._forwarded or exit_code - 128 in self._forwarded

    def _may_restart(self, failures: dict[int, ProcessFailure], restarts_left: int) -> bool:
        if any(failure.exitcode == UserError.EXIT_CODE or self._is_request(failure.exitcode) for failure in failures.values()):
            return False
        most = self._options.max_restarts
        line = f"{self._find_ending(failures).lines[0]}; starting again, restart {most - restarts_left + 1} of {most}"
        print(line, file=sys.stderr, flush=True)
        return True

    def _find_ending(self, failures: dict[int, ProcessFailure]) -> Ending:
        """How the workers of this machine have ended.

        Args:
            failures: by rank, as torchrun lists them.
        """
        # A worker with a user's mistake decides, even if another one, which failed because of it, is seen first.
        for error in (UserError, MachineFault):
            told = [each.error_file_data for each in failures.values() if each.exitcode == error.EXIT_CODE]
            lines = list(dict.fromkeys(line for data in told for line in read_lines(data, error)))
            if lines or (told and error is UserError):
                return Ending(Kind.MISTAKE, error.EXIT_CODE, lines)
        stopped = find_stop_code([failure.exitcode for failure in failures.values()], self._forwarded)
        if stopped is not None:
            return Ending(Kind.STOPPED, stopped, [])
        ranks = self._workers.ranks
        shown = {int(rank) for rank in (self._options.local_ranks_filter or "").split(",") if rank} or set(ranks)
        ended = [
            WorkerEnd(
                rank=ranks[local_rank],
                exit_code=code,
                message=read_message(failures[ranks[local_rank]].error_file_data),
                trace=_read_trace(failures[ranks[local_rank]].error_file_data),
                is_shown=local_rank in shown,
            )
            for local_rank, code in self._workers.ended.items()
            if ranks[local_rank] in failures
        ]
        silent = {ranks[local_rank]: state for local_rank, state in self._workers.silent.items()}
        if not ended and not silent:
            return Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, [f"the workers on {self._host} were ended"])
        return find_ending(ended, silent, self._host)

    def _agree(self, ending: Ending) -> Ending:
        """Exchange endings with the other machines, and return the one to print."""
        if self._watch is None:
            return ending
        watch = self._watch
        watch.tell(ending)
        gone: list[int] = []
        # In an elastic run the other machines go on, and none tells what may have led to an abort.
        if ending.kind == Kind.CONSEQUENCE or (ending.kind == Kind.SUSPECT and not self._place.is_elastic):
            watch.wait_for(
                lambda watch: not watch.missing or any(each.kind != Kind.SUSPECT for each in watch.list_causes(ending))
            )
            # A machine that says nothing is a likelier cause than a rank that may have been aborted because of it.
            if causes := [each for each in watch.list_causes(ending) if each.kind != Kind.SUSPECT or not watch.missing]:
                ending = retell(causes[0])
            elif gone := ([0] if watch.is_store_lost and self._place.number else watch.missing):
                hosts = self._machines.hosts if self._machines is not None else {}
                names = ", ".join(f"machine {number} ({hosts.get(number, 'unknown')})" for number in gone)
                line = f"{names} has ended without a word, or cannot be reached: {ending.lines[0]}"
                ending = Ending(Kind.CONSEQUENCE, LOST_EXIT_CODE, [line])
        if self._place.number == 0 and not gone:  # the store goes with this process
            watch.wait_for(lambda watch: not watch.missing and watch.is_heard)
        watch.wait_for(lambda watch: watch.is_told)
        return ending

    def _report(self, ending: Ending, is_saved_told: bool = True) -> int:
        """Print an ending, and return its exit code."""
        if ending.trace:
            print(ending.trace, file=sys.stderr)
        for line in ending.lines:
            is_told = is_saved_told and ending.kind not in (Kind.MISTAKE, Kind.STOPPED)
            print(f"{line}; {self._describe_saved()}" if is_told else line, file=sys.stderr)
        return ending.exit_code


def find_stop_code(exit_codes: list[int], forwarded: set[int]) -> int | None:
    """The exit code if the workers were stopped on request; None if they failed.

    Args:
        exit_codes: of the failed workers, as torchrun lists them. The first ended by itself. torchrun may have stopped the later
            ones, which they treat as a request to stop.
        forwarded: stop signals passed on to the workers.
    """
    first = exit_codes[0]
    if first == PREEMPTED_EXIT_CODE or (forwarded and PREEMPTED_EXIT_CODE in exit_codes):
        return PREEMPTED_EXIT_CODE
    if -first in forwarded:  # the worker did not handle signals yet, so it had done nothing
        return PREEMPTED_EXIT_CODE
    return first if first - 128 in forwarded else None


def read_lines(error_data: dict[str, Any], kind: type[UserError]) -> list[str]:
    """The lines that a worker has passed on of an error of one kind; none if it has ended by another."""
    message, name = error_data.get("message"), f"{kind.__name__}: "
    text = str(message["message"]) if isinstance(message, dict) else ""
    return text.removeprefix(name).splitlines() if text.startswith(name) else []


def read_message(error_data: dict[str, Any]) -> str:
    """What a worker passed on before it ended, such as "ValueError: wrong"."""
    message = error_data.get("message")
    return str(message["message"]) if isinstance(message, dict) else ""


def _read_trace(error_data: dict[str, Any]) -> str:
    message = error_data.get("message")
    return str(message.get("extraInfo", {}).get("py_callstack", "")).rstrip() if isinstance(message, dict) else ""


def _shorten(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def _hold_logs() -> Iterator[list[logging.LogRecord]]:
    """Hold back torchrun's log records. Those still in the list are logged at the end."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    names = [name for name in logging.root.manager.loggerDict if name.startswith(TORCHRUN_LOGGERS)]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(hold)
    try:
        yield held
    finally:
        for logger in loggers:
            logger.removeFilter(hold)
        for record in held:
            logging.getLogger(record.name).handle(record)
