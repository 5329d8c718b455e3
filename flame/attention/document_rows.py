"""One document of a packed sequence per row, for attention on CPUs and for models that take rows."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

KEYS_PER_WIDTH = 6
"""Attention over 6 d keys takes as much arithmetic as the matrix products of a token in a layer of width d. A typical layer has
12 d^2 weights; scores and weighted sums over L keys take 2 d L products. Wide heads and experts change this by up to 2x."""
MAX_POSITIONS_PER_TOKEN = 4
"""Limit on positions in rows, padding included, per token. The memory that a layer keeps for the backward grows with them."""


class DocumentRows:
    """A packed sequence of S documents as S rows, zero-padded on the right to the longest. Waits for the device.

    Args:
        cu_seqlens: int32 [S+1].
        total: T.
    """

    def __init__(self, cu_seqlens: Tensor, total: int):
        cu = cu_seqlens.long()
        self.lengths = cu.diff()
        """int64 [S]"""
        self.longest = int(self.lengths.max())
        self.total = total
        self.num_places = len(self.lengths) * self.longest
        """Positions in all rows, padding included."""
        self._starts = cu[:-1]

    def lay_out(self, values: Tensor) -> Tensor:
        """[T, ...] -> [S, longest, ...]."""
        flat = values.new_zeros(self.num_places, *values.shape[1:])
        return flat.index_copy(0, self._positions, values).unflatten(0, (len(self.lengths), self.longest))

    def collect(self, rows: Tensor) -> Tensor:
        """[S, longest, ...] -> [T, ...]."""
        return rows.flatten(0, 1).index_select(0, self._positions)

    @cached_property
    def _positions(self) -> Tensor:
        """int64 [T]: index of each token in the flattened rows."""
        token = torch.arange(self.total, device=self.lengths.device)
        row_starts = torch.arange(len(self.lengths), device=self.lengths.device) * self.longest
        return token + torch.repeat_interleave(row_starts - self._starts, self.lengths, output_size=self.total)


def is_cheaper_in_rows(rows: DocumentRows, width: int) -> bool:
    """Whether one document per row likely takes less arithmetic than one T x T mask, within `MAX_POSITIONS_PER_TOKEN`."""
    in_rows, as_one = estimate_work(rows, width)
    return in_rows <= as_one and rows.num_places <= MAX_POSITIONS_PER_TOKEN * rows.total


def estimate_work(rows: DocumentRows, width: int) -> tuple[int, int]:
    """Arithmetic of a layer, in query-key pairs: with one document per row, padding included, and with one row of T tokens under
    a T x T mask. CPUs compute masked pairs too."""
    others = KEYS_PER_WIDTH * width
    return rows.num_places * (others + rows.longest), rows.total * (others + rows.total)
