"""The attention mask of the anti-causal pass: the readable definition. Also finds and draws anchors, which depend on it.

A packed batch is one row of T tokens. `cu_seqlens` [S+1] holds the document boundaries, 0 = cu[0] < ... < cu[S] = T.
Query q may attend to key kv if both are in one document and 0 < kv - q. With a window, also kv - q <= window_k.

These dense masks are for reference and drawings. The model runs on those of `flame.attention.kernel_masks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.runtime.draws import BITS, draw_integers


def _segment_ids_from_cu_seqlens(cu: Tensor) -> tuple[Tensor, int]:
    """Number of the document that each token belongs to.

    Args:
        cu: int32 or int64 [S+1] or [1, S+1].

    Returns:
        segment_id [T] int64, and T. An empty packed sequence ([0]) gives an empty tensor and 0.
    """
    cu = cu.reshape(-1).long()
    lengths = cu[1:] - cu[:-1]
    segment_id = torch.repeat_interleave(torch.arange(lengths.numel(), device=cu.device), lengths)
    return segment_id, segment_id.numel()


def _allowed_keys(cu_seqlens: Tensor, window_k: int | None) -> Tensor:
    """Boolean [T, T]: entry (q, kv) is true if q may attend to kv."""
    segment_id, total = _segment_ids_from_cu_seqlens(cu_seqlens)
    index = torch.arange(total, device=segment_id.device)
    distance = index[None, :] - index[:, None]
    allowed = (segment_id[:, None] == segment_id[None, :]) & (distance > 0)
    window = read_window(window_k)
    return allowed & (distance <= window) if window else allowed


def read_window(window_k: int | None) -> int:
    """Normalize a window in tokens: None, 0 and -1 all mean no window, and give 0.

    Raises:
        ValueError: another negative number.
    """
    window = 0 if window_k is None or window_k == -1 else window_k
    if window < 0:
        raise ValueError(f"window_k = {window_k}: allowed are numbers of tokens; None, 0 and -1 mean no window")
    return window


def build_future_mask_from_cu(
    cu_seqlens: Tensor, window_k: int | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Additive attention mask of the anti-causal pass, for inspection. **Do not run a model on it: it leaks.**

    The last token of each document has no allowed key. An additive mask gives it the same score for all tokens. Softmax then
    attends to all tokens, including the past and other documents, and later layers pass that on. Attention over no keys must
    be zero, as with boolean masks in SDPA, FlexAttention's BlockMask and the flash kernels. `flame.encode_future` uses these.

    Args:
        cu_seqlens: int32 or int64 [S+1] or [1, S+1].
        window_k: largest distance of a key ahead; None, 0 and -1 mean up to the end of the document.
        dtype: floating dtype of the mask.
        device: where to put the results.

    Returns:
        mask [1, 1, T, T], 0 where attention is allowed and -finfo(dtype).max elsewhere, and future_valid [1, T] bool, true where
        a position has at least one allowed key. An empty packed sequence gives (None, None).
    """
    allowed = _allowed_keys(cu_seqlens, window_k).to(device)
    if allowed.numel() == 0:
        return None, None
    mask = torch.full(allowed.shape, -torch.finfo(dtype).max, dtype=dtype, device=device).masked_fill_(allowed, 0.0)
    return mask[None, None], allowed.any(dim=-1)[None]


def _future_valid_from_cu(cu_seqlens: Tensor, window_k: int | None, device: torch.device | str) -> Tensor | None:
    """Positions with at least one allowed key: all but the last of each document, for any window.

    Returns:
        bool [1, T], or None for an empty packed sequence.
    """
    read_window(window_k)  # only to check it: every window contains the next token
    segment_id, total = _segment_ids_from_cu_seqlens(cu_seqlens)
    if total == 0:
        return None
    return find_anchors(segment_id, target_shift=0)[None].to(device)


def find_anchors(segment_ids: Tensor, target_shift: int) -> Tensor:
    """Positions whose target, the summary `target_shift` tokens ahead, is in the same document.

    With shift 0, the last token of a document is still not an anchor: it has no future.

    Args:
        segment_ids: [T] document number of each token, non-decreasing.
        target_shift: s >= 0.

    Returns:
        bool [T]. The number of anchors is the sum of max(l - max(s, 1), 0) over document lengths l.
    """
    shift = max(target_shift, 1)
    anchors = torch.zeros_like(segment_ids, dtype=torch.bool)
    anchors[: segment_ids.numel() - shift if shift < segment_ids.numel() else 0] = segment_ids[shift:] == segment_ids[:-shift]
    return anchors


def list_marked(marks: Tensor, bucket: int) -> Tensor:
    """Positions of the true entries of bool [T], in order, then of false ones: int64 [bucket]. Does not wait for the device."""
    return marks.byte().argsort(descending=True, stable=True)[:bucket]


def draw_anchors(anchors: Tensor, at_most: int, run_seed: int, number: Tensor) -> tuple[Tensor, Tensor]:
    """Draw K positions at random, anchors first, without waiting for the device.

    Args:
        anchors: bool [T].
        at_most: K, at most T.
        run_seed, number: what the draw depends on; see `flame.runtime.draws.draw_integers`.

    Returns:
        positions int64 [K] in ascending order, and bool [K]: which of them are anchors. If there are fewer than K anchors, other
        positions fill the rest.
    """
    priority = draw_integers(run_seed, number, len(anchors)) | anchors.long() << BITS
    positions = priority.topk(at_most).indices.sort().values
    return positions, anchors[positions]


def find_neighbors(segment_ids: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """The first and the last position within `horizon` tokens of each position, in its document: int64 [T] each.

    Args:
        segment_ids: [T] document number of each token, non-decreasing.
    """
    index = torch.arange(segment_ids.numel(), device=segment_ids.device)
    first = torch.searchsorted(segment_ids, segment_ids, side="left")
    last = torch.searchsorted(segment_ids, segment_ids, side="right") - 1
    return torch.maximum(first, index - horizon), torch.minimum(last, index + horizon)
