"""The metrics that are compared: which direction is better, and what counts as reached. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flame.logging.console import EVALUATION_PREFIX

LOWER = ("loss", "ce_loss", "aux_loss", "largest_ce_loss")
HIGHER = ("exact_match", "first_branch", "infonce_accuracy", "mi_lower_bound", "positive_cosine")
VALIDATION = "validation_"
TOTAL = "loss"
"""Cross entropy and loss_weight times the objective's loss."""
OF_OBJECTIVE = (TOTAL, "aux_loss")
"""Numbers of different meaning under each objective."""
OF_ANSWERS = ("exact_match", "first_branch")
"""Validation has them where `training.loss_on` is "answer"."""
EVALUATION_LOWER = ("bits_per_byte", "ce_loss")
EVALUATION_HIGHER = ("accuracy", "accuracy_per_char", "accuracy_per_byte", "exact_match")
CLOSENESS = 0.85
"""Of `difflib`: a name as close to a known metric is a slip. Objectives may log metrics of their own, so others pass."""


@dataclass(frozen=True)
class Metric:
    """A metric of metrics.jsonl. Its value at the end of a run is the last one that is logged."""

    name: str
    is_higher_better: bool
    goal: float | None = None
    """What counts as solved: the report says how many runs reach it, and what that takes."""
    stop_at: float | None = None
    """A run ends once this is reached."""

    @property
    def better(self) -> str:
        return "higher" if self.is_higher_better else "lower"

    def is_reached(self, value: float, wanted: float) -> bool:
        """Whether a value is at least as good as another."""
        return value >= wanted if self.is_higher_better else value <= wanted

    def is_goal_after_stop(self) -> bool:
        """Whether a run ends before it reaches the goal."""
        return self.goal is not None and self.stop_at is not None and not self.is_reached(self.stop_at, self.goal)

    def should_stop(self, rows: Iterable[Mapping[str, float]]) -> bool:
        """Whether a logged row has reached `stop_at`, in the metric and in all its parts, such as `NAME/5x5`."""
        wanted = self.stop_at
        if wanted is None:
            return False
        return any(
            all(self.is_reached(value, wanted) for name, value in row.items() if f"{name}/".startswith(f"{self.name}/"))
            for row in rows
            if math.isfinite(row.get(self.name, math.nan))
        )


def list_known() -> list[str]:
    """Names whose better direction is known."""
    return [prefix + name for name in (*LOWER, *HIGHER) for prefix in ("", VALIDATION)]


def read_better(name: str) -> str | None:
    """ "lower" or "higher"; None where it is not known."""
    if name.startswith(EVALUATION_PREFIX):
        base = name.rpartition("/")[2]
        return "lower" if base in EVALUATION_LOWER else "higher" if base in EVALUATION_HIGHER else None
    base = name.partition("/")[0].removeprefix(VALIDATION)
    return "lower" if base in LOWER else "higher" if base in HIGHER else None


def find_meant(name: str) -> str | None:
    """The known metric that a name is a slip of; None for a known one, and for one that is like none."""
    if read_better(name) is not None:
        return None
    if name.startswith(EVALUATION_PREFIX):
        place, slash, base = name.rpartition("/")
        near = difflib.get_close_matches(base, (*EVALUATION_LOWER, *EVALUATION_HIGHER), n=1, cutoff=CLOSENESS)
        return f"{place}{slash}{near[0]}" if near else None
    base, slash, part = name.partition("/")
    # A right prefix counts for nothing: it makes any two names alike.
    prefix = VALIDATION if base.startswith(VALIDATION) else ""
    known = (*LOWER, *HIGHER) if prefix else list_known()
    near = difflib.get_close_matches(base.removeprefix(prefix), known, n=1, cutoff=CLOSENESS)
    return f"{prefix}{near[0]}{slash}{part}" if near else None
