"""What the runs of a comparison say: the mean of each arm, and its paired difference to the baseline. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flame.compare.metrics import Metric
from flame.compare.pairs import find_fault, find_measure_fault
from flame.compare.results import Result, read_result
from flame.compare.runs import Run
from flame.compare.spec import Spec
from flame.compare.statistics import Paired, adjust_holm, compare_pairs
from flame.trainer.run_record import DIRTY

FEWEST_SEEDS = 5
"""Of a claim."""

Results = dict[tuple[str, str, int], Result]
"""By task, arm and seed."""
Faults = dict[tuple[str, str, int, str], str]
"""Why two runs are no pair, by task, arm, seed and metric."""


@dataclass(frozen=True)
class Effort:
    """What it takes to reach a goal: all runs, those that failed too, over how many reached it.

    The expected running time of Hansen, Auger, Finck and Ros 2009 (INRIA RR-6828). An arm that often fails has no other fair
    number: the mean of its lucky runs leaves the failures out.
    """

    reached: int
    runs: int
    spent: float
    """In the budget's unit, for each run that reached it; infinite if none did."""


@dataclass(frozen=True)
class Row:
    """An arm under one metric."""

    task: str
    arm: str
    metric: Metric
    values: tuple[float, ...]
    """Of the runs that have ended with a finite number, by seed."""
    missing: int
    """Runs of the arm that have none."""
    effort: Effort | None
    paired: Paired | None
    """Difference to the baseline, arm less baseline; None for the baseline, and without any pair."""
    better: int = 0
    """Pairs in which the arm is strictly better."""
    relative: float | None = None
    """`paired.mean` over the baseline's mean on the same seeds, in percent."""
    holm: float | None = None
    """`paired.p`, corrected for all arms under this metric."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Analysis:
    rows: tuple[Row, ...]
    uncounted: tuple[str, ...]
    """A line for each run that gives no number, and for each pair that is none."""
    notes: tuple[str, ...]
    """What a reader should know before believing a table."""


def read_results(runs: Sequence[Run]) -> Results:
    return {(run.task, run.arm, run.seed): read_result(run.folder) for run in runs}


def analyse(spec: Spec, results: Results) -> Analysis:
    """Compare all arms with the baseline on each task under each metric."""
    faults = find_pair_faults(spec, results)
    rows: list[Row] = []
    for task in spec.tasks:
        for metric in spec.metrics:
            rows += _correct([_compare(spec, results, faults, task, arm, metric) for arm in spec.arms])
    uncounted = [
        *_list_unended(spec, results),
        *_list_pair_faults(spec, faults),
    ]
    return Analysis(tuple(rows), tuple(uncounted), tuple(_list_notes(spec, results)))


def find_pair_faults(spec: Spec, results: Results) -> Faults:
    """Why an ended run is no pair with the baseline's ended run of its seed, for those that are none."""
    faults = {}
    for (task, arm, seed), result in results.items():
        base = results[task, spec.baseline, seed]
        if arm == spec.baseline or not (result.has_ended and base.has_ended):
            continue
        shared = find_fault(base, result)
        for metric in spec.metrics:
            if fault := shared or find_measure_fault(base, result, metric.name):
                faults[task, arm, seed, metric.name] = fault
    return faults


def find_effort(metric: Metric, unit: str, results: Sequence[Result]) -> Effort:
    reached, spent = 0, 0.0
    for result in results:
        step = result.find_goal(metric)
        reached += step is not None
        spent += result.progress.find(unit, result.steps if step is None else step)
    return Effort(reached, len(results), spent / reached if reached else math.inf)


def find_unit(spec: Spec) -> str:
    """Of the budget, as `Progress` names it."""
    return {"tokens": "tokens", "flops": "tflops", "seconds": "seconds"}[spec.budget.kind]


