"""Settings of the future loss whose cost is compared, by name: options beside those of the run."""

from __future__ import annotations

FUTURE = ["--objective.name", "future"]
NEXT_TOKEN = ["--objective.name", "next_token"]
RANDOM = [*FUTURE, "--future_encoder.target", "random"]
FP8 = ["--future_encoder.precision", "fp8"]
HEAD = ["--training.float8_head", "true"]
ROWWISE, MIXED = (["--training.float8", recipe] for recipe in ("rowwise", "rowwise_with_gw_hp"))
SETTINGS: dict[str, list[str]] = {
    "next token": NEXT_TOKEN,
    "future": FUTURE,
    "next token, weights kept gathered": [*NEXT_TOKEN, "--training.fsdp_reshard_after_forward", "false"],
    "future, weights kept gathered": [*FUTURE, "--training.fsdp_reshard_after_forward", "false"],
    "future, pointwise recomputed": [*FUTURE, "--activation_checkpoint.mode", "pointwise"],
    "future, pointwise recomputed, bfloat16 moments": [
        *(*FUTURE, "--activation_checkpoint.mode", "pointwise", "--optimizer.state_dtype", "bfloat16")
    ],
    "future, fp8": [*FUTURE, *FP8],
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
    "next token, float8 rowwise": [*NEXT_TOKEN, *ROWWISE],
    "next token, float8 rowwise_with_gw_hp": [*NEXT_TOKEN, *MIXED],
    "next token, 8-bit head": [*NEXT_TOKEN, *HEAD],
    "next token, float8 rowwise, 8-bit head": [*NEXT_TOKEN, *ROWWISE, *HEAD],
    "next token, float8 rowwise_with_gw_hp, 8-bit head": [*NEXT_TOKEN, *MIXED, *HEAD],
    "future, float8 rowwise": [*FUTURE, *ROWWISE],
    "future, float8 rowwise, 8-bit head": [*FUTURE, *ROWWISE, *HEAD],
    "random": RANDOM,
    "random, float8 rowwise": [*RANDOM, *ROWWISE],
    "random, float8 rowwise, fp8": [*RANDOM, *ROWWISE, *FP8],
}
MEASURED = ("next token", "future", "future, fp8")
"""Those that docs/performance.md shows measured."""
