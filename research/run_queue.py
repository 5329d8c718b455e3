"""Many runs of the trainer, a few at a time on each GPU, each ended early once it has shown what it is run for.

Runs of one slot share a process: what is imported and compiled once serves all of them.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import NamedTuple

import torch
import torch.distributed as dist

from flame.checkpoints.resume import flatten
from flame.config.parse import CONFIG_FILE as CONFIG_KEY
from flame.errors import UserError
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options
from research.run_folder import CONFIG_FILE, ENDED_FILE, Row, list_ended, list_unended, read_validations

REPO = Path(__file__).parent.parent
LOG_FILE = "log"
FAILED = "failed"
SECONDS_BETWEEN_LOOKS = 1.0
SEEDS = range(1, 6)
MOST_GRAPHS = 256
"""That a process compiles of one layer. Each shape adds its own; beyond torch's default of 8 it would go on uncompiled."""


class Run(NamedTuple):
    """One run, in the folder `name` of the results. It is sent to another process, so `is_done` is a function of a module."""

    name: str
    options: dict[str, object]
    is_done: Callable[[list[Row]], bool]
    """Asked with the validations so far, oldest first; once true, the run is ended."""

    def spell_options(self) -> list[str]:
        """As arguments of the trainer."""
        values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in self.options.items()}
        return [text for key, value in values.items() for text in (f"--{key}", value)]


def run_command(
    description: str,
    list_runs: Callable[[argparse.Namespace], list[Run]],
    write_report: Callable[[Path, Path], None],
    pattern: str,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda _: None,
) -> None:
    """The command line `run OUT` and `report RUNS OUT` of an experiment.

    Args:
        list_runs: from the arguments of `run`, among them `seeds`.
        write_report: from a folder of runs into a folder.
        pattern: glob of folders in it, of which one at least must have ended for a report.
        add_options: to `run`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path, help="folder of the runs")
    run.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 1 to 5")
    run.add_argument("--per_gpu", type=int, default=1, help="runs at the same time, on each GPU or, without any, in all")
    run.add_argument("--seconds", type=float, default=float("inf"), help="end all runs after so many")
    add_options(run)
    report = commands.add_parser("report")
    report.add_argument("runs", type=Path, help="folder of the runs")
    report.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.command == "report":
        if not list_ended(arguments.runs, pattern):
            parser.error(
                f"{arguments.runs} holds no run that has ended ({pattern}/{ENDED_FILE}): make some with `run {arguments.runs}`"
            )
        for folder in list_unended(arguments.runs, "/".join("*" * len(Path(pattern).parts))):
            print(f"{folder}: not counted, it has not ended", file=sys.stderr)
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_report(arguments.runs, arguments.out)
    else:
        runs = list_runs(arguments)
        if not runs:
            parser.error("the options leave no run to make")
        others = [line for run in runs if (line := find_other_run(run, arguments.out))]
        if others:
            parser.error("\n".join(others))
        if not run_all(runs, arguments.out, arguments.per_gpu, arguments.seconds):
            sys.exit(1)


def never(_validations: list[Row]) -> bool:
    """`Run.is_done` of a run that makes all its steps."""
    return False


def find_other_run(run: Run, out: Path) -> str | None:
    """A line about the run that has this one's folder and other options, if there is one."""
    folder = out.absolute() / run.name
    if not (folder / CONFIG_FILE).exists():
        return None
    try:
        made = read_options(["--job.config_file", str(folder / CONFIG_FILE)], 1)
        wanted = read_options([*run.spell_options(), "--job.dump_folder", str(folder)], 1)
    except UserError as error:
        return str(error)
    before, now = (flatten(config.to_dict()) for config in (made, wanted))
    keys = [key for key in now if now[key] != before.get(key) and key not in (CONFIG_KEY, "job.dump_folder", "job.description")]
    changes = ", ".join(f"{key} = {before.get(key)} (now {now[key]})" for key in keys)
    return f"{out / run.name} holds a run with {changes}: give another folder, or remove it" if keys else None


def run_all(runs: Iterable[Run], out: Path, per_gpu: int, seconds: float) -> bool:
    """Make those runs that have not been made. One that was cut short goes on from its last checkpoint, or is begun again.
    Returns whether none has failed.

    Args:
        per_gpu: runs at the same time on one GPU; small models leave most of it idle. Without GPUs, at the same time.
        seconds: after so many, no run is begun, and those that are under way are ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting: Queue[Run] = context.Queue()
    for run in runs:
        if not (out / run.name / ENDED_FILE).exists():
            waiting.put(run)
    deadline = time.time() + seconds
    gpus = _list_gpus()
    workers = []
    for slot in (gpus or [""]) * per_gpu:
        os.environ |= {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {})  # read by what is spawned
        worker = context.Process(target=_work, args=(waiting, out.absolute(), deadline))
        worker.start()
        workers.append(worker)
    for worker in workers:
        worker.join()
    waiting.cancel_join_thread()
    return not any(worker.exitcode for worker in workers)


def _list_gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",") if allowed else [str(gpu) for gpu in range(torch.cuda.device_count())]


def _work(waiting: Queue[Run], out: Path, deadline: float) -> None:
    os.chdir(REPO)
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    num_failed = 0
    while not _is_over(deadline):
        try:
            run = waiting.get(timeout=5)
        except Empty:
            break
        started = time.time()
        outcome = _make(run, out / run.name, deadline)
        num_failed += outcome.startswith(FAILED)
        print(f"{run.name}: {outcome}, {time.time() - started:.0f} s", flush=True)
    sys.exit(num_failed > 0)


def _is_over(deadline: float) -> bool:
    """Whether time is up, or who has started this process is gone: it would keep its GPU busy for nobody."""
    parent = multiprocessing.parent_process()
    return time.time() > deadline or parent is None or not parent.is_alive()


def _make(run: Run, folder: Path, deadline: float) -> str:
    """Train, with the log in the run's folder. Returns how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = run.spell_options()
    looked = time.time()
    is_done = False

    def is_stop_requested() -> bool:
        nonlocal looked, is_done
        if not is_done and time.time() - looked > SECONDS_BETWEEN_LOOKS:
            looked = time.time()
            is_done = run.is_done(list(read_validations(folder)))
        return is_done or _is_over(deadline)

    set_single_process_defaults()
    with (folder / LOG_FILE).open("w") as log, _redirected(log.fileno()):
        try:
            is_finished = Trainer(read_options([*arguments, "--job.dump_folder", str(folder)], 1), is_stop_requested).train()
        except Exception:
            traceback.print_exc()
            return f"{FAILED}, see {folder / LOG_FILE}"
    is_done = run.is_done(list(read_validations(folder)))
    outcome = "done" if is_done else "out of steps" if is_finished else "out of time"
    if is_done or is_finished:
        (folder / ENDED_FILE).write_text(outcome + "\n")
    return outcome


@contextmanager
def _redirected(file: int) -> Iterator[None]:
    """Send all that this process writes, in Python or not, to a file; afterwards leave nothing of a run behind."""
    kept = [os.dup(stream) for stream in (1, 2)]
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, original in zip((1, 2), kept, strict=True):
            os.dup2(original, stream)
            os.close(original)
        if dist.is_initialized():  # a run that has failed
            dist.destroy_process_group()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
