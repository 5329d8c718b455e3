"""Draw the curves of runs.

    flame-plot RUN [RUN ...] --out curves.png

A RUN is the folder of a run (job.dump_folder). Several runs are drawn in the same panels.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from flame.config.run import CURVES_FILE
from flame.errors import UserError, end_on_user_error
from flame.logging.console import find_row_kind
from flame.logging.writers.json_lines import METRICS_FILE
from flame.runtime.json_lines import parse_line

Rows = list[dict[str, float | None]]
LN_N = "ln N"
DATA_WAIT = "data wait"
"""Derived numbers: the chance level of the future loss, and the seconds of a step in which data are waited for."""


@dataclass(frozen=True)
class Curve:
    """A metric in a panel."""

    metric: str
    label: str
    style: Literal["-", "--", ":"] = "-"
    color: str = "C0"
    """Color if a single run is drawn. With several runs, the color shows the run and the line style the metric."""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]


LEARNING = (
    Panel(
        "Next-token loss",
        "cross entropy (nats per token)",
        (Curve("ce_loss", "cross entropy"), Curve("validation_ce_loss", "validation", ":", "C1")),
    ),
    Panel(
        "Auxiliary loss",
        "nats per item",
        (
            Curve("aux_loss", "training"),
            Curve("validation_aux_loss", "validation", ":", "C1"),
            Curve(LN_N, "ln N (chance)", "--", "0.45"),
        ),
    ),
    Panel(
        "Predictions of the future",
        "accuracy, cosine similarity",
        (
            Curve("infonce_accuracy", "accuracy"),
            Curve("positive_cosine", "cosine, own future", "--", "C2"),
            Curve("negative_cosine", "cosine, others", ":", "C3"),
        ),
    ),
    Panel(
        "Held-out answers",
        "share that is right",
        (
            Curve("validation_exact_match", "to the last token"),
            Curve("validation_first_branch", "first branch", ":", "C1"),
        ),
    ),
)
RESOURCES = (
    Panel(
        "Time of a step",
        "seconds",
        (Curve("step_seconds", "whole step"), Curve(DATA_WAIT, "waiting for data", ":", "C3")),
    ),
    Panel("Speed", "tokens per second", (Curve("tokens_per_second", "all GPUs"),)),
    Panel("Memory", "peak, GiB, of the rank with most", (Curve("peak_memory_gib", "peak"),)),
)


def plot_run(folder: Path, out: Path | None = None) -> Path:
    """Draw one run into a PNG and return its path: `out`, or `curves.png` in the run's folder.

    Raises:
        UserError: the folder has no metrics to draw, or the PNG cannot be written.
    """
    return plot_runs([folder], out or folder / CURVES_FILE)


def plot_runs(folders: Sequence[Path], out: Path) -> Path:
    """Draw several runs in the same panels into a PNG and return its path.

    Raises:
        UserError: a folder has no metrics, none has numbers to draw, or the PNG cannot be written.
    """
    if out.suffix != ".png":
        raise UserError(f"{out}: the plot is a PNG file; give a name that ends in .png")
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    figure = draw({label: read_metrics(folder) for label, folder in zip(labels, folders, strict=True)})
    try:
        figure.savefig(out, dpi=200)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another path") from error
    return out


def read_metrics(folder: Path) -> Rows:
    """Read the rows of a run's metrics.jsonl, each with "step". Numbers that were not finite are None.

    Raises:
        UserError: the file is missing or has no rows.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a run (its job.dump_folder)")
    with path.open("rb") as lines:
        rows = [row for line in lines if (row := parse_line(line)) is not None]
    if not rows:
        raise UserError(f"{path}: no metrics in it yet; the run writes a line every metrics.log_freq steps")
    return rows


def escape(name: str) -> str:
    """As matplotlib shows it: text between two dollars would be a formula."""
    return name.replace("$", r"\$")


def pick_color(index: int, count: int) -> str:
    """A color that no other of `count` curves has: matplotlib's own, of which there are ten, or one along the spectrum."""
    return f"C{index}" if count <= 10 else to_hex(mpl.colormaps["turbo"](index / (count - 1)))


