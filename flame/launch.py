"""torchrun for `flame.train`: `python -m flame.launch [torchrun options] -m flame.train [options of the run]`.

It adds four things to torchrun:

- It checks the run's options before any worker starts, so that mistakes show at once, one line each.
- If workers fail, it prints why and no report: the user's mistake, or which rank ended or is silent, and on which machine.
- On SIGTERM or SIGUSR1, from a scheduler, it lets the workers save and end. torchrun would kill them.
- The machines of a run meet, say for whom they wait, and tell each other how they end (`flame.runtime.machines`).

Exit codes:

    0          the run is complete
    1          a fault of the machine in one line on stderr; or a fault of the program, with its report
    2          the user's mistake, one line each on stderr
    75         stopped by SIGTERM or SIGUSR1 with nothing lost: the same command continues
    128 + n    ended by signal n: by the second SIGTERM or SIGUSR1, by one that came before any worker, or by another signal
    69         another rank or machine has ended, is silent or did not come: the same command continues
    any other  the exit code of the first failed worker, with its traceback and a line that names it
"""

from __future__ import annotations

if __name__ == "__main__":
    from flame.runtime.interrupt import end_on_interrupt

    end_on_interrupt()

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from flame.errors import UserError
from flame.runtime.clash import find_clash
from flame.runtime.rendezvous import Place, read_place
from flame.runtime.signals import LAUNCHER_PID, STOP_SIGNALS, SignalThread

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

try:
    from flame.trainer.options import read_options
    from flame.trainer.saved import describe_saved
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f'PYTHON = {sys.executable} (environment): has no package "{error.name}": run pip install -r '
        f"{Path(__file__).parents[1] / 'requirements.txt'} for it, or name an interpreter that has them all",
        file=sys.stderr,
    )
    sys.exit(UserError.EXIT_CODE)


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
    place = None
    try:
        torchrun_options, module, job_options = _split_arguments(argv)
        place = read_place(torchrun_options)
        config = _read_options(job_options, place)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        if place is not None and place.meets_others:
            _quieten_torch()
            from flame.runtime.machines import tell_mistake

            tell_mistake(place, error)
        return UserError.EXIT_CODE
    os.environ[LAUNCHER_PID] = str(os.getpid())
    forwarder = _SignalForwarder(module)
    forwarder.start()
    try:
        _quieten_torch()
        from flame.runtime.launching import Launching  # it takes seconds to import

        timeout = config.comm.timeout_seconds
        return Launching(argv, place, timeout, forwarder.forwarded, partial(describe_saved, config)).run()
    finally:
        # The exit code is known; a late signal must not change it.
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_IGN)


def _quieten_torch() -> None:
    """Import torch so that this process does not warn, with a list of C++ frames, of each connection that another closes."""
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # read when torch is imported
        import torch  # noqa: F401

        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the workers may warn


def _split_arguments(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Separate torchrun's options, the module after `-m`, and the module's options."""
    if "-m" not in argv[:-1]:
        raise UserError("no module to run: usage is python -m flame.launch [torchrun options] -m flame.train [options]")
    split = argv.index("-m")
    return argv[:split], argv[split + 1], argv[split + 2 :]


def _read_options(job_options: list[str], place: Place) -> JobConfig:
    """Check the options for each number of machines that the run may have.

    Raises:
        UserError: they are wrong, or wrong on so many machines.
    """
    config = read_options(job_options, place.fewest * place.processes)
    for count in range(place.fewest + 1, place.most + 1):
        try:
            read_options(job_options, count * place.processes)
        except UserError as error:
            raise UserError(
                *(f"with {count} of NNODES = {place.fewest}:{place.most} machines: {line}" for line in error.lines)
            ) from None
    return config


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


def report_mistake(error: Exception) -> None:
    """Pass the lines of an error to the launcher. Called by a worker before it ends.

    The launcher prints them once: all workers may have the same mistake, and the output of some is not shown. Without torchrun
    the lines are printed here.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    else:
        print(error, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
