"""Which positions have the same future, told by 64-bit hashes."""

from __future__ import annotations

import torch
from torch import Tensor


def hash_futures(input_ids: Tensor, segment_ids: Tensor, reach: int = 0) -> Tensor:
    """Hash of the tokens from each position to the end of its document, or of the first `reach` of them.

    Equal futures have equal hashes, wherever they are, in whichever pack, on whichever rank. A future of L tokens is cut into
    runs whose lengths are the powers of two in L, from the smallest on; the hash of a run is mixed from those of its halves, and
    the hashes of the runs are mixed into L one after another. That is O(T log T) on the device of the tokens, which is never
    waited for.

    Different futures get the same hash only by accident: for given first argument `_mix` is one-to-one in the second and the
    other way round, so that two futures which differ in one run differ in the end; and where both arguments differ, the results
    are equal for about one pair in 2^64, as with random numbers. Among K futures that makes K^2 / 2^65 pairs, one in 10^8 packs
    at K = 500,000; an accident takes one negative from an anchor and does nothing else. Nothing stands against someone who
    looks for collisions.

    Args:
        input_ids: integers [T].
        segment_ids: [T] document number of each token, non-decreasing.
        reach: tokens that count, that of the position itself included; 0 is all up to the end of the document. (A summary made
            by L layers with a window of k sees L k + 1 tokens.)

    Returns:
        int64 [T].
    """
    total = input_ids.numel()
    position = torch.arange(total, device=input_ids.device)
    lengths = torch.searchsorted(segment_ids, segment_ids, side="right") - position
    if reach:
        lengths = lengths.clamp(max=reach)
    longest = min(reach, total) if reach else total
    hashes = lengths.clone()
    runs = _scramble(input_ids.long() + 1)  # hash of the `span` tokens from each position on
    following = position  # first token not in the hash yet
    span = 1
    while True:
        takes = (lengths & span) != 0
        hashes = torch.where(takes, _mix(hashes, runs[following.clamp(max=total - 1)]), hashes)
        following = following + torch.where(takes, span, 0)
        if 2 * span > longest:
            return hashes
        # Runs that reach beyond the end of a document come out wrong, and no length asks for them.
        runs = _mix(runs, runs[(position + span).clamp(max=total - 1)])
        span *= 2


def _mix(a: Tensor, b: Tensor) -> Tensor:
    return _scramble(_scramble(a) + b)


def _scramble(x: Tensor) -> Tensor:
    """One-to-one on int64: the steps of SplitMix64 (Steele, Lea and Flood 2014, section 5, with Stafford's constants). Products
    and sums wrap around."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Zeros, and not copies of the sign, come in from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
