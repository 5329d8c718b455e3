"""`flame-compare SPEC.toml`: make the runs of a comparison that are not made yet, then report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flame.compare.devices import Slot, list_slots
from flame.compare.outcomes import ENDED, FAILED, read_outcome
from flame.compare.probe import Interrupted, set_steps
from flame.compare.queue import RunQueue, say
from flame.compare.report import CSV_FILE, CURVES_FILE, REPORT_FILE, write_report
from flame.compare.runs import Run, check_folders, list_runs, read_spec
from flame.compare.spec import Spec
from flame.errors import UserError, end_on_user_error
from flame.runtime.signals import PREEMPTED_EXIT_CODE

FAILED_EXIT_CODE = 1


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all runs have ended, 1 some have failed, 2 a mistake of the user, 75 something is left to do."""
    parser = argparse.ArgumentParser(
        prog="flame-compare",
        description="Train each task under each arm with each seed, and report the differences (docs/compare.md). "
        "The same command goes on after a kill and never makes a finished run again.",
        allow_abbrev=False,
    )
    parser.add_argument("spec", metavar="SPEC", help="TOML file with [compare], [tasks.NAME], [arms.NAME] and [metrics.NAME]")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="check everything and list the runs with their numbers")
    only.add_argument("--count", action="store_true", help="check everything and print the number of runs")
    only.add_argument("--report", action="store_true", help="report on the runs as they are")
    only.add_argument("--element", type=int, metavar="K", help="make run K alone, from 0: one element of a Slurm array")
    arguments = parser.parse_args(argv)
    spec = read_spec(arguments.spec)
    runs = list_runs(spec)
    check_folders(runs)
    if arguments.count:
        print(len(runs))
        return 0
    if arguments.list:
        for number, run in enumerate(runs):
            print(f"{number:4d}  {read_outcome(run.folder).state:15s}  {run.name}")
        return 0
    if arguments.report:
        return _report(spec, runs)
    if arguments.element is not None:
        if not 0 <= arguments.element < len(runs):
            raise UserError(f"--element {arguments.element}: allowed is 0 to {len(runs) - 1}")
        return _make(spec, [runs[arguments.element]])
    code = _make(spec, runs)
    if code == PREEMPTED_EXIT_CODE:
        return code
    check_folders(runs)  # a configuration file may have changed meanwhile
    return _report(spec, runs)


def _make(spec: Spec, runs: list[Run]) -> int:
    """Make what is left; the exit code."""
    left = [run for run in runs if read_outcome(run.folder).state not in ENDED]
    if left:
        slots = list_slots(spec.parallel, spec.gpus_per_run)
        _make_folders(run.folder for run in left)
        say(_describe_work(runs, left, slots))
        try:
            runs = set_steps(spec, runs, slots)
        except Interrupted:
            return PREEMPTED_EXIT_CODE
        check_folders(runs)
        if not RunQueue(runs, slots).make():
            return PREEMPTED_EXIT_CODE
    return _judge(runs)


def _make_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'"{folder}" cannot be made ({error.strerror}): choose another compare.out') from error


def _describe_work(runs: Sequence[Run], left: Sequence[Run], slots: Sequence[Slot]) -> str:
    gpus = {gpu for slot in slots for gpu in slot.gpus}
    place = (
        f"on {len(gpus)} GPU{'s' * (len(gpus) > 1)}"
        if gpus
        else f"on the CPU, {slots[0].threads} thread{'s' * (slots[0].threads > 1)} each"
    )
    return f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(left)} to make, {min(len(slots), len(left))} at a time {place}"


def _judge(runs: Sequence[Run]) -> int:
    states = [read_outcome(run.folder).state for run in runs]
    if FAILED in states:
        return FAILED_EXIT_CODE
    return 0 if all(state in ENDED for state in states) else PREEMPTED_EXIT_CODE


def _report(spec: Spec, runs: Sequence[Run]) -> int:
    _make_folders([spec.out])
    analysis = write_report(spec, runs)
    for line in (*analysis.notes, *analysis.uncounted):
        print(line, file=sys.stderr)
    print(f"report: {', '.join(str(spec.out / name) for name in (REPORT_FILE, CSV_FILE, CURVES_FILE))}")
    return _judge(runs)
