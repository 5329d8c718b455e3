"""What the folder of a run says of it: its outcome, its curves and what it cost. Imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from flame.compare.metrics import Metric
from flame.compare.outcomes import ENDED, Outcome, read_outcome
from flame.config.run import FIRST_STEP_FILE, STARTS_FILE
from flame.logging.writers.json_lines import METRICS_FILE
from flame.runtime.json_lines import parse_line

Row = dict[str, float]


class Progress(NamedTuple):
    """Of a run at its start and at each log line."""

    steps: list[float]
    tokens: list[float]
    """Trained on."""
    tflops: list[float]
    """Spent, as the steps require them."""
    seconds: list[float]
    """Of training steps, without validations and checkpoints."""

    def find(self, unit: str, step: float) -> float:
        """How much of a unit was spent up to a step. Most validations are between two log lines."""
        values: list[float] = getattr(self, unit)
        places = list(zip(self.steps, values, strict=True))
        for (before, low), (after, high) in pairwise(places):
            if before <= step <= after:
                return low + (high - low) * (step - before) / (after - before)
        return values[-1]


class Point(NamedTuple):
    step: float
    value: float


@dataclass(frozen=True)
class Result:
    """One run of a comparison."""

    folder: Path
    outcome: Outcome
    rows: list[Row] = field(repr=False)
    first_step: dict[str, Any] | None
    """What the run began with; see `flame.trainer.first_step`."""
    revisions: frozenset[str]
    """Of the code, at its starts."""
    devices: frozenset[str] = frozenset()
    """Those that have made its steps."""

    @property
    def has_ended(self) -> bool:
        return self.outcome.state in ENDED

    @cached_property
    def progress(self) -> Progress:
        return read_progress(self.rows)

    def read_curve(self, name: str) -> list[Point]:
        """The logged values of a metric that are numbers."""
        return [Point(row["step"], row[name]) for row in self.rows if math.isfinite(row.get(name, math.nan))]

    def find_end(self, name: str) -> float | None:
        """The last logged value of a metric; None if the run has not ended, never logged it, or it is not finite there."""
        values = [row[name] for row in self.rows if name in row]
        return values[-1] if self.has_ended and values and math.isfinite(values[-1]) else None

    def find_goal(self, metric: Metric) -> float | None:
        """The first step at which the goal of a metric is reached; None for never."""
        goal = metric.goal
        assert goal is not None
        return next((point.step for point in self.read_curve(metric.name) if metric.is_reached(point.value, goal)), None)

    def list_numbers(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    @property
    def steps(self) -> float:
        return self.progress.steps[-1]

    @property
    def step_seconds(self) -> float:
        """Median over the log lines but for the first, in which libraries start and layers compile."""
        values = self.list_numbers("step_seconds")
        return statistics.median(values[1:] or values) if values else math.nan

    @property
    def wall_seconds(self) -> float:
        """What all steps took, the first ones too. Starts, validations and checkpoints are not counted; nan without a step."""
        return self.progress.seconds[-1] if self.steps else math.nan

    @property
    def peak_gib(self) -> float:
        return max(self.list_numbers("peak_memory_gib"), default=math.nan)

    @property
    def device(self) -> str:
        return " and ".join(sorted(self.devices)) or "unknown"


def read_result(folder: Path) -> Result:
    """Read what there is; a run that was never started has no rows."""
    starts = _read_json_lines(folder / STARTS_FILE)
    begun = _read_json_lines(folder / FIRST_STEP_FILE)
    # A start that failed before its first checkpoint has a line too. What counts is the last one from the run's beginning on.
    first_step = min((line.get("step", math.inf) for line in begun), default=math.inf)
    kept = begun[max((at for at, line in enumerate(begun) if line.get("step", math.inf) == first_step), default=0) :]
    revisions = frozenset(str(start.get("git_revision")) for start in starts)
    devices = frozenset(str(line["device"]) for line in kept if "device" in line)
    return Result(folder, read_outcome(folder), read_rows(folder), kept[0] if kept else None, revisions, devices)


def read_rows(folder: Path) -> list[Row]:
    """The lines of a run's metrics; one that is still being written is left out, and what was not finite is nan."""
    path = folder / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [row for line in lines if (row := parse_line(line)) is not None]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def read_progress(rows: Sequence[Row]) -> Progress:
    steps, tokens, tflops, seconds = [0.0], [0.0], [0.0], [0.0]
    for row in rows:
        if "step_tflops" in row:
            made = row["step"] - steps[-1]
            tflops.append(tflops[-1] + row["step_tflops"] * made)
            seconds.append(seconds[-1] + row.get("step_seconds", math.nan) * made)
            steps.append(row["step"])
            tokens.append(row["tokens_seen"])
    return Progress(steps, tokens, tflops, seconds)


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
