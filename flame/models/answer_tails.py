"""Where only answers count, the part of a pack whose summaries are asked for, as a pack of its own.

An answer ends its document, and a summary sees what is behind it and nothing before: the anti-causal pass over the ends of the
documents gives the same summaries there as one over the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.future_mask import list_marked

SHARES = (2, 4, 8, 16)
"""Parts of a pack that may be read: a half, a quarter and so on. Few, since layers are compiled for each number of tokens."""
GRAIN = 128
"""Tokens that these parts are multiples of, as products in 8 bits and attention in blocks want them. So none is too short for
FlexAttention (`future_lm.SHORTEST_FLEX`)."""


class Tails(NamedTuple):
    """The ends of documents, from the last token of the prompt on, and other tokens behind them to fill up."""

    batch: PackedBatch
    """Of room tokens. What it says of documents, sources and cursors is the whole pack's."""
    places: Tensor
    """int64 [n]: of the first n of its tokens, which are no filling, in the whole pack; ascending."""

    def spread(self, rows: Tensor, total: int) -> Tensor:
        """[room, ...] -> [total, ...]: rows of the pack's tokens, zeros where it has none."""
        spread = rows.new_zeros(total, *rows.shape[1:])
        return spread.index_copy_(0, self.places, rows[: len(self.places)])


def cut_tails(batch: PackedBatch) -> Tails | None:
    """The tails of a packed batch of which only answers count, or None where the whole is hardly more. Does not wait for the
    device."""
    total = batch.input_ids.shape[1]
    lengths = batch.piece_labels[batch.piece_labels > 0] + 1
    count = int(lengths.sum())
    room = find_share(count, total)
    if not count or room == total:
        return None
    labels = batch.labels[0]
    is_tail = labels != NO_LABEL
    is_tail[1:] |= is_tail[:-1].clone()  # the last token of an answer has no label, and is one
    order = list_marked(is_tail, room)
    cu_seqlens = lay_out(lengths, room)
    if labels.is_cuda:
        cu_seqlens = cu_seqlens.pin_memory().to(labels.device, non_blocking=True)
    segments = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=labels.device)
    tails = replace(
        batch,
        input_ids=batch.input_ids[:, order],
        labels=batch.labels[:, order],
        position_ids=batch.position_ids[:, order],
        segment_ids=torch.repeat_interleave(segments, cu_seqlens.diff(), output_size=room)[None],
        cu_seqlens=cu_seqlens,
    )
    return Tails(tails, order[:count])


def find_share(count: int, total: int) -> int:
    """The least of total and a half, a quarter and so on of it, rounded up to `GRAIN`, that holds count."""
    shares = [-(-total // (divisor * GRAIN)) * GRAIN for divisor in SHARES]
    return min((share for share in shares if count <= share < total), default=total)


def lay_out(lengths: np.ndarray, room: int) -> Tensor:
    """cu_seqlens, int32 [S+1] on the CPU, of documents of these lengths and as many more as fill the room, none longer than the
    longest."""
    longest = int(lengths.max())
    full, rest = divmod(room - int(lengths.sum()), longest)
    filling = [longest] * full + [rest] * (rest > 0)
    return torch.from_numpy(np.concatenate([[0], lengths, filling]).cumsum().astype(np.int32))
