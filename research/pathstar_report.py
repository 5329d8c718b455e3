"""Tables and plots of path-star runs, from their folders alone."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tomli
from matplotlib.lines import Line2D

from flame.compare.tables import format_table, show_range
from flame.data.tasks.pathstar import parse_sizes
from research.run_folder import CONFIG_FILE, Row, list_ended, read_progress, read_rows

RUN_FOLDERS = "*/*/*"
"""Size, variant and seed."""
PART = " (one of "
"""In the name of a variant's results on one size of several, behind the variant."""
MATCH = "validation_exact_match"
SOLVED = 0.99
"""Exact match on held-out graphs that counts as solved."""
UNDER_WAY = 0.75
"""Exact match that no choice of the first step at random reaches."""
DIAGNOSTICS = (
    "top1",
    "top1_same_document",
    "top1_other_documents",
    "rank_targets",
    "rank_hidden",
    "cosine_targets",
    "grad_ratio",
    "grad_cosine",
)
EARLY = ("rank_targets", "rank_hidden")


class Outcome(NamedTuple):
    """What one run came to."""

    size: str
    """As `validation.dataset_name` has it, or one of several there. Training may have others too."""
    variant: str
    seed: int
    graphs: list[float]
    """Trained on at each validation, of whatever size."""
    exact_match: list[float]
    petaflops: list[float]
    """Spent at each validation, as the step requires them."""
    first_branch: float
    """At the last validation; nan for one size of several, where it is not told apart."""
    diagnostics: dict[str, float]
    """The last value of each; of all sizes together."""
    early: dict[str, float]
    """The second measurement: the first is of the first step."""

    @property
    def solved_at(self) -> int | None:
        """Index of the first validation that counts as solved."""
        return self.find(SOLVED)

    def find(self, exact_match: float) -> int | None:
        """Index of the first validation that reaches it."""
        return next((place for place, match in enumerate(self.exact_match) if match >= exact_match), None)

    @property
    def last(self) -> int:
        """Index of the validation up to which the run is paid for: where it was solved, or its end."""
        return len(self.graphs) - 1 if self.solved_at is None else self.solved_at


Groups = dict[tuple[str, str], list[Outcome]]
"""Runs by size and variant."""


class Effort(NamedTuple):
    """What a variant takes on a size: all its runs, those that failed too, over how many solved it.

    The expected running time of Hansen, Auger, Finck and Ros 2009 (INRIA RR-6828), which Auger and Hansen 2005 analyze as success
    performance. A variant that often fails has no other fair number: the mean of its lucky runs leaves the failures out. Where
    runs fail, it depends on how long they were let.
    """

    solved: int
    runs: int
    thousands: float
    """Graphs; infinite if none solved it."""
    petaflops: float

    @property
    def rate(self) -> str:
        return f"{self.solved}/{self.runs}"

    def show(self, form: str, spent: float) -> str:
        return form.format(spent) if self.solved else "-"


def sum_effort(outcomes: Sequence[Outcome]) -> Effort:
    solved = sum(o.solved_at is not None for o in outcomes)
    graphs = sum(o.graphs[o.last] for o in outcomes) / 1000
    petaflops = sum(o.petaflops[o.last] for o in outcomes)
    return Effort(solved, len(outcomes), *(spent / solved if solved else math.inf for spent in (graphs, petaflops)))


def list_matches(validation: Row) -> dict[str, float]:
    """Exact match of a validation by size, under "" that of all graphs together. One size alone is not told apart."""
    return {name.removeprefix(MATCH).removeprefix("/"): match for name, match in validation.items() if name.startswith(MATCH)}


def read_outcomes(folder: Path) -> list[Outcome]:
    """What one run came to on what it was validated on, and on each size of it that is told apart; nothing if it never was."""
    config = tomli.loads((folder / CONFIG_FILE).read_text())
    sizes = parse_sizes(config["training"]["dataset_name"])
    tokens_a_graph = sum(size.num_tokens for size in sizes) / len(sizes)
    validated: list[Row] = []
    diagnostics: dict[str, float] = {}
    measured: list[dict[str, float]] = []
    for row in read_rows(folder):
        if MATCH in row:
            validated.append(row)
        else:
            diagnostics |= {name: value for name, value in row.items() if name.startswith("future/") or name == "mi_lower_bound"}
            if any(name.startswith("future/") for name in row):
                measured.append(row)
    if not validated:
        return []
    # Most validations are between two log lines.
    progress, steps = read_progress(folder), [row["step"] for row in validated]
    graphs = (np.interp(steps, progress.steps, progress.tokens) / tokens_a_graph).tolist()
    spent = (np.interp(steps, progress.steps, progress.tflops) / 1000).tolist()
    _, variant, seed = folder.parts[-3:]
    early = measured[1] if len(measured) > 1 else {}
    whole = config["validation"]["dataset_name"]
    outcomes = []
    by_size = [list_matches(row) for row in validated]
    for size in by_size[0]:
        matches = [row[size] for row in by_size]
        told = (math.nan, {}, {}) if size else (validated[-1]["validation_first_branch"], diagnostics, early)
        name = f"{variant}{PART}{whole})" if size else variant  # there are runs on this size alone
        outcomes.append(Outcome(size or whole, name, int(seed.removeprefix("seed ")), graphs, matches, spent, *told))
    return outcomes


def write_report(runs: Path, out: Path) -> None:
    """Write `pathstar.md` and `pathstar.png`, of the runs that have ended, into a folder."""
    outcomes = [outcome for folder in list_ended(runs, RUN_FOLDERS) for outcome in read_outcomes(folder)]
    grouped: Groups = defaultdict(list)
    for outcome in outcomes:
        grouped[outcome.size, outcome.variant].append(outcome)
    (out / "pathstar.md").write_text(write_tables(grouped))
    plot_curves(grouped, out / "pathstar.png")


