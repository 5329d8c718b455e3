"""What the folder of a run says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flame.logging.console import find_row_kind
from flame.logging.writers.json_lines import METRICS_FILE
from flame.runtime.json_lines import parse_line

CONFIG_FILE = "config.toml"
ENDED_FILE = "ended"
"""In the folder of a run that need not be made again: "done" or "out of steps"."""

Row = dict[str, float]


def list_ended(runs: Path, pattern: str) -> list[Path]:
    """The folders below `runs` that match a glob and hold a run that has ended."""
    return sorted(path.parent for path in runs.glob(f"{pattern}/{ENDED_FILE}"))


def list_unended(runs: Path, pattern: str) -> list[Path]:
    """Those that hold a run that is under way, was cut off, or has failed."""
    return sorted(path.parent for path in runs.glob(f"{pattern}/{CONFIG_FILE}") if not path.with_name(ENDED_FILE).exists())


def read_rows(folder: Path) -> Iterator[Row]:
    """The lines of a run's metrics; one that is still being written is left out, and what was not finite is nan."""
    path = folder / METRICS_FILE
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if (row := parse_line(line)) is not None:
            yield {name: math.nan if value is None else value for name, value in row.items()}


def read_validations(folder: Path) -> Iterator[Row]:
    """The validations of a run, oldest first."""
    return (row for row in read_rows(folder) if find_row_kind(row) == "validation")


class Progress(NamedTuple):
    """Of a run at its start and at each log line."""

    steps: list[float]
    tokens: list[float]
    """Trained on."""
    tflops: list[float]
    """Spent, as the steps require them."""


def read_progress(folder: Path) -> Progress:
    steps, tokens, tflops = [0.0], [0.0], [0.0]
    for row in read_rows(folder):
        if "step_tflops" in row:
            tflops.append(tflops[-1] + row["step_tflops"] * (row["step"] - steps[-1]))
            steps.append(row["step"])
            tokens.append(row["tokens_seen"])
    return Progress(steps, tokens, tflops)
