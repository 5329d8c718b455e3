"""torchrun for `flame.train`: `python -m flame.launch [torchrun options] -m flame.train [options of the run]`.

Beyond torchrun, it reads the run's options before any worker starts, so that a mistake is one line and costs no start-up; and
it ends with the worker's own exit code, and says nothing of a worker that met the user's mistake but what the mistake is.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flame.config_reader import read_config
from flame.errors import UserError

# Reports which worker failed and which ones are stopped for it.
WORKER_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def main(argv: list[str]) -> int:
    """Check the run's options, then run torchrun.

    Args:
        argv: torchrun's options, `-m`, the module to run, and the module's arguments.

    Returns:
        The exit code: 0, `UserError.EXIT_CODE`, the first failed worker's own, or 128 + the signal that ended that worker.
    """
    try:
        torchrun_options, job_options = _split_arguments(argv)
        read_config(job_options, _count_processes(torchrun_options))
    except UserError as error:
        print(error, file=sys.stderr)
        return UserError.EXIT_CODE
    return _run_workers(argv)


def _split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate torchrun's options from those of the module after `-m`."""
    if "-m" not in argv[:-1]:
        raise UserError("no module to run: usage is python -m flame.launch [torchrun options] -m flame.train [options]")
    split = argv.index("-m")
    return argv[:split], argv[split + 2 :]


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
    # Words such as "gpu" ask about the machine, which takes the slow import of torch.
    from torch.distributed.run import determine_local_world_size

    try:
        count = determine_local_world_size(nproc_per_node)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"--nproc-per-node = {nproc_per_node}: allowed is an integer > 0, or cpu, gpu, auto where there are any")
    return count


def _run_workers(argv: list[str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with _hold_log() as held:
        try:
            torchrun.run(torchrun.parse_args(argv))
            return 0
        except ChildFailedError as error:
            failed = error
            # A worker that met the user's mistake decides, also when another, cut off by its end, is seen first.
            mistaken = [failure for failure in failed.failures.values() if failure.exitcode == UserError.EXIT_CODE]
            if mistaken:
                held.clear()
                for lines in dict.fromkeys(read_mistake(failure.error_file_data) for failure in mistaken):
                    print(lines, end="", file=sys.stderr)
                return UserError.EXIT_CODE
    print(failed, file=sys.stderr)
    exit_code = failed.get_first_failure()[1].exitcode
    return exit_code if exit_code > 0 else 128 - exit_code


def report_mistake(error: UserError) -> None:
    """Called by a worker that is about to end with `UserError.EXIT_CODE`: leave the lines to the launcher.

    The workers' output is shown for some ranks only, and all of them may have met the same mistake. Without torchrun the lines
    are printed here.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    else:
        print(error, file=sys.stderr)


def read_mistake(error_data: dict[str, Any]) -> str:
    """The lines that a worker left with `report_mistake`, each with its line end; empty if it left none."""
    message = error_data.get("message")
    return message["message"].removeprefix("UserError: ") + "\n" if isinstance(message, dict) else ""


@contextmanager
def _hold_log() -> Iterator[list[logging.LogRecord]]:
    """Keep back what torchrun logs about its workers; log at the end what is still in the list."""
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