def write_tables(grouped: Groups) -> str:
    """Markdown: each variant on each size in short, how soon it solves it, and what the diagnostics show at the end."""
    return "\n".join([*_compare_sizes(grouped), "", *_list_efforts(grouped), "", *_list_diagnostics(grouped)]).rstrip() + "\n"


def _compare_sizes(grouped: Groups) -> list[str]:
    """A row a variant, a column a size: how many runs solved it, mean exact match at the end, graphs a solved run."""
    sizes = sorted({size for size, _ in grouped}, key=lambda size: (parse_sizes(size)[0].num_tokens, size))
    rows = [
        [variant, *(_show_short(grouped[size, variant]) if (size, variant) in grouped else "" for size in sizes)]
        for variant in dict.fromkeys(variant for _, variant in grouped)
    ]
    return format_table(["solved, mean exact match at the end, thousands of graphs a solved run", *map(_name_size, sizes)], rows)


def _name_size(size: str) -> str:
    return " and ".join(f"G({each.arms}, {each.nodes})" for each in parse_sizes(size))


def _show_short(outcomes: Sequence[Outcome]) -> str:
    effort = sum_effort(outcomes)
    match = statistics.mean(100 * o.exact_match[-1] for o in outcomes)
    return f"{effort.rate}, {match:.1f} %, {effort.show('{:,.0f}', effort.thousands)}"


def _list_efforts(grouped: Groups) -> list[str]:
    columns = [
        "graphs",
        "variant",
        "solved",
        "graphs to 75 %, thousands",
        "graphs to 99 %, thousands",
        "graphs a solved run, thousands",
        "PFLOP a solved run",
        "exact match at the end",
        "first branch",
    ]
    rows = []
    for (size, variant), outcomes in grouped.items():
        effort = sum_effort(outcomes)
        needed = [_show_needed(outcomes, match) for match in (UNDER_WAY, SOLVED)]
        spent = [effort.show("{:,.0f}", effort.thousands), effort.show("{:.3g}", effort.petaflops)]
        ends = show_range([100 * o.exact_match[-1] for o in outcomes], "{:.1f}")
        branch = statistics.mean(100 * o.first_branch for o in outcomes)
        rows.append([size, variant, effort.rate, *needed, *spent, ends, "-" if math.isnan(branch) else f"{branch:.1f}"])
    return format_table(columns, rows)


def _show_needed(outcomes: Sequence[Outcome], exact_match: float) -> str:
    """Graphs up to an exact match, in thousands: the runs that reach it, and when the others gave up."""
    places = [(o, o.find(exact_match)) for o in outcomes]
    soon = [o.graphs[place] / 1000 for o, place in places if place is not None]
    most = max(o.graphs[-1] for o in outcomes) / 1000
    shown = show_range(soon, "{:,.0f}") if soon else "-"
    return shown if len(soon) == len(outcomes) else f"{shown} ({len(outcomes) - len(soon)} not within {most:,.0f})"


def _list_diagnostics(grouped: Groups) -> list[str]:
    """Means over the runs of the last value of each, and of the ranks early on; nothing if no run has any."""
    rows = []
    for (size, variant), outcomes in grouped.items():
        if any(o.diagnostics for o in outcomes):
            last = [o.diagnostics for o in outcomes]
            means = [_mean_of(name, last) for name in ("mi_lower_bound", *(f"future/{name}" for name in DIAGNOSTICS))]
            means += [_mean_of(f"future/{name}", [o.early for o in outcomes]) for name in EARLY]
            rows.append([size, variant, *means])
    columns = ["graphs", "variant", "ln N - loss", *DIAGNOSTICS, *(f"{name}, second measurement" for name in EARLY)]
    return format_table(columns, rows) if rows else []


def plot_curves(grouped: Groups, path: Path) -> None:
    """Exact match against graphs seen: a panel a size, a colour a variant, a line a seed; broken for one size of a mix."""
    sizes, variants = (list(dict.fromkeys(names)) for names in zip(*grouped, strict=True))
    columns = min(len(sizes), 2)
    rows = -(-len(sizes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, sharey=True, layout="constrained")
    panels = dict(zip(sizes, axes.flat, strict=False))
    places = {name: place for place, name in enumerate(dict.fromkeys(variant.split(PART)[0] for variant in variants))}
    colors: dict[str, str] = {}
    styles: dict[str, Literal["-", "--", ":", "-."]] = {}
    for variant in variants:
        place = places[variant.split(PART)[0]]
        colors[variant] = f"C{place % 10}"
        styles[variant] = "-." if PART in variant else ("-", "--", ":")[place // 10 % 3]
    for (size, variant), outcomes in grouped.items():
        for outcome in outcomes:
            thousands = [graphs / 1000 for graphs in outcome.graphs]
            panels[size].plot(thousands, outcome.exact_match, styles[variant], color=colors[variant], linewidth=1, alpha=0.8)
    for size, axis in panels.items():
        axis.set(title=_name_size(size), xlabel="graphs seen, thousands", ylim=(-0.02, 1.02))
    for axis in islice(axes.flat, len(sizes), None):
        axis.remove()
    axes[0, 0].set_ylabel("exact match, held-out graphs")
    lines = [Line2D([], [], color=colors[variant], linestyle=styles[variant], label=variant) for variant in variants]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean_of(name: str, measured: Iterable[dict[str, float]]) -> str:
    values = [each[name] for each in measured if name in each]
    return f"{statistics.mean(values):.3g}" if values else "-"
