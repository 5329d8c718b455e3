"""Counts of one optimizer step over all micro-steps and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

from flame.data.batch import PackedBatch
from flame.logging.counters import Counters
from flame.objectives.base import Objective
from flame.runtime.distributed import sum_over_ranks


class StepCounts(NamedTuple):
    """Totals of one optimizer step over micro-steps and ranks. Losses are divided by `labels` and `aux`."""

    stop_votes: int
    """Number of ranks that are asked to stop."""
    mistakes: int
    """Number of ranks that have found a mistake in their data."""
    labels: int
    aux: int
    """Items that the objective's loss is averaged over."""
    bad_rows: int
    tokens_by_source: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(self.tokens_by_source.values())

    def add_to(self, counters: Counters) -> None:
        """Add them to the run's totals."""
        for name, tokens in self.tokens_by_source.items():
            counters.tokens_by_source[name] += tokens
        counters.tokens_seen += self.tokens
        counters.bad_rows += self.bad_rows


def count_over_ranks(
    batches: Sequence[PackedBatch],
    objective: Objective | None,
    marked: Sequence[bool],
    source_names: Sequence[str],
    is_stop_requested: bool,
    has_mistake: bool,
) -> StepCounts:
    """Count the packed sequences of one step, in one collective on the CPU, which does not wait for the GPU.

    Args:
        marked: for each micro-step, whether it has the objective's loss.
    """
    by_source = [sum(batch.input_ids.numel() for batch in batches if batch.source == name) for name in source_names]
    stop_votes, mistakes, labels, aux, bad_rows, *tokens = sum_over_ranks(
        is_stop_requested,
        has_mistake,
        sum(batch.num_labels for batch in batches),
        sum(map(objective.count, compress(batches, marked))) if objective is not None else 0,
        sum(batch.bad_rows for batch in batches),
        *by_source,
    )
    return StepCounts(stop_votes, mistakes, labels, aux, bad_rows, dict(zip(source_names, tokens, strict=True)))
