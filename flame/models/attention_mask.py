"""The attention masks that the model runs on, for one packed batch in both directions.

A query with no allowed key (the last token of each document in the anti-causal pass) must get exactly zero from attention:
boolean masks in SDPA and FlexAttention's BlockMask give that, an additive mask does not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE = 128

AttentionMask = Tensor | BlockMask
Direction = Literal["causal", "future"]


def build_attention_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> AttentionMask:
    """Mask of one direction: a BlockMask for FlexAttention on CUDA, a boolean mask for SDPA elsewhere.

    Args:
        segment_ids: int [T], document number of each token, non-decreasing.
        direction: "causal" allows kv <= q, "future" allows kv > q, both inside one document.
        window_k: "future" only: keys at most this far ahead; 0 means no window.

    Returns:
        BlockMask of [1, 1, T, T], or a bool tensor [1, 1, T, T], true where attention is allowed.
    """
    if segment_ids.is_cuda:
        return build_block_mask(segment_ids, direction, window_k)
    return build_boolean_mask(segment_ids, direction, window_k)


def build_boolean_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> Tensor:
    """Bool [1, 1, T, T], true where attention is allowed."""
    index = torch.arange(segment_ids.numel(), device=segment_ids.device)
    allows = _mask_mod(segment_ids, direction, window_k)
    return allows(None, None, index[:, None], index[None, :])[None, None]


def _mask_mod(segment_ids: Tensor, direction: Direction, window_k: int):
    """The rule as FlexAttention's mask_mod(batch, head, q, kv)."""

    def causal(batch, head, q, kv):
        return (segment_ids[q] == segment_ids[kv]) & (kv <= q)

    def future(batch, head, q, kv):
        return (segment_ids[q] == segment_ids[kv]) & (kv > q)

    def windowed_future(batch, head, q, kv):
        return (segment_ids[q] == segment_ids[kv]) & (kv > q) & (kv - q <= window_k)

    if direction == "causal":
        return causal
    return windowed_future if window_k else future


def build_block_mask(segment_ids: Tensor, direction: Direction, window_k: int = 0) -> BlockMask:
    """BlockMask in closed form from the first and last document of each block of `BLOCK_SIZE` tokens.

    `create_block_mask` evaluates the rule at all T^2 pairs. Documents are contiguous, so a block off the diagonal holds an
    allowed pair exactly when the document at its near edge reaches into the query block, and is full exactly when that one
    document covers both blocks: O((T / BLOCK_SIZE)^2) work.

    Args: as `build_attention_mask`; any device.
    """
    total = segment_ids.numel()
    blocks = -(-total // BLOCK_SIZE)
    edge = torch.arange(blocks, device=segment_ids.device)
    first = segment_ids[edge * BLOCK_SIZE]
    last = segment_ids[(edge * BLOCK_SIZE + BLOCK_SIZE - 1).clamp(max=total - 1)]
    ahead = edge[None, :] - edge[:, None]  # in blocks; row = query block, column = key block

    if direction == "causal":
        reached = (ahead < 0) & (last[None, :] == first[:, None])
        full = reached & (first[None, :] == last[:, None])
    else:
        reached = (ahead > 0) & (first[None, :] == last[:, None])
        full = reached & (last[None, :] == first[:, None])
        if window_k:
            reached &= ahead * BLOCK_SIZE - (BLOCK_SIZE - 1) <= window_k
            full &= ahead * BLOCK_SIZE + (BLOCK_SIZE - 1) <= window_k
    if total % BLOCK_SIZE:  # the last block is cut short, and FlexAttention does not apply the rule inside full blocks
        full[-1, :] = False
        full[:, -1] = False

    partial = (reached & ~full) | (ahead == 0)
    return BlockMask.from_kv_blocks(
        *_list_blocks(partial),
        *_list_blocks(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=_mask_mod(segment_ids, direction, window_k),
        seq_lengths=(total, total),
    )


def _list_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen key blocks [1, 1, rows] and their indices, chosen ones first [1, 1, rows, columns]."""
    counts = chosen.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]
