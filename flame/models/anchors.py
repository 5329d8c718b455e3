"""Which positions of a packed batch guess their future, and where their targets are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flame.components.seeds import derive_seed
from flame.config import JobConfig
from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.future_mask import count_anchors, draw_anchors, find_anchors, find_neighbors, find_room


class Anchors(NamedTuple):
    """n places of a pack of T tokens, some of them only there to fill up."""

    positions: Tensor | None
    """int64 [n], ascending; None is all T."""
    is_valid: Tensor
    """bool [n]"""

    def pick(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [n, ...], the rows at the anchors."""
        return rows if self.positions is None else rows[self.positions]

    def pick_ahead(self, rows: Tensor, shift: int) -> Tensor:
        """[T, ...] -> [n, ...], the rows `shift` behind the anchors; arbitrary ones where an anchor is not valid."""
        if self.positions is None:
            return torch.cat([rows[shift:], rows[:shift]])
        return rows[(self.positions + shift) % len(rows)]


def select_anchors(batch: PackedBatch, config: JobConfig, room: int) -> Anchors:
    """Positions with a target; where only answers count, those whose next token is one.

    Args:
        room: n, from `find_anchor_room` or more.
    """
    is_valid = find_anchors(batch.segment_ids[0], config.future_encoder.target_shift)
    if config.training.loss_on == "answer":
        is_valid = is_valid & (batch.labels[0] != NO_LABEL)
    if room == len(is_valid):
        return Anchors(None, is_valid)
    return Anchors(*draw_anchors(is_valid, room, derive_seed(config.training.seed, batch.sequence_index)))


def find_anchor_room(batch: PackedBatch, config: JobConfig) -> int:
    """Places to keep for the anchors of a batch: T, or fewer where only some tokens can be anchors. Asks no device."""
    total, future = batch.input_ids.shape[1], config.future_encoder
    room = future.max_anchors or total
    if config.training.loss_on == "answer":
        room = find_room(count_anchors(batch.cu_seqlens, future.target_shift, room, batch.piece_labels), min(room, total))
    return room


def find_excluded(batch: PackedBatch, anchors: Anchors, reach: int) -> tuple[Tensor, Tensor] | None:
    """First and last anchor that are no negatives of each, int64 [n] and [n]: those at most `reach` away in its document."""
    if not reach:
        return None
    first, last = find_neighbors(batch.segment_ids[0], reach)
    if anchors.positions is None:
        return first, last
    first, last = anchors.pick(first), anchors.pick(last)
    return torch.searchsorted(anchors.positions, first), torch.searchsorted(anchors.positions, last, side="right") - 1
