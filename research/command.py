"""The command line of an experiment: `run` makes its runs with the queue of flame-compare, `report` compares them.

An experiment whose arms are not the same on every task, or that judges its runs by more than their metrics, is a Python file.
Others are files of flame-compare.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flame.compare.command import FAILED_EXIT_CODE
from flame.compare.devices import list_slots
from flame.compare.metrics import Metric
from flame.compare.outcomes import ENDED, FAILED, read_outcome
from flame.compare.queue import RunQueue
from flame.compare.report import write_report
from flame.compare.results import read_rows
from flame.compare.runs import RECORD_FILE, Run, check_folders, read_record, spell
from flame.compare.spec import Budget, Options, Spec
from flame.errors import UserError
from flame.runtime.signals import PREEMPTED_EXIT_CODE
from flame.trainer.options import read_options

REPO = Path(__file__).parent.parent
SEEDS = range(1, 6)
SEED = "seed-"


class Planned(NamedTuple):
    """A run of an experiment."""

    task: str
    arm: str
    seed: int
    options: Options
    """`training.steps` among them says how long it is."""
    stops: tuple[Metric, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/{SEED}{self.seed}"

    def build(self, out: Path) -> Run:
        """The run in its folder. The working directory must be the one that paths in its options are relative to.

        Raises:
            UserError: its options are wrong.
        """
        options = self.options | {"training.seed": self.seed}
        training = read_options(spell(options), 1).training
        tokens = training.steps * training.seq_len * training.gradient_accumulation_steps
        kept = {key: value for key, value in options.items() if key != "training.steps"}
        return Run(self.task, self.arm, self.seed, out / self.name, kept, Budget("tokens", tokens), self.stops)


def run_command(
    description: str,
    list_runs: Callable[[argparse.Namespace], list[Planned]],
    report: Callable[[Path, Path], None],
    add_options: Callable[[argparse.ArgumentParser], object] = lambda _: None,
) -> None:
    """The command line `run OUT` and `report RUNS OUT`.

    Args:
        list_runs: from the arguments of `run`, among them `seeds`.
        report: from a folder of runs into a folder.
        add_options: to `run`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path, help="folder of the runs")
    run.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 1 to 5")
    run.add_argument("--per_gpu", type=int, default=1, help="runs at the same time, on each GPU or, without any, in all")
    add_options(run)
    reporting = commands.add_parser("report")
    reporting.add_argument("runs", type=Path, help="folder of the runs")
    reporting.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.command == "report":
        folders = list_folders(arguments.runs)
        if not any(has_ended(folder) for folder in folders):
            parser.error(f"{arguments.runs} holds no run that has ended: make some with `run {arguments.runs}`")
        for folder in folders:
            if not has_ended(folder):
                print(f"{folder}: it has not ended", file=sys.stderr)
        arguments.out.mkdir(parents=True, exist_ok=True)
        report(arguments.runs, arguments.out)
        return
    planned = list_runs(arguments)
    if not planned:
        parser.error("the options leave no run to make")
    out = arguments.out.absolute()
    os.chdir(REPO)
    try:
        sys.exit(make_runs([each.build(out) for each in planned], arguments.per_gpu))
    except UserError as error:
        parser.error(str(error))


def make_runs(runs: Sequence[Run], per_gpu: int) -> int:
    """Make those that are not made yet; the exit code.

    Raises:
        UserError: a folder holds a run of other options.
    """
    check_folders(list(runs))
    if not RunQueue(runs, list_slots(per_gpu, 1)).make():
        return PREEMPTED_EXIT_CODE
    return FAILED_EXIT_CODE if any(read_outcome(run.folder).state == FAILED for run in runs) else 0


def list_folders(runs: Path, task: str = "*", arm: str = "*") -> list[Path]:
    """The folders of runs of a task and an arm."""
    return sorted(path.parent for path in runs.glob(f"{task}/{arm}/{SEED}*/{RECORD_FILE}"))


def has_ended(folder: Path) -> bool:
    return read_outcome(folder).state in ENDED


def list_ended(runs: Path, task: str, arm: str) -> list[Path]:
    """Those that have ended."""
    return [folder for folder in list_folders(runs, task, arm) if has_ended(folder)]


def compare_runs(runs: Path, out: Path, metrics: tuple[Metric, ...], baseline: str, *, by_length: bool) -> None:
    """Write the report of flame-compare for each task in a folder of runs, of all arms that are there.

    Args:
        metrics: those that no run of a task has logged are left out of its report.
        baseline: where it is one of the arms; else the first is.
        by_length: a report for each length of runs. Otherwise arms of all lengths are compared.
    """
    found: dict[tuple[str, Budget | None], list[Run]] = defaultdict(list)
    for folder in list_folders(runs):
        task, arm, seed = folder.parts[-3:]
        budget = Budget(*(read_record(folder) or {})["budget"])
        found[task, budget if by_length else None].append(Run(task, arm, int(seed.removeprefix(SEED)), folder, {}, budget))
    for (task, length), own in found.items():
        logged = {name for run in own for row in read_rows(run.folder) for name in row}
        kept = tuple(metric for metric in metrics if metric.name in logged)
        spec = _describe_runs(task, own, out / (f"{task}, {length}" if length else task), kept, baseline)
        spec.out.mkdir(parents=True, exist_ok=True)
        places = {(run.arm, run.seed): run for run in own}
        missing = [
            Run(task, arm, seed, runs / task / arm / f"{SEED}{seed}", {}, spec.budget)
            for arm in spec.arms
            for seed in spec.seeds
            if (arm, seed) not in places
        ]
        write_report(spec, [*own, *missing])


def _describe_runs(task: str, runs: Sequence[Run], out: Path, metrics: tuple[Metric, ...], baseline: str) -> Spec:
    arms = list(dict.fromkeys(run.arm for run in runs))
    first = baseline if baseline in arms else arms[0]
    return Spec(
        path=task,
        out=out,
        seeds=tuple(sorted({run.seed for run in runs})),
        budget=next(run.budget for run in runs if run.arm == first),
        tasks={task: {}},
        arms={arm: {} for arm in arms},
        baseline=first,
        metrics=metrics,
    )
