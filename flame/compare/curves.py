"""The learning curves of a comparison: mean over seeds with a band of one standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from flame.compare.analysis import Results, find_unit
from flame.compare.outcomes import STOPPED
from flame.compare.results import Result
from flame.compare.spec import Spec
from flame.logging.plots import escape, pick_color

AXES = {
    "tokens": ("tokens, millions", 1e6),
    "tflops": ("PFLOP", 1e3),
    "seconds": ("seconds of training steps", 1.0),
}


class Band(NamedTuple):
    """A curve over seeds."""

    at: list[float]
    """In the budget's unit."""
    mean: list[float]
    deviation: list[float]
    """0 where there is one run."""


def find_band(results: Sequence[Result], metric: str, unit: str) -> Band:
    """Mean and standard deviation over the runs that have ended, at each step at which all that reach it have a value.

    A run that ended early since it had reached `stop_at` counts with its last value from there on. Without it, the mean behind
    would be that of the slow runs alone.
    """
    curves = [(result, dict(result.read_curve(metric))) for result in results if result.has_ended]
    curves = [(result, curve) for result, curve in curves if curve]
    at, means, deviations = [], [], []
    for step in sorted({step for _, curve in curves for step in curve}):
        values = []
        for result, curve in curves:
            last = max(curve)
            if step in curve:
                values.append(curve[step])
            elif step > last and result.outcome.state == STOPPED:
                values.append(curve[last])
            elif step <= last:
                break  # a run has no value here: the mean would jump
        else:
            at.append(statistics.fmean(_find_cost(result, unit, step) for result, _ in curves))
            means.append(statistics.fmean(values))
            deviations.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return Band(at, means, deviations)


def _find_cost(result: Result, unit: str, step: float) -> float:
    """What a run has spent up to a step, or would have if it had gone on."""
    reached = min(step, result.steps)
    return result.progress.find(unit, reached) * (step / reached if reached else 1.0)


def draw_curves(spec: Spec, results: Results, path: Path) -> None:
    """A row of panels a task, a panel a metric, a color an arm."""
    unit = find_unit(spec)
    label, scale = AXES[unit]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        size = (max(6, 5 * len(spec.metrics)), 3.5 * len(spec.tasks) + 0.5)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine())
        panels = figure.subplots(len(spec.tasks), len(spec.metrics), squeeze=False)
        for task, row in zip(spec.tasks, panels, strict=True):
            for metric, axes in zip(spec.metrics, row, strict=True):
                partial = []
                for number, arm in enumerate(spec.arms):
                    own = [results[task, arm, seed] for seed in spec.seeds]
                    ended = sum(result.has_ended for result in own)
                    partial += [] if ended == len(own) else [f"{arm}: {ended} of {len(own)} runs"]
                    band = find_band(own, metric.name, unit)
                    at = [value / scale for value in band.at]
                    low, high = (
                        [mean + sign * width for mean, width in zip(band.mean, band.deviation, strict=True)] for sign in (-1, 1)
                    )
                    color, marker = pick_color(number, len(spec.arms)), "o" if len(at) == 1 else None
                    axes.plot(at, band.mean, color=color, linewidth=1.6, marker=marker, markersize=3, label=escape(arm))
                    axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
                axes.set(title=escape("\n".join([task, *partial])), xlabel=label, ylabel=escape(metric.name))
                axes.grid(alpha=0.3)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)
        figure.savefig(path, dpi=150)
