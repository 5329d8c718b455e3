"""Anchors: the positions of a packed sequence that predict a summary, and the positions of their targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flame.attention.masks import draw_anchors, find_anchors, find_neighbors
from flame.data.batch import NO_LABEL, PackedBatch
from flame.data.buckets import round_up_to_bucket
from flame.objectives.future.options import FutureOptions
from flame.runtime.seeds import derive_seed

SHIFT_DRAW = 1 << 32
"""Added to the run's seed, so that shifts are drawn independently of anchors."""


class Anchors(NamedTuple):
    """n positions of a packed sequence of T tokens. Those that are not valid are padding."""

    positions: Tensor | None
    """int64 [n], ascending; None is all T."""
    is_valid: Tensor
    """bool [n]"""
    shift: int
    """A target is so many tokens after its anchor."""

    def pick(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [n, ...], the rows at the anchors."""
        return rows if self.positions is None else rows[self.positions]

    def pick_targets(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [n, ...], the rows `shift` after the anchors; arbitrary rows for padding."""
        if self.positions is None:
            return torch.cat([rows[self.shift :], rows[: self.shift]])
        return rows[(self.positions + self.shift) % len(rows)]


def choose_shift(batch: PackedBatch, options: FutureOptions, seed: int) -> int:
    """The shift of a packed sequence. One that is drawn depends on the run's seed and on the sequence alone."""
    if not options.target_shift_max:
        return options.target_shift
    return 1 + derive_seed(seed + SHIFT_DRAW, batch.sequence_index) % options.target_shift_max


def select_anchors(batch: PackedBatch, shift: int, bucket: int, seed: int) -> Anchors:
    """Select the positions that have a target. If only answers count, the next token must also be part of an answer.

    Args:
        shift: from `choose_shift`.
        bucket: n, at least `find_anchor_bucket`.
        seed: the run's; used to draw n if there are more.
    """
    is_valid = find_anchors(batch.segment_ids[0], shift)
    if batch.answers_only:
        is_valid = is_valid & (batch.labels[0] != NO_LABEL)
    if bucket == len(is_valid):
        return Anchors(None, is_valid, shift)
    return Anchors(*draw_anchors(is_valid, bucket, seed, batch.number), shift)


def find_anchor_bucket(batch: PackedBatch, shift: int, max_anchors: int) -> int:
    """Padded number of anchors: T, or a smaller bucket if only some tokens can be anchors. Does not wait for the device."""
    total = batch.input_ids.shape[1]
    bucket = min(max_anchors or total, total)
    if not batch.answers_only:
        return bucket
    if shift <= 1:  # all labels have a target; a CUDA graph knows this number alone
        return min(batch.num_predicted, bucket)
    return round_up_to_bucket(count_anchors(batch, shift, bucket), bucket)


def count_anchors(batch: PackedBatch, shift: int, at_most: int) -> int:
    """Number of positions that have a target. Does not wait for the device.

    Args:
        at_most: upper bound of the result; 0 means none.
    """
    count = batch.count_ahead(max(shift, 1))
    return min(count, at_most) if at_most else count


def find_excluded(batch: PackedBatch, anchors: Anchors, distance: int) -> tuple[Tensor, Tensor] | None:
    """For each anchor, the range of anchors that are excluded from its negatives: those at most `distance` away in its document.

    Returns:
        first and last excluded anchor, int64 [n] each; None for a distance of 0.
    """
    if not distance:
        return None
    first, last = find_neighbors(batch.segment_ids[0], distance)
    if anchors.positions is None:
        return first, last
    first, last = anchors.pick(first), anchors.pick(last)
    return torch.searchsorted(anchors.positions, first), torch.searchsorted(anchors.positions, last, side="right") - 1
