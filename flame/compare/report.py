"""The report of a comparison: report.md, report.csv and report.png, from the folders of its runs alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from pathlib import Path

from flame.compare.analysis import Analysis, Results, Row, analyse, find_unit, read_results
from flame.compare.curves import draw_curves
from flame.compare.metrics import Metric
from flame.compare.results import Result
from flame.compare.runs import Run
from flame.compare.spec import Spec
from flame.compare.statistics import CONFIDENCE
from flame.compare.tables import format_table, show_range

REPORT_FILE, CSV_FILE, CURVES_FILE = "report.md", "report.csv", "report.png"
UNITS = {"tokens": ("million tokens", 1e6), "tflops": ("PFLOP", 1e3), "seconds": ("seconds of training steps", 1.0)}
"""Of a quantity of `Progress`: its name in the report, and what it is divided by."""
UNKNOWN = "-"


def write_report(spec: Spec, runs: Sequence[Run]) -> Analysis:
    """Write the report into `Spec.out`, of what the runs have come to so far."""
    results = read_results(runs)
    analysis = analyse(spec, results)
    (spec.out / REPORT_FILE).write_text(describe(spec, results, analysis), encoding="utf-8")
    _write_csv(spec.out / CSV_FILE, spec, results)
    draw_curves(spec, results, spec.out / CURVES_FILE)
    return analysis


def describe(spec: Spec, results: Results, analysis: Analysis) -> str:
    """The report in Markdown."""
    ended = sum(result.has_ended for result in results.values())
    lines = [
        f"# {spec.path}",
        "",
        f"{_count(spec.arms, 'arm')}, {_count(spec.tasks, 'task')}, {_count(spec.seeds, 'seed')} "
        f"({', '.join(map(str, spec.seeds))}); {spec.budget} a run. {ended} of {len(results)} runs have ended.",
        "",
    ]
    if analysis.notes:
        lines += [*(f"- **{note}**" for note in analysis.notes), ""]
    if analysis.uncounted:
        lines += ["## Not counted", "", *(f"- {line}" for line in analysis.uncounted), ""]
    for task in spec.tasks:
        lines += [f"## {task}", ""]
        for metric in spec.metrics:
            rows = [row for row in analysis.rows if (row.task, row.metric) == (task, metric)]
            lines += [f"### {metric.name} ({metric.better} is better)", "", *_compare_arms(spec, metric, rows), ""]
        lines += ["### Cost", "", *_list_costs(spec, results, task), ""]
    lines += [f"![curves]({CURVES_FILE})", "", *_explain(spec)]
    return "\n".join(lines) + "\n"


def _count(things: Collection[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _compare_arms(spec: Spec, metric: Metric, rows: Sequence[Row]) -> list[str]:
    columns = ["arm", "runs", "mean ± sd", f"less {spec.baseline}, paired", f"{CONFIDENCE:.0%} interval", "%", "better in"]
    columns += ["p", "p, Holm"]
    unit, scale = UNITS[find_unit(spec)]
    if metric.goal is not None:
        columns += [f"reach {metric.goal:g}", f"{unit} a run that reaches it"]
    cells = []
    for row in rows:
        counted = f"{len(row.values)}/{len(row.values) + row.missing}"
        line = [row.arm, counted, _show_mean(row), *_show_paired(row)]
        if row.effort is not None:
            spent = row.effort.spent / scale
            line += [f"{row.effort.reached}/{row.effort.runs}", f"{spent:.4g}" if math.isfinite(spent) else UNKNOWN]
        cells.append(line)
    return format_table(columns, cells)


def _show_mean(row: Row) -> str:
    if row.mean is None:
        return UNKNOWN
    return f"{row.mean:.4f}" + (f" ± {row.deviation:.4f}" if row.deviation is not None else "")


def _show_paired(row: Row) -> list[str]:
    """Difference, interval, percent, pairs won, p and Holm's p."""
    if row.paired is None:
        return [UNKNOWN] * 6
    interval = UNKNOWN if row.paired.low is None else f"[{row.paired.low:+.4f}, {row.paired.high:+.4f}]"
    relative = UNKNOWN if row.relative is None else f"{row.relative:+.2f}"
    shown = [f"{row.paired.mean:+.4f}", interval, relative, f"{row.better}/{row.paired.pairs}"]
    return [*shown, *(UNKNOWN if p is None else show_p(p) for p in (row.paired.p, row.holm))]


def show_p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def _list_costs(spec: Spec, results: Results, task: str) -> list[str]:
    columns = ["arm", "steps", "million tokens", "PFLOP", "step, s", "wall clock, s", "peak memory, GiB", "device"]
    rows = []
    for arm in spec.arms:
        ended = [results[task, arm, seed] for seed in spec.seeds if results[task, arm, seed].has_ended]
        if ended:
            rows.append([arm, *_show_costs(ended)])
    return format_table(columns, rows)


def _show_costs(ended: Sequence[Result]) -> list[str]:
    """Median over runs, with the range where they differ."""
    columns = (
        ([result.steps for result in ended], "{:.0f}"),
        ([result.progress.tokens[-1] / 1e6 for result in ended], "{:.4g}"),
        ([result.progress.tflops[-1] / 1e3 for result in ended], "{:.4g}"),
        ([result.step_seconds for result in ended], "{:.3g}"),
        ([result.wall_seconds for result in ended], "{:.4g}"),
        ([result.peak_gib for result in ended], "{:.2f}"),
    )
    devices = sorted({result.device for result in ended})
    return [*(show_range(values, form) for values, form in columns), "; ".join(devices)]


def _explain(spec: Spec) -> list[str]:
    others = len(spec.arms) - 1
    return [
        "## How to read it",
        "",
        "- Runs of a seed are pairs: the fingerprints of initial weights and of the first batch agree, and so do all options",
        "  that decide the order of the data. Pairs that fail this are listed above and left out of differences.",
        f"- A difference is arm less {spec.baseline}, of the last logged value, on the same seed. Interval and p are those of",
        "  the two-sided paired t-test, which takes differences to be about normal: a few seeds cannot show that.",
        f"- {others} arm{'s are' if others > 1 else ' is'} compared with {spec.baseline}. The column p, Holm is corrected for "
        "all of them, per metric and task.",
        "- Runs that failed or gave no finite number are in the column runs, and listed above. Means are without them.",
        "- A dash stands for interval and p where there is one pair, or where arms differ by the same on all seeds: the t-test",
        "  says nothing of a difference without spread.",
        "- Step is the median step. Wall clock is what all steps took, without starts, validations and checkpoints.",
        "- Brackets: median [lowest, highest] over runs.",
        "- Bands in the curves are the mean ± one standard deviation over seeds.",
    ]


def _write_csv(path: Path, spec: Spec, results: Results) -> None:
    names = [metric.name for metric in spec.metrics]
    costs = ["steps", "tokens", "tflops", "step_seconds", "wall_seconds", "peak_memory_gib", "device"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "arm", "seed", "outcome", *names, *costs])
        for (task, arm, seed), result in results.items():
            ends = [result.find_end(name) for name in names]
            progress = result.progress
            spent = [result.steps, progress.tokens[-1], progress.tflops[-1]]
            row = [*spent, result.step_seconds, result.wall_seconds, result.peak_gib]
            shown = [f"{value:.10g}" if math.isfinite(value) else "" for value in row]
            values = ["" if end is None else f"{end:.10g}" for end in ends]
            writer.writerow([task, arm, seed, result.outcome.state, *values, *shown, result.device])