def draw(runs: dict[str, Rows]) -> Figure:
    """Draw the curves of runs, by label: a row of panels on what is learned, and below it one on time and memory. Panels without
    numbers are left out.

    Raises:
        UserError: no panel has numbers.
    """
    rows_of_panels = [
        [panel for panel in group if any(_has_numbers(rows, panel) for rows in runs.values())] for group in (LEARNING, RESOURCES)
    ]
    if not rows_of_panels[0]:
        raise UserError(f"{', '.join(runs)}: {METRICS_FILE} has no finite loss or accuracy to draw")
    with mpl.rc_context({"font.size": 9, "legend.fontsize": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        shown, columns = [row for row in rows_of_panels if row], max(map(len, rows_of_panels))
        layout = ConstrainedLayoutEngine(w_pad=0.1, hspace=0.1)
        figure = Figure(figsize=(max(12, 4 * columns), 4 * len(shown)), layout=layout)
        grid = figure.add_gridspec(len(shown), columns)
        for index, panels in enumerate(shown):
            for place, panel in enumerate(panels):
                _draw_panel(figure.add_subplot(grid[index, place]), panel, runs)
        if len(runs) == 1:
            figure.suptitle(escape(next(iter(runs))), fontsize=11)
        else:
            handles = [Line2D([], [], color=pick_color(index, len(runs)), linewidth=2.5) for index in range(len(runs))]
            figure.legend(handles, list(map(escape, runs)), loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: dict[str, Rows]) -> None:
    drawn = []
    for index, rows in enumerate(runs.values()):
        for curve in panel.curves:
            own = [row for row in rows if find_row_kind(row) == find_row_kind([curve.metric])]
            steps = [_get_number(row, "step") for row in own]
            numbers = [_get_number(row, curve.metric) for row in own]
            if not any(map(math.isfinite, numbers)):
                continue
            # A point without finite neighbors has no line, and needs a marker to be visible.
            marker = "o" if _has_lone_point(numbers) else None
            color = curve.color if len(runs) == 1 else pick_color(index, len(runs))
            axes.plot(steps, numbers, curve.style, color=color, marker=marker, markersize=3, linewidth=1.6, label=curve.label)
            if curve not in drawn:
                drawn.append(curve)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axes.grid(alpha=0.3)
    if len(panel.curves) > 1:
        handles = [
            Line2D([], [], linestyle=curve.style, color=curve.color if len(runs) == 1 else "0.3", linewidth=1.6)
            for curve in drawn
        ]
        labels = [curve.label for curve in drawn]
        spacing = {"handlelength": 1.8, "columnspacing": 0.9, "handletextpad": 0.5}
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=len(drawn), frameon=False, **spacing)


def _has_numbers(rows: Rows, panel: Panel) -> bool:
    return any(math.isfinite(_get_number(row, curve.metric)) for row in rows for curve in panel.curves)


def _get_number(row: dict[str, float | None], metric: str) -> float:
    """The row's number, or NaN if there is none, which leaves a gap in the curve."""
    if metric == LN_N:
        return _get_number(row, "mi_lower_bound") + _get_number(row, "aux_loss") - (row.get("action_loss") or 0.0)
    if metric == DATA_WAIT:
        return _get_number(row, "data_wait_fraction") * _get_number(row, "step_seconds")
    value = row.get(metric)
    return math.nan if value is None else value


def _has_lone_point(numbers: list[float]) -> bool:
    padded = [False, *map(math.isfinite, numbers), False]
    return any(here and not (before or after) for before, here, after in zip(padded, padded[1:], padded[2:], strict=False))


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flame-plot", description="Draw the curves of runs into a PNG.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (its job.dump_folder)")
    parser.add_argument("--out", type=Path, default=Path(CURVES_FILE), help="the PNG to write (default: %(default)s)")
    options = parser.parse_args(argv)
    print(plot_runs(options.runs, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
