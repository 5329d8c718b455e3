"""Names of metrics at services that group their panels by what stands before a slash. metrics.jsonl keeps the plain names."""

from __future__ import annotations

from collections.abc import Mapping

from flame.logging.console import VALIDATION_PREFIX

SPEED = {
    "tokens_per_second",
    "step_seconds",
    "step_tflops",
    "peak_memory_gib",
    "data_wait_seconds",
    "data_wait_fraction",
    "mfu",
    "mfu_aux_forward",
    "mfu_heads",
}
BY_SOURCE = {"ce_loss", "tokens_seen"}
"""Metrics whose name may be followed by a slash and a source."""


def name_panels(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics with the name of their panel: `val/`, `perf/`, `train/`, or that of an objective's diagnostics."""
    return {name_panel(name): value for name, value in values.items()}


def name_panel(name: str) -> str:
    """Such as `train/ce_loss`, `val/ce_loss`, `perf/mfu` and `future/rank_predictions`."""
    head, slash, _ = name.partition("/")
    if name.startswith(VALIDATION_PREFIX):
        return f"val/{name.removeprefix(VALIDATION_PREFIX)}"
    if name in SPEED:
        return f"perf/{name}"
    return name if slash and head not in BY_SOURCE else f"train/{name}"
