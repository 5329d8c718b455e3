"""torchrun for `flame.train`: `python -m flame.launch [torchrun options] -m flame.train [options of the run]`.

It adds three things to torchrun:

- It checks the run's options before any worker starts, so that mistakes show at once, one line each.
- If workers end by a mistake of the user or a known fault of the machine, it prints its line and no report.
- On SIGTERM or SIGUSR1, from a scheduler, it lets the workers save and end. torchrun would kill them.

Exit codes:

    0          the run is complete
    1          a fault of the machine in one line on stderr; or a fault of the program, with its report
    2          the user's mistake, one line each on stderr
    75         stopped by SIGTERM or SIGUSR1 with nothing lost: the same command continues
    128 + n    ended by signal n: by the second SIGTERM or SIGUSR1, by one that came before any worker, or by another signal
    any other  the exit code of the first failed worker, with its report
"""

from __future__ import annotations

if __name__ == "__main__":
    from flame.runtime.interrupt import end_on_interrupt

    end_on_interrupt()

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

from flame.errors import MachineFault, UserError
from flame.runtime.clash import find_clash
from flame.runtime.signals import LAUNCHER_PID, PREEMPTED_EXIT_CODE, STOP_SIGNALS, SignalThread

try:
    from flame.trainer.options import read_options
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f'PYTHON = {sys.executable} (environment): has no package "{error.name}": run pip install -r '
        f"{Path(__file__).parents[1] / 'requirements.txt'} for it, or name an interpreter that has them all",
        file=sys.stderr,
    )
    sys.exit(UserError.EXIT_CODE)

# torchrun's logger about failed and stopped workers.
WORKER_LOGGER = "torch.distributed.elastic.multiprocessing.api"
# Signals on which torchrun stops the workers and ends with a traceback.
TORCHRUN_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"


def main(argv: list[str]) -> int:
    """Check the run's options, then run torchrun.

    Args:
        argv: torchrun's options, `-m`, the module to run, and the module's arguments.

    Returns:
        The exit code, as in the table above. A stop signal before there are workers ends this process at once with 128 + its
        number.
    """
    if clash := find_clash():
        print(clash, file=sys.stderr)
    try:
        torchrun_options, module, job_options = _split_arguments(argv)
        read_options(job_options, _count_processes(torchrun_options))
    except UserError as error:
        print(error, file=sys.stderr)
        return UserError.EXIT_CODE
    return _run_workers(argv, module)


def _split_arguments(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Separate torchrun's options, the module after `-m`, and the module's options."""
    if "-m" not in argv[:-1]:
        raise UserError("no module to run: usage is python -m flame.launch [torchrun options] -m flame.train [options]")
    split = argv.index("-m")
    return argv[:split], argv[split + 1], argv[split + 2 :]


def _count_processes(torchrun_options: list[str]) -> int:
    """Count the processes over all nodes, from `--nnodes` and `--nproc-per-node` as torchrun reads them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nnodes", default=os.environ.get("PET_NNODES", "1"))
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default=os.environ.get("PET_NPROC_PER_NODE", "1"))
    options, _ = parser.parse_known_args(torchrun_options)
    nodes = options.nnodes.partition(":")[0]
    if not (nodes.isdecimal() and int(nodes) > 0):
        raise UserError(f"--nnodes = {options.nnodes}: allowed is an integer > 0, or MIN:MAX")
    return int(nodes) * _count_local_processes(options.nproc_per_node)


def _count_local_processes(nproc_per_node: str) -> int:
    if nproc_per_node.isdecimal() and int(nproc_per_node) > 0:
        return int(nproc_per_node)
    # Words such as "gpu" depend on the machine, and need the slow import of torch.
    from torch.distributed.run import determine_local_world_size

    try:
        count = determine_local_world_size(nproc_per_node)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"--nproc-per-node = {nproc_per_node}: allowed is an integer > 0, or cpu, gpu, auto where there are any")
    return count


