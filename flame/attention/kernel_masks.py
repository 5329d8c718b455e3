"""The attention masks that the model runs on, for one packed batch in both directions.

Two more, for a forward without gradient, show a token what comes after it (`Privileged`).

In the anti-causal pass, the last token of each document has no allowed key. Attention must return exactly zero for it.
Boolean masks in SDPA and FlexAttention's BlockMask do so. An additive mask does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = 128

AttentionMask = Tensor | BlockMask
Privileged = Literal["all_but_next", "one_ahead"]
"""Masks that let a query see more than its past, inside its document. "all_but_next": every key but the next token. "one_ahead":
the past, itself and the next token."""
Direction = Literal["causal", "future"] | Privileged


def build_boolean_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> Tensor:
    """The mask of one direction for SDPA.

    Args:
        segment_ids: int [T], document number of each token, non-decreasing.
        direction: "causal" allows kv <= q, "future" allows kv > q, "all_but_next" all but kv = q + 1, and "one_ahead"
            kv <= q + 1, each inside one document.
        window_k: largest distance of a key, in tokens; 0 means no window.

    Returns:
        bool [1, 1, T, T], true where attention is allowed.
    """
    index = torch.arange(segment_ids.numel(), device=segment_ids.device)
    allows = _mask_mod(segment_ids, direction, window_k)
    return allows(None, None, index[:, None], index[None, :])[None, None]


def build_row_mask(lengths: Tensor, longest: int, direction: Direction, window_k: int = 0) -> Tensor:
    """The mask of one direction for SDPA, with one document per row, padded on the right.

    No token of a document sees the padding, and no result at a padding position is used. In the "causal" direction, padding
    sees the document before it: all rows can share one mask, and every query has a key in the backward. In the "future"
    direction, padding sees nothing. In the others, it may see the document.

    Args:
        lengths: int64 [S], length of each document in tokens.
        longest: L, the largest of `lengths`.
        direction, window_k: as in `build_boolean_mask`.

    Returns:
        bool [1, 1, L, L] ("causal", the same for all documents) or [S, 1, L, L], true where attention is allowed.
    """
    index = torch.arange(longest, device=lengths.device)
    ahead = index[None, :] - index[:, None]
    allowed = {"causal": ahead <= 0, "future": ahead > 0, "all_but_next": ahead != 1, "one_ahead": ahead <= 1}[direction]
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

    def privileged(batch, head, q, kv):
        is_seen = kv != q + 1 if direction == "all_but_next" else kv <= q + 1
        is_near = (kv - q).abs() <= window_k if window_k else kv == kv
        return (segment_ids[q] == segment_ids[kv]) & is_seen & is_near

    if direction in ("all_but_next", "one_ahead"):
        return privileged
    if direction == "causal":
        return windowed_causal if window_k else causal
    return windowed_future if window_k else future


def build_block_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> BlockMask:
    """BlockMask from the first and last document of each block of `BLOCK_SIZE` tokens, without synchronizing with the device.

    `create_block_mask` evaluates the rule at all T^2 pairs, which is slow. Documents are contiguous, so the blocks that a block
    attends to on one side form a range, and so do the full blocks among them. Off the diagonal, "future" is "causal" with
    queries and keys exchanged. Blocks on the diagonal are never full.

    Args: as in `build_boolean_mask`; any device.
    """
    total = segment_ids.numel()
    window = min(window_k, total) if window_k else total
    if direction == "all_but_next" or direction == "one_ahead":
        keys, queries = _list_blocks_around(segment_ids, window, direction)
    else:
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
    """The blocks that each of B blocks attends to on one side. All int32; entries of a row past its count are ignored.

    FlexAttention evaluates the rule inside partial blocks. In full blocks it allows every pair.
    """

    partial_counts: Tensor  # [1, 1, B]
    partial: Tensor  # [1, 1, B, B], ascending
    full_counts: Tensor  # [1, 1, B]
    full: Tensor  # [1, 1, B, B], ascending


def _list_blocks(segment_ids: Tensor, window: int) -> tuple[_BlockLists, _BlockLists]:
    """The blocks that each block attends to, behind it and ahead of it, within `window` tokens. Both include the block itself."""
    block, first, last = _find_edges(segment_ids)
    if segment_ids.numel() % BLOCK_SIZE:
        last[-1] += 1  # an incomplete block must never count as full: pretend that it ends in another document

    touched = (window + BLOCK_SIZE - 1) // BLOCK_SIZE  # number of further blocks with at least one pair within the window
    covered = (window + 1) // BLOCK_SIZE - 1  # number of further blocks with all pairs within it; -1: not even the block itself
    # Document numbers ascend. A binary search finds the first block that touches, or lies inside, the document at a block's edge.
    behind = _list_ranges(
        torch.maximum(torch.searchsorted(last, first, out_int32=True), block - touched),
        block + 1,
        torch.maximum(torch.searchsorted(first, last, out_int32=True), block - covered),
        block,
    )
    # Ahead, it finds the first block that no longer does.
    ahead = _list_ranges(
        block,
        torch.minimum(torch.searchsorted(first, last, out_int32=True, right=True), block + 1 + touched),
        block + 1,
        torch.minimum(torch.searchsorted(last, first, out_int32=True, right=True), block + 1 + covered),
    )
    return behind, ahead


def _find_edges(segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, first and last document of each of B blocks: int32 [B] each."""
    total = segment_ids.numel()
    block = torch.arange(-(-total // BLOCK_SIZE), dtype=torch.int32, device=segment_ids.device)
    first = segment_ids[block * BLOCK_SIZE]
    return block, first, segment_ids[(block * BLOCK_SIZE + BLOCK_SIZE - 1).clamp(max=total - 1)]


def _list_blocks_around(segment_ids: Tensor, window: int, direction: Privileged) -> tuple[_BlockLists, _BlockLists]:
    """Key blocks of each query block, and query blocks of each key block. All are partial: in each the rule is evaluated."""
    block, first, last = _find_edges(segment_ids)
    touched = (window + BLOCK_SIZE - 1) // BLOCK_SIZE
    begin = torch.maximum(torch.searchsorted(last, first, out_int32=True), block - touched)
    end = torch.minimum(torch.searchsorted(first, last, out_int32=True, right=True), block + 1 + touched)
    if direction == "all_but_next":
        around = _list_ranges(begin, end, end, end)
        return around, around
    keys, queries = torch.minimum(end, block + 2), torch.maximum(begin, block - 1)
    return _list_ranges(begin, keys, keys, keys), _list_ranges(queries, end, end, end)


def _list_ranges(begin: Tensor, end: Tensor, full_begin: Tensor, full_end: Tensor) -> _BlockLists:
    """Block lists for B rows. Row i has blocks begin[i] .. end[i] - 1; full_begin[i] .. full_end[i] - 1 are full, if any."""
    offset = torch.arange(len(begin), dtype=torch.int32, device=begin.device)
    full_counts = (full_end - full_begin).clamp(min=0)
    full = full_begin[:, None] + offset
    reached = begin[:, None] + offset
    partial = torch.where(reached < full_begin[:, None], reached, reached + full_counts[:, None])
    inside = len(begin) - 1  # a kernel may read the first entry of an empty row, so it must be a valid block
    return _BlockLists(
        (end - begin - full_counts)[None, None],
        partial.clamp(max=inside)[None, None],
        full_counts[None, None],
        full.clamp(max=inside)[None, None],
    )


_list_blocks_compiled = torch.compile(_list_blocks, dynamic=False)
