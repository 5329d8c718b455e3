"""What one optimizer step holds, over all of its micro-steps and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flame.components.counters import Counters
from flame.components.distributed import sum_over_ranks
from flame.data.batch import PackedBatch
from flame.models.future_mask import count_anchors
from flame.objective_config import FutureEncoder


class StepCounts(NamedTuple):
    """Totals of one optimizer step over micro-steps and ranks. The losses are divided by them."""

    stop_votes: int
    """Ranks that are asked to stop."""
    labels: int
    anchors: int
    bad_rows: int
    tokens_by_source: dict[str, int]

    @property
    def tokens(self) -> int:
        """Of all sources."""
        return sum(self.tokens_by_source.values())

    def add_to(self, counters: Counters) -> None:
        """Add them to the run's totals."""
        for name, tokens in self.tokens_by_source.items():
            counters.tokens_by_source[name] += tokens
        counters.tokens_seen += self.tokens
        counters.bad_rows += self.bad_rows


def count_over_ranks(
    batches: Sequence[PackedBatch], future: FutureEncoder, source_names: Sequence[str], is_stop_requested: bool
) -> StepCounts:
    """Count what the ranks' batches of one step hold. On the CPU, in one collective: it does not wait for the GPU."""
    by_source = [sum(batch.input_ids.numel() for batch in batches if batch.source == name) for name in source_names]
    stop_votes, labels, anchors, bad_rows, *tokens = sum_over_ranks(
        is_stop_requested,
        sum(batch.num_labels for batch in batches),
        sum(count_anchors(batch.cu_seqlens, future.target_shift, future.max_anchors, batch.piece_labels) for batch in batches),
        sum(batch.bad_rows for batch in batches),
        *by_source,
    )
    return StepCounts(stop_votes, labels, anchors, bad_rows, dict(zip(source_names, tokens, strict=True)))
