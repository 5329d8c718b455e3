"""The attention masks that the model runs on, for one packed batch in both directions.

A query with no allowed key (the last token of each document in the anti-causal pass) must get exactly zero from attention:
boolean masks in SDPA and FlexAttention's BlockMask give that, an additive mask does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = 128

AttentionMask = Tensor | BlockMask
Direction = Literal["causal", "future"]


def build_boolean_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> Tensor:
    """The mask of one direction for SDPA.

    Args:
        segment_ids: int [T], document number of each token, non-decreasing.
        direction: "causal" allows kv <= q, "future" allows kv > q, both inside one document.
        window_k: keys at most this far away; 0 means no window.

    Returns:
        bool [1, 1, T, T], true where attention is allowed.
    """
    index = torch.arange(segment_ids.numel(), device=segment_ids.device)
    allows = _mask_mod(segment_ids, direction, window_k)
    return allows(None, None, index[:, None], index[None, :])[None, None]


def build_row_mask(lengths: Tensor, longest: int, direction: Direction, window_k: int = 0) -> Tensor:
    """The mask of one direction for SDPA, of documents that are a row each, padded on the right.

    No token of a document may see the padding. What the padding sees is read by nobody: in the "causal" direction the document
    before it, which needs no mask of its own for each row and leaves no row of the gradient without a key; else nothing.

    Args:
        lengths: int64 [S], tokens of each document.
        longest: L, the longest of them.
        direction, window_k: as `build_boolean_mask`.

    Returns:
        bool [1, 1, L, L] ("causal", the same for all documents) or [S, 1, L, L] ("future"), true where attention is allowed.
    """
    index = torch.arange(longest, device=lengths.device)
    ahead = index[None, :] - index[:, None]
    allowed = ahead <= 0 if direction == "causal" else ahead > 0
    if window_k:
        allowed &= ahead.abs() <= window_k
    if direction == "causal":
        return allowed[None, None]
    return (allowed & (index < lengths[:, None])[:, None, :])[:, None]


def _mask_mod(segment_ids: Tensor, direction: Direction, window_k: int):
    """The rule as FlexAttention's mask_mod(batch, head, q, kv)."""

    def causal(batch, head, q, kv):
        return (segment_ids[q] == segment_ids[kv]) & (kv <= q)

    def windowed_causal(batch, head, q, kv):
        return causal(batch, head, q, kv) & (q - kv <= window_k)

    def future(batch, head, q, kv):
        return (segment_ids[q] == segment_ids[kv]) & (kv > q)

    def windowed_future(batch, head, q, kv):
        return future(batch, head, q, kv) & (kv - q <= window_k)

    if direction == "causal":
        return windowed_causal if window_k else causal
    return windowed_future if window_k else future


def build_block_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> BlockMask:
    """BlockMask from the first and last document of each block of `BLOCK_SIZE` tokens, without asking the device.

    `create_block_mask` evaluates the rule at all T^2 pairs. But documents are contiguous, so the blocks that a block reaches on
    one side are a range, and so are the full ones among them. "future" exchanges the queries and keys of "causal" in all
    blocks but those on the diagonal, which are never full: what is behind a query of the one is ahead of a query of the other.

    Args: as `build_boolean_mask`; any device.
    """
    total = segment_ids.numel()
    window = min(window_k, total) if window_k else total
    list_blocks = _list_blocks_compiled if segment_ids.is_cuda else _list_blocks
    behind, ahead = list_blocks(segment_ids, window)
    keys, queries = (behind, ahead) if direction == "causal" else (ahead, behind)
    return BlockMask(
        seq_lengths=(total, total),
        kv_num_blocks=keys.partial_counts,
        kv_indices=keys.partial,
        full_kv_num_blocks=keys.full_counts,
        full_kv_indices=keys.full,
        q_num_blocks=queries.partial_counts,
        q_indices=queries.partial,
        full_q_num_blocks=queries.full_counts,
        full_q_indices=queries.full,
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=_mask_mod(segment_ids, direction, window_k),
    )


class _BlockLists(NamedTuple):
    """The blocks that each of B blocks reaches on one side. All int32; entries of a row past its count mean nothing.

    FlexAttention applies the rule inside partial blocks, and takes it to allow every pair inside full ones.
    """

    partial_counts: Tensor  # [1, 1, B]
    partial: Tensor  # [1, 1, B, B], ascending
    full_counts: Tensor  # [1, 1, B]
    full: Tensor  # [1, 1, B, B], ascending


def _list_blocks(segment_ids: Tensor, window: int) -> tuple[_BlockLists, _BlockLists]:
    """What each block reaches behind it and ahead of it, itself in both, if no pair is more than `window` tokens apart."""
    total = segment_ids.numel()
    block = torch.arange(-(-total // BLOCK_SIZE), dtype=torch.int32, device=segment_ids.device)
    first = segment_ids[block * BLOCK_SIZE]
    last = segment_ids[(block * BLOCK_SIZE + BLOCK_SIZE - 1).clamp(max=total - 1)]
    if total % BLOCK_SIZE:
        last[-1] += 1  # a block cut short is never full: let it end in a document of its own

    touched = (window + BLOCK_SIZE - 1) // BLOCK_SIZE  # blocks further on that hold a pair within the window
    covered = (window + 1) // BLOCK_SIZE - 1  # blocks further on whose pairs are all within it; -1 if not even the block's own
    # Documents ascend, so a binary search finds the first block that meets, or lies inside, the document at a block's edge.
    behind = _list_ranges(
        torch.maximum(torch.searchsorted(last, first, out_int32=True), block - touched),
        block + 1,
        torch.maximum(torch.searchsorted(first, last, out_int32=True), block - covered),
        block,
    )
    # ... and here, the first block that no longer does.
    ahead = _list_ranges(
        block,
        torch.minimum(torch.searchsorted(first, last, out_int32=True, right=True), block + 1 + touched),
        block + 1,
        torch.minimum(torch.searchsorted(last, first, out_int32=True, right=True), block + 1 + covered),
    )
    return behind, ahead


def _list_ranges(begin: Tensor, end: Tensor, full_begin: Tensor, full_end: Tensor) -> _BlockLists:
    """Lists of B rows that reach blocks begin .. end, full_begin .. full_end of them full (none if that is no range)."""
    place = torch.arange(len(begin), dtype=torch.int32, device=begin.device)
    full_counts = (full_end - full_begin).clamp(min=0)
    full = full_begin[:, None] + place
    reached = begin[:, None] + place
    partial = torch.where(reached < full_begin[:, None], reached, reached + full_counts[:, None])
    inside = len(begin) - 1  # a kernel may read the first entry of an empty row
    return _BlockLists(
        (end - begin - full_counts)[None, None],
        partial.clamp(max=inside)[None, None],
        full_counts[None, None],
        full.clamp(max=inside)[None, None],
    )


_list_blocks_compiled = torch.compile(_list_blocks, dynamic=False)
