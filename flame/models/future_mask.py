"""Who may look at whom in the anti-causal pass: the readable definition.

A packed batch is one row of T tokens; `cu_seqlens` [S+1] holds the document boundaries, 0 = cu[0] < ... < cu[S] = T.
Query q may look at key kv when both lie in one document and 0 < kv - q (<= window_k, where there is a window).

These dense masks are the reference and the picture, not what the model runs on: an additive mask leaves the last token of each
document, which has no key, with a uniform softmax over the whole pack. See `flame.models.attention_mask`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _segment_ids_from_cu_seqlens(cu: Tensor) -> tuple[Tensor, int]:
    """Number of the document that each token belongs to.

    Args:
        cu: int32 or int64 [S+1] or [1, S+1].

    Returns:
        segment_id [T] int64, and T. An empty pack ([0]) gives an empty tensor and 0.
    """
    cu = cu.reshape(-1).long()
    lengths = cu[1:] - cu[:-1]
    segment_id = torch.repeat_interleave(torch.arange(lengths.numel(), device=cu.device), lengths)
    return segment_id, segment_id.numel()


def _allowed_keys(cu_seqlens: Tensor, window_k: int | None) -> Tensor:
    """Boolean [T, T]: entry (q, kv) says whether q may look at kv."""
    segment_id, total = _segment_ids_from_cu_seqlens(cu_seqlens)
    index = torch.arange(total, device=segment_id.device)
    distance = index[None, :] - index[:, None]
    allowed = (segment_id[:, None] == segment_id[None, :]) & (distance > 0)
    return allowed & (distance <= window_k) if window_k else allowed


def build_future_mask_from_cu(
    cu_seqlens: Tensor, window_k: int | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Additive attention mask of the anti-causal pass.

    Args:
        cu_seqlens: int32 or int64 [S+1] or [1, S+1].
        window_k: keys at most this far ahead; None or 0 means up to the end of the document.
        dtype: floating dtype of the mask.
        device: where to put the results.

    Returns:
        mask [1, 1, T, T], 0 where attention is allowed and -finfo(dtype).max elsewhere, and future_valid [1, T] bool, true where
        a position has at least one allowed key. An empty pack gives (None, None).
    """
    allowed = _allowed_keys(cu_seqlens, window_k).to(device)
    if allowed.numel() == 0:
        return None, None
    mask = torch.full(allowed.shape, -torch.finfo(dtype).max, dtype=dtype, device=device).masked_fill_(allowed, 0.0)
    return mask[None, None], allowed.any(dim=-1)[None]


def _future_valid_from_cu(cu_seqlens: Tensor, window_k: int | None, device: torch.device | str) -> Tensor | None:
    """Positions with at least one allowed key: all but the last of each document, whatever the window.

    Returns:
        bool [1, T], or None for an empty pack.
    """
    del window_k  # a window of one token or more always holds the next token
    segment_id, total = _segment_ids_from_cu_seqlens(cu_seqlens)
    if total == 0:
        return None
    return find_anchors(segment_id, target_shift=0)[None].to(device)


def find_anchors(segment_ids: Tensor, target_shift: int) -> Tensor:
    """Positions whose target, the summary `target_shift` tokens ahead, lies in their own document.

    With shift 0 the position itself must have a future, so the last token of a document is no anchor there either.

    Args:
        segment_ids: [T] document number of each token, non-decreasing.
        target_shift: s >= 0.

    Returns:
        bool [T]; document lengths l give sum(max(l - max(s, 1), 0)) anchors (`count_anchors`).
    """
    shift = max(target_shift, 1)
    anchors = torch.zeros_like(segment_ids, dtype=torch.bool)
    anchors[: segment_ids.numel() - shift if shift < segment_ids.numel() else 0] = segment_ids[shift:] == segment_ids[:-shift]
    return anchors


def count_anchors(cu_seqlens: Tensor, target_shift: int, at_most: int = 0, labels: np.ndarray | None = None) -> int:
    """Number of true entries of `find_anchors`, from the document lengths alone, or `at_most` (where not 0) if that is less.

    Args:
        labels: int64 [S], labels in each document, the last ones; then only positions with a label are anchors.
    """
    cu = cu_seqlens.reshape(-1)
    lengths = cu[1:] - cu[:-1] if labels is None else torch.from_numpy(labels) + 1
    count = int((lengths - max(target_shift, 1)).clamp(min=0).sum())
    return min(count, at_most) if at_most else count


def list_marked(marks: Tensor, room: int) -> Tensor:
    """Positions of the true entries of bool [T], in order, then others: int64 [room], without asking the device how many."""
    return marks.byte().argsort(descending=True, stable=True)[:room]


def find_room(count: int, at_most: int) -> int:
    """A number of rows that holds `count`, one of few: kernels are made, and memory is kept, for each number that occurs.

    Returns:
        `count` rounded up to four sizes an octave, 64 at least and `at_most` at most.
    """
    grain = max(64, 1 << max((count - 1).bit_length() - 3, 0))
    return min(max(-(-count // grain), 1) * grain, at_most)


def draw_anchors(anchors: Tensor, at_most: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random choice among the anchors, without asking the device how many there are.

    Args:
        anchors: bool [T].
        at_most: K, at most T.
        seed: decides the choice.

    Returns:
        positions int64 [K] in ascending order, and bool [K]: which of them are anchors. Where there are fewer than K, others
        fill up.
    """
    generator = torch.Generator(anchors.device).manual_seed(seed)
    priority = torch.rand(anchors.shape, generator=generator, device=anchors.device) + anchors
    positions = priority.topk(at_most).indices.sort().values
    return positions, anchors[positions]


def find_neighbors(segment_ids: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """For each position the first and the last one of its document that are at most `reach` away: int64 [T] each.

    Args:
        segment_ids: [T] document number of each token, non-decreasing.
    """
    index = torch.arange(segment_ids.numel(), device=segment_ids.device)
    first = torch.searchsorted(segment_ids, segment_ids, side="left")
    last = torch.searchsorted(segment_ids, segment_ids, side="right") - 1
    return torch.maximum(first, index - reach), torch.minimum(last, index + reach)


def render_future_mask(cu_seqlens: Tensor, window_k: int | None = None) -> str:
    """Draw the pattern: a row a query, `#` an allowed key, `.` the query itself, `|` between documents."""
    allowed = _allowed_keys(cu_seqlens, window_k)
    starts = set(cu_seqlens.reshape(-1).tolist()[1:-1])
    lines = []
    for q, row in enumerate(allowed.tolist()):
        cells = ("#" if seen else "." if kv == q else " " for kv, seen in enumerate(row))
        lines.append("".join(("|" if kv in starts else "") + cell for kv, cell in enumerate(cells)))
    return "\n".join(lines)