def _compare(spec: Spec, results: Results, faults: Faults, task: str, arm: str, metric: Metric) -> Row:
    own = {seed: results[task, arm, seed] for seed in spec.seeds}
    ends = {seed: end for seed, result in own.items() if (end := result.find_end(metric.name)) is not None}
    base = {seed: results[task, spec.baseline, seed].find_end(metric.name) for seed in spec.seeds}
    paired_seeds = [seed for seed in ends if (task, arm, seed, metric.name) not in faults]
    pairs = [(ends[seed], other) for seed in paired_seeds if (other := base[seed]) is not None]
    effort = find_effort(metric, find_unit(spec), list(own.values())) if metric.goal is not None else None
    shared = {
        "task": task,
        "arm": arm,
        "metric": metric,
        "values": tuple(ends.values()),
        "missing": len(own) - len(ends),
        "effort": effort,
    }
    if arm == spec.baseline or not pairs:
        return Row(**shared, paired=None)  # type: ignore[arg-type]
    paired = compare_pairs([end - other for end, other in pairs])
    level = statistics.fmean(other for _, other in pairs)
    return Row(
        **shared,  # type: ignore[arg-type]
        paired=paired,
        better=sum(end != other and metric.is_reached(end, other) for end, other in pairs),
        relative=100 * paired.mean / abs(level) if level else None,
    )


def _correct(rows: list[Row]) -> list[Row]:
    """With Holm's correction over the arms of one metric and task. An arm that has pairs and no p-value counts as one with 1."""
    p_values = {row.arm: row.paired.p for row in rows if row.paired is not None}
    adjusted = adjust_holm([1.0 if p is None else p for p in p_values.values()])
    by_arm = {arm: holm for (arm, p), holm in zip(p_values.items(), adjusted, strict=True) if p is not None}
    return [Row(**(vars(row) | {"holm": by_arm.get(row.arm)})) for row in rows]


def _list_unended(spec: Spec, results: Results) -> list[str]:
    lines = []
    for (task, arm, seed), result in results.items():
        name = f"{task}: {arm}, seed {seed}"
        if not result.has_ended:
            lines.append(f"{name}: {result.outcome.state}{f', {result.outcome.line}' if result.outcome.line else ''}")
            continue
        for metric in spec.metrics:
            if result.find_end(metric.name) is None:
                was_logged = any(metric.name in row for row in result.rows)
                lines.append(f"{name}: {metric.name} {'is not finite at its end' if was_logged else 'was never logged'}")
    return lines


def _list_pair_faults(spec: Spec, faults: Faults) -> list[str]:
    """A line for each pair that is none, which names the metrics unless it is so for all."""
    metrics: dict[tuple[str, str, int, str], list[str]] = {}
    for (task, arm, seed, metric), fault in faults.items():
        metrics.setdefault((task, arm, seed, fault), []).append(metric)
    lines = []
    for (task, arm, seed, fault), names in metrics.items():
        measured = f" for {', '.join(names)}" if len(names) < len(spec.metrics) else ""
        lines.append(f"{task}: {arm} and {spec.baseline} are no pair with seed {seed}{measured}: {fault}")
    return lines


def _list_notes(spec: Spec, results: Results) -> list[str]:
    notes = []
    if (seeds := len(spec.seeds)) < FEWEST_SEEDS:
        few = f"{seeds} seed{'s are' if seeds > 1 else ' is'} fewer than five"
        notes.append(f"{few}: this report is no claim, it says where to look.")
    began = [result for result in results.values() if result.first_step is not None]
    devices = sorted({result.device for result in began})
    if len(devices) > 1:
        notes.append(f"The runs were made on different devices ({'; '.join(devices)}): do not compare their wall clocks.")
    revisions = {revision for result in began for revision in result.revisions}
    if len(revisions) > 1:
        shown = sorted("".join([revision[:8], *revision.partition(DIRTY)[1:]]) for revision in revisions)
        notes.append(f"The runs were made with {len(revisions)} revisions of the code: {', '.join(shown)}.")
    if spec.parallel > 1:
        notes.append(f"{spec.parallel} runs shared a device: a run alone takes less wall clock than the tables say.")
    if any(metric.stop_at is not None for metric in spec.metrics):
        notes.append("Runs end early once they reach stop_at: their last value stands for the rest of their curves.")
    return notes
