"""Where the answer suffixes of a packed sequence are, if only answers count. A pass over them alone skips the prompts.

The suffix of a document runs from the last token of its prompt to its end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

SHARES = (2, 4, 8, 16)
"""The suffixes are padded to 1/2, 1/4, ... of the packed sequence. Few sizes, since layers are compiled for each of them."""
GRAIN = 128
"""These sizes are multiples of this many tokens, as 8-bit products and block-wise attention need. It is also long enough for
FlexAttention (`flame.attention.backends.SHORTEST_FLEX`)."""


class SuffixLayout(NamedTuple):
    """n positions of a packed sequence: all of the suffixes, then others as padding."""

    positions: torch.Tensor
    """int64 [n], different ones; those of the suffixes ascend."""
    cu_seqlens: torch.Tensor
    """int32 [S+1], from 0 to n: bounds of the suffixes and of the documents that padding makes."""


def lay_out_suffixes(answers: np.ndarray, total: int) -> SuffixLayout | None:
    """Pack the suffixes. None if there are no answers, or if the smallest bucket that fits is the whole packed sequence.

    Args:
        answers: as `PackedBatch.answers`.
        total: tokens of the packed sequence.
    """
    lengths = answers[:, 1] - answers[:, 0]
    count = int(lengths.sum())
    bucket = find_share(count, total)
    if not count or bucket == total:
        return None
    inside = list_positions(answers)
    is_outside = np.ones(total, dtype=bool)
    is_outside[inside] = False
    positions = np.concatenate([inside, np.flatnonzero(is_outside)[: bucket - count]])
    return SuffixLayout(torch.from_numpy(positions), torch.from_numpy(_find_bounds(lengths, bucket)))


def find_share(count: int, total: int) -> int:
    """The smallest of `total` and 1/2, 1/4, ... of it (rounded up to `GRAIN`) that is at least `count`."""
    shares = [-(-total // (divisor * GRAIN)) * GRAIN for divisor in SHARES]
    return min((share for share in shares if count <= share < total), default=total)


def list_positions(spans: np.ndarray) -> np.ndarray:
    """All numbers in the spans [start, end), int64 [k, 2] -> int64 [n]."""
    starts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    before = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _find_bounds(lengths: np.ndarray, bucket: int) -> np.ndarray:
    """cu_seqlens of documents of these lengths and of padding up to `bucket` tokens. No padding document is longer than the
    longest."""
    longest = int(lengths.max())
    full, rest = divmod(bucket - int(lengths.sum()), longest)
    padding = [longest] * full + [rest] * (rest > 0)
    return np.concatenate([[0], lengths, padding]).cumsum().astype(np.int32)
