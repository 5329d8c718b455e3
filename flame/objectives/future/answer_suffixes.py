"""If only answers count, runs the anti-causal pass over the answer suffixes alone (`flame.data.suffix_layout`).

A summary depends only on the tokens after its position. The pass over the suffixes, from the first label of each document to its
end, therefore gives the same summaries as the pass over the whole packed sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flame.data.batch import PackedBatch


class Suffixes(NamedTuple):
    """The suffix of each document from the last token of its prompt on, followed by padding."""

    batch: PackedBatch
    """n tokens. Documents, sources and cursors are those of the whole packed sequence."""
    positions: Tensor
    """int64 [n]: where these tokens are in the whole packed sequence."""

    def spread(self, rows: Tensor, total: int) -> Tensor:
        """[n, ...] -> [total, ...]: rows at their positions in the whole packed sequence. Those outside of the suffixes are
        arbitrary."""
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, self.positions, rows)


def cut_suffixes(batch: PackedBatch) -> Suffixes | None:
    """Take the suffixes out of a packed sequence. None if it has no layout of them: the pass then reads all of it. Does not wait
    for the device."""
    positions, cu_seqlens = batch.suffix_positions, batch.suffix_cu_seqlens
    if positions is None or cu_seqlens is None:
        return None
    segments = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=cu_seqlens.device)
    suffixes = replace(
        batch,
        input_ids=batch.input_ids[:, positions],
        labels=batch.labels[:, positions],
        position_ids=batch.position_ids[:, positions],
        segment_ids=torch.repeat_interleave(segments, cu_seqlens.diff(), output_size=len(positions))[None],
        cu_seqlens=cu_seqlens,
    )
    return Suffixes(suffixes, positions)
