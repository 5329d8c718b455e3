"""If only answers count, packs the answer suffixes alone, so that the anti-causal pass skips the prompts.

A summary depends only on the tokens after its position. The pass over the suffixes, from the first label of each document to its
end, therefore gives the same summaries as the pass over the whole packed sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame.data.batch import PackedBatch, list_positions

SHARES = (2, 4, 8, 16)
"""The suffixes are padded to 1/2, 1/4, ... of the packed sequence. Few sizes, since layers are compiled for each of them."""
GRAIN = 128
"""These sizes are multiples of this many tokens, as 8-bit products and block-wise attention need. It is also long enough for
FlexAttention (`backends.SHORTEST_FLEX`)."""


class Suffixes(NamedTuple):
    """The suffix of each document from the last token of its prompt on, followed by padding."""

    batch: PackedBatch
    """The suffixes, padded to a bucket size. Its documents, sources and cursors are those of the whole packed sequence."""
    places: Tensor
    """int64 [n]: positions in the whole packed sequence of the n tokens before the padding, ascending."""

    def spread(self, rows: Tensor, total: int) -> Tensor:
        """[bucket, ...] -> [total, ...]: rows at their positions in the whole packed sequence, zeros elsewhere."""
        spread = rows.new_zeros(total, *rows.shape[1:])
        return spread.index_copy_(0, self.places, rows[: len(self.places)])


def cut_suffixes(batch: PackedBatch) -> Suffixes | None:
    """Pack the answer suffixes of a batch. None if there are no answers, or if the smallest bucket that fits is the whole batch.
    Does not wait for the device."""
    total = batch.input_ids.shape[1]
    lengths = batch.answers[:, 1] - batch.answers[:, 0]
    count = int(lengths.sum())
    bucket = find_share(count, total)
    if not count or bucket == total:
        return None
    device = batch.input_ids.device
    inside = list_positions(batch.answers)
    is_outside = np.ones(total, dtype=bool)
    is_outside[inside] = False
    order = torch.from_numpy(np.concatenate([inside, np.flatnonzero(is_outside)[: bucket - count]]))
    cu_seqlens = lay_out(lengths, bucket)
    if device.type == "cuda":
        order, cu_seqlens = (each.pin_memory().to(device, non_blocking=True) for each in (order, cu_seqlens))
    segments = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=device)
    suffixes = replace(
        batch,
        input_ids=batch.input_ids[:, order],
        labels=batch.labels[:, order],
        position_ids=batch.position_ids[:, order],
        segment_ids=torch.repeat_interleave(segments, cu_seqlens.diff(), output_size=bucket)[None],
        cu_seqlens=cu_seqlens,
    )
    return Suffixes(suffixes, order[:count])


def find_share(count: int, total: int) -> int:
    """The smallest of `total` and 1/2, 1/4, ... of it (rounded up to `GRAIN`) that is at least `count`."""
    shares = [-(-total // (divisor * GRAIN)) * GRAIN for divisor in SHARES]
    return min((share for share in shares if count <= share < total), default=total)


def lay_out(lengths: np.ndarray, bucket: int) -> Tensor:
    """cu_seqlens, int32 [S+1] on the CPU, of documents of these lengths and of padding up to `bucket` tokens. No padding document
    is longer than the longest."""
    longest = int(lengths.max())
    full, rest = divmod(bucket - int(lengths.sum()), longest)
    padding = [longest] * full + [rest] * (rest > 0)
    return torch.from_numpy(np.concatenate([[0], lengths, padding]).cumsum().astype(np.int32))