def _run_workers(argv: list[str], module: str) -> int:
    os.environ[LAUNCHER_PID] = str(os.getpid())
    forwarder = _SignalForwarder(module)
    forwarder.start()
    try:
        return _run_torchrun(argv, forwarder)
    finally:
        # The exit code is known; a late signal must not change it.
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_IGN)


class _SignalForwarder(SignalThread):
    """Passes STOP_SIGNALS on to the workers. Before there are workers, a signal ends this process."""

    def __init__(self, module: str):
        super().__init__()
        self._module = module
        self.forwarded: set[int] = set()

    def act(self, stops: list[signal.Signals]) -> None:
        workers = _find_workers(self._module)
        if not workers and not self.forwarded:
            os._exit(128 + stops[0])
        self.forwarded.update(stops)  # before the kill: a worker that dies of it ends torchrun in the main thread
        for stop in stops:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, stop)


def _find_workers(module: str) -> list[int]:
    """Children of this process that run the module, including ended ones that were not waited for yet."""
    states = {path: _read_if_there(path) for path in glob("/proc/[0-9]*/stat")}
    children = [path.split("/")[2] for path, state in states.items() if _find_parent(state) == os.getpid()]
    commands = {int(pid): _read_if_there(f"/proc/{pid}/cmdline") for pid in children}
    # A process that has ended has no command line.
    return [pid for pid, command in commands.items() if not command or f"\0-m\0{module}\0".encode() in command]


def _find_parent(state: bytes) -> int | None:
    """The parent's process id in a line of /proc/PID/stat. The program's name in it may contain spaces and brackets."""
    fields = state.rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _read_if_there(path: str) -> bytes:
    """Content of a file of /proc; empty if its process is gone."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _run_torchrun(argv: list[str], forwarder: _SignalForwarder) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = torchrun.parse_args(argv)
    options.signals_to_handle = TORCHRUN_SIGNALS
    with _hold_log() as held:
        try:
            torchrun.run(options)
            return 0
        except SignalException as error:
            held.clear()
            return 128 + error.sigval
        except ChildFailedError as error:
            failed = error
            # A worker with a user's mistake decides, even if another one, which failed because of it, is seen first.
            for kind in (UserError, MachineFault):
                data = [each.error_file_data for each in failed.failures.values() if each.exitcode == kind.EXIT_CODE]
                told = dict.fromkeys(filter(None, (read_mistake(each, kind) for each in data)))
                if told or (data and kind is UserError):
                    held.clear()
                    print(*told, sep="", end="", file=sys.stderr)
                    return kind.EXIT_CODE
            stopped = _find_stop_code([failure.exitcode for failure in failed.failures.values()], forwarder.forwarded)
            if stopped is not None:
                held.clear()
                return stopped
    print(failed, file=sys.stderr)
    exit_code = failed.get_first_failure()[1].exitcode
    return exit_code if exit_code > 0 else 128 - exit_code


def _find_stop_code(exit_codes: list[int], forwarded: set[int]) -> int | None:
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


def report_mistake(error: UserError) -> None:
    """Pass the lines of an error to the launcher. Called by a worker before it ends with the error's `EXIT_CODE`.

    The launcher prints them once: all workers may have the same mistake, and the output of some is not shown. Without torchrun
    the lines are printed here.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    else:
        print(error, file=sys.stderr)


def read_mistake(error_data: dict[str, Any], kind: type[UserError] = UserError) -> str:
    """The lines that a worker passed to `report_mistake`, each with its line end; empty if there are none of this kind."""
    message = error_data.get("message")
    prefix = f"{kind.__name__}: "
    text = message["message"] if isinstance(message, dict) else ""
    return text.removeprefix(prefix) + "\n" if text.startswith(prefix) else ""


@contextmanager
def _hold_log() -> Iterator[list[logging.LogRecord]]:
    """Hold back torchrun's log records about its workers. Those still in the list are logged at the end."""
    logger = logging.getLogger(WORKER_LOGGER)
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield held
    finally:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
