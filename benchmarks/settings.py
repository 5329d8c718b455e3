"""Settings of the future loss whose cost is compared, by name: options beside those of the run."""

from __future__ import annotations

FUTURE = ["--objective.name", "future"]
SETTINGS: dict[str, list[str]] = {
    "next token": ["--objective.name", "next_token"],
    "future": FUTURE,
    "next token, weights kept gathered": ["--objective.name", "next_token", "--training.fsdp_reshard_after_forward", "false"],
    "future, weights kept gathered": [*FUTURE, "--training.fsdp_reshard_after_forward", "false"],
    "future, pointwise recomputed": [*FUTURE, "--activation_checkpoint.mode", "pointwise"],
    "future, fp8": [*FUTURE, "--future_encoder.precision", "fp8"],
    "8,192 anchors": [*FUTURE, "--future_encoder.max_anchors", "8192"],
    "projection to 256": [*FUTURE, "--future_encoder.projection_dim", "256"],
    "first 4 layers": [*FUTURE, "--future_encoder.layers", "4"],
    "one step in 4": [*FUTURE, "--future_encoder.every", "4"],
    "first 4 layers, 8,192 anchors": [*FUTURE, "--future_encoder.layers", "4", "--future_encoder.max_anchors", "8192"],
    "first 4 layers, 8,192 anchors, one step in 4": [
        *(*FUTURE, "--future_encoder.layers", "4", "--future_encoder.max_anchors", "8192", "--future_encoder.every", "4")
    ],
    "random, first 4 layers, 8,192 anchors": [
        *(*FUTURE, "--future_encoder.target", "random", "--future_encoder.layers", "4", "--future_encoder.max_anchors", "8192")
    ],
}
MEASURED = ("next token", "future", "future, fp8")
"""Those that docs/performance.md shows measured."""
