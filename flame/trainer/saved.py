"""What a run has saved, in words. Imports no torch: the launcher says it within a moment of a failure."""

from __future__ import annotations

from flame.config.locations import find_own_checkpoint
from flame.config.schema import JobConfig


def describe_saved(config: JobConfig) -> str:
    """What an ended run has saved, and what the same command does."""
    if not config.checkpoint.enable_checkpoint:
        return "nothing is saved: checkpoints are off"
    if newest := find_own_checkpoint(config.checkpoint_folder):
        return f"the same command goes on from {newest}"
    return "nothing is saved yet: the same command begins anew"
