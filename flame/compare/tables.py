"""Markdown tables, and how a figure is shown with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return lines


def show_range(values: Sequence[float], form: str) -> str:
    """Median [lowest, highest]; the value alone where all are shown alike."""
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"
