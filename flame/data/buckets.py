"""Sizes that tensors are padded to, so that there are few different ones."""

from __future__ import annotations


def round_up_to_bucket(count: int, at_most: int, smallest: int = 64) -> int:
    """Round `count` up to a bucket size. Few different sizes limit recompilation and cached memory.

    Returns:
        `count` rounded up to a bucket size (a multiple of `smallest`; four or fewer per factor of two), at most `at_most`.
    """
    grain = max(smallest, 1 << max((count - 1).bit_length() - 3, 0))
    return min(max(-(-count // grain), 1) * grain, at_most)
