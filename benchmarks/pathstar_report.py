"""Tables and plots of path-star runs, from their folders alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tomli

from benchmarks.run_queue import read_rows
from flame.data.pathstar import parse_sizes

SOLVED = 0.99
"""Exact match on held-out graphs that counts as solved."""
INSTRUMENTS = (
    "top1",
    "top1_same_document",
    "top1_other_documents",
    "rank_targets",
    "rank_hidden",
    "cosine_targets",
    "grad_ratio",
    "grad_cosine",
)


class Outcome(NamedTuple):
    """What one run came to."""

    size: str
    variant: str
    seed: int
    graphs: list[float]
    """Trained on at each validation."""
    exact_match: list[float]
    petaflops: list[float]
    """Spent at each validation, as the step requires them."""
    first_branch: float
    """At the last validation."""
    instruments: dict[str, float]
    """The last value of each."""

    @property
    def solved_at(self) -> int | None:
        """Index of the first validation that counts as solved."""
        return next((place for place, match in enumerate(self.exact_match) if match >= SOLVED), None)


def read_outcome(folder: Path) -> Outcome | None:
    """One run's folder; None if it was never validated."""
    config = tomli.loads((folder / "config.toml").read_text())
    sizes = parse_sizes(config["training"]["dataset_name"])
    tokens_a_graph = sum(size.num_tokens for size in sizes) / len(sizes)
    steps, tokens, petaflops = [0.0], [0.0], [0.0]  # at the start and at each log line
    validated, matches = [], []
    branch = 0.0
    instruments: dict[str, float] = {}
    for row in read_rows(folder):
        if "validation_exact_match" in row:
            validated.append(row["step"])
            matches.append(row["validation_exact_match"])
            branch = row["validation_first_branch"]
        elif "step_tflops" in row:
            petaflops.append(petaflops[-1] + row["step_tflops"] * (row["step"] - steps[-1]) / 1000)
            steps.append(row["step"])
            tokens.append(row["tokens_seen"])
            instruments |= {name: value for name, value in row.items() if name.startswith("future/") or name == "mi_lower_bound"}
    if not matches:
        return None
    # Most validations are between two log lines.
    graphs = (np.interp(validated, steps, tokens) / tokens_a_graph).tolist()
    spent = np.interp(validated, steps, petaflops).tolist()
    size, variant, seed = folder.parts[-3:]
    return Outcome(size, variant, int(seed.removeprefix("seed ")), graphs, matches, spent, branch, instruments)


def write_report(runs: Path, out: Path) -> None:
    """Write `pathstar.md` and `pathstar.png` into a folder."""
    folders = sorted(path.parent for path in runs.glob("*/*/*/metrics.jsonl"))
    outcomes = [outcome for outcome in map(read_outcome, folders) if outcome is not None]
    grouped: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        grouped[outcome.size, outcome.variant].append(outcome)
    (out / "pathstar.md").write_text(write_tables(grouped))
    plot_curves(grouped, out / "pathstar.png")


def write_tables(grouped: dict[tuple[str, str], list[Outcome]]) -> str:
    """Markdown: how often and how soon each variant solves each size; what the instruments show at the end."""
    columns = (
        "graphs",
        "variant",
        "solved",
        "graphs to 99 %, thousands",
        "PFLOP to 99 %",
        "exact match at the end",
        "first branch",
    )
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for (size, variant), outcomes in grouped.items():
        solved = [(o.graphs[o.solved_at] / 1000, o.petaflops[o.solved_at]) for o in outcomes if o.solved_at is not None]
        needed = _show_range([graphs for graphs, _ in solved], "{:,.0f}") if solved else "-"
        work = f"{statistics.median(flops for _, flops in solved):,.1f}" if solved else "-"
        most = max(o.graphs[-1] for o in outcomes) / 1000
        needed += "" if len(solved) == len(outcomes) else f" (others: not within {most:,.0f})"
        ends = _show_range([100 * o.exact_match[-1] for o in outcomes], "{:.1f}")
        branch = statistics.mean(100 * o.first_branch for o in outcomes)
        rows.append(f"| {size} | {variant} | {len(solved)}/{len(outcomes)} | {needed} | {work} | {ends} | {branch:.1f} |")
    measured = {key: outcomes for key, outcomes in grouped.items() if any(o.instruments for o in outcomes)}
    rows += ["", "| graphs | variant | ln N - loss | " + " | ".join(INSTRUMENTS) + " |", "|---" * (3 + len(INSTRUMENTS)) + "|"]
    for (size, variant), outcomes in measured.items():
        names = ["mi_lower_bound", *(f"future/{name}" for name in INSTRUMENTS)]
        means = (_mean_of(name, outcomes) for name in names)
        rows.append(f"| {size} | {variant} | " + " | ".join(means) + " |")
    return "\n".join(rows) + "\n"


def plot_curves(grouped: dict[tuple[str, str], list[Outcome]], path: Path) -> None:
    """Exact match against graphs seen: a panel a size, a colour a variant, a line a seed."""
    sizes = list(dict.fromkeys(size for size, _ in grouped))
    columns = min(len(sizes), 3)
    rows = -(-len(sizes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, sharey=True)
    colors = {variant: f"C{place % 10}" for place, variant in enumerate(dict.fromkeys(variant for _, variant in grouped))}
    for axis, size in zip(axes.flat, sizes, strict=False):
        for (own_size, variant), outcomes in grouped.items():
            for place, outcome in enumerate(outcomes if own_size == size else ()):
                label = variant if place == 0 else None
                thousands = [graphs / 1000 for graphs in outcome.graphs]
                axis.plot(thousands, outcome.exact_match, color=colors[variant], label=label, linewidth=1, alpha=0.8)
        axis.set(title=f"G({size.replace('x', ', ')})", xlabel="graphs seen, thousands", ylim=(-0.02, 1.02))
        axis.legend(fontsize=6)
    for axis in islice(axes.flat, len(sizes), None):
        axis.remove()
    axes[0, 0].set_ylabel("exact match, held-out graphs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean_of(name: str, outcomes: Iterable[Outcome]) -> str:
    values = [o.instruments[name] for o in outcomes if name in o.instruments]
    return f"{statistics.mean(values):.3g}" if values else "-"


def _show_range(values: Sequence[float], form: str) -> str:
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"
