"""Names of metrics at services that group their panels by what stands before a slash. metrics.jsonl keeps the plain names."""

from __future__ import annotations

from collections.abc import Mapping

from flame.logging.console import VALIDATION_PREFIX
from flame.logging.metric_names import SPEED_METRICS

IN_PARTS = {"ce_loss", "tokens_seen", "lr"}
"""Metrics whose name may be followed by a slash and a source, or a module."""


def name_panels(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics with the name of their panel: `val/`, `perf/`, `train/`, or that of an objective's diagnostics."""
    return {name_panel(name): value for name, value in values.items()}


def name_panel(name: str) -> str:
    """Such as `train/ce_loss`, `val/ce_loss`, `perf/mfu` and `future/rank_predictions`."""
    head, slash, _ = name.partition("/")
    if name.startswith(VALIDATION_PREFIX):
        return f"val/{name.removeprefix(VALIDATION_PREFIX)}"
    if name in SPEED_METRICS:
        return f"perf/{name}"
    return name if slash and head not in IN_PARTS else f"train/{name}"
