"""Tables and pictures of `benchmarks.growth`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.timing import Timing
from flame.compare.tables import format_table

BASE = "next token"
TITLES = {
    "tokens": "Tokens of a step",
    "documents": "Mean length of documents",
    "models": "Model",
    "recomputed": "Tokens of a step, all activations recomputed",
}
COLUMNS = ["model", "tokens", "documents", "step", "ms [low, high]", "ratio to next token", "by FLOPs", "tokens/s", "peak GiB"]

Row = dict[str, Any]


def write_tables(rows: Sequence[Row], notes: Sequence[str], title: str, path: Path) -> None:
    lines = [title, ""]
    for part, heading in TITLES.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            cells = [line for row in own for line in list_cells(row)]
            lines += [f"### {heading}", "", *format_table(COLUMNS, cells), ""]
    lines += [f"- {note}" for note in notes]
    path.write_text("\n".join(lines).rstrip() + "\n")


def list_cells(row: Row) -> list[list[str]]:
    """A point's lines of the table, one a setting."""
    lines = []
    for name, cell in row["cells"].items():
        start = [row["model"], f"{row['tokens']:,}", f"{row['documents']:,}" if "documents" in row else "-", name]
        if isinstance(cell, str):
            lines.append([*start, cell, "-", "-", "-", "-"])
            continue
        timing = Timing(**cell["timing"])
        shown = timing.show() + ("" if cell["is_finite"] else ", a loss that is not finite")
        ratios = [f"{ratio:.3f}" if ratio is not None else "-" for ratio in (find_ratio(row, name), find_flops_ratio(row, name))]
        speed = f"{row['tokens'] / timing.median_ms * 1000:,.0f}"
        lines.append([*start, shown, *ratios, speed, f"{cell['peak_gib']:.1f}"])
    return lines


def find_ratio(row: Row, name: str) -> float | None:
    """Time of a step, in next-token steps; None if one of the two was not measured."""
    own, base = row["cells"].get(name), row["cells"].get(BASE)
    is_there = isinstance(own, dict) and isinstance(base, dict)
    return own["timing"]["median_ms"] / base["timing"]["median_ms"] if is_there else None


def find_flops_ratio(row: Row, name: str) -> float | None:
    own, base = row["cells"].get(name), row["cells"].get(BASE)
    return own["flops"] / base["flops"] if isinstance(own, dict) and isinstance(base, dict) else None


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time over tokens, and the ratio to next token over tokens and over the length of documents. Dashed: the ratio of FLOPs."""
    figure, (times, by_tokens, by_length) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    of_tokens = [row for row in rows if row["part"] == "tokens"]
    of_length = [row for row in rows if row["part"] == "documents" and "documents" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["cells"]))
    for number, name in enumerate(names):
        color = f"C{number}"
        measured = [row for row in of_tokens if isinstance(row["cells"].get(name), dict)]
        medians = [row["cells"][name]["timing"]["median_ms"] for row in measured]
        times.plot([row["tokens"] for row in measured], medians, "o-", color=color, label=name)
        if name != BASE:
            _draw_ratio(by_tokens, of_tokens, name, color, lambda row: row["tokens"])
            _draw_ratio(by_length, of_length, name, color, lambda row: row["tokens"] / row["documents"])
    times.set(xlabel="tokens of a step", ylabel="ms a step", yscale="log")
    by_tokens.set(xlabel="tokens of a step", ylabel="time, in next-token steps")
    by_length.set(xlabel="mean length of documents, tokens", ylabel="time, in next-token steps")
    for axes in (times, by_tokens, by_length):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_ratio(axes, rows: Sequence[Row], name: str, color: str, place) -> None:
    for find, style, label in ((find_ratio, "o-", name), (find_flops_ratio, "--", f"{name}, by FLOPs")):
        points = sorted((place(row), ratio) for row in rows if (ratio := find(row, name)) is not None)
        axes.plot([x for x, _ in points], [y for _, y in points], style, color=color, label=label)
