"""Softmax cross entropy of rows of scores, and its gradient in place of the scores. Used by cross entropy and by InfoNCE.

A row of scores z_j has one positive column o, its own: the label of a token, or the summary that belongs to an anchor. The
columns in A count: the first `count`, without an excluded range and without columns whose key equals that of o. Column o
always counts. With scale s,

    loss = ln sum_{j in A} exp(s z_j) - s z_o,      d loss / d (s z_j) = exp(s z_j) / sum_{k in A} exp(s z_k) - [j = o].

With a cap c, z_j = c tanh(x_j / c) of the given scores x_j, and d z_j / d x_j = 1 - (z_j / c)^2. Without one, z_j = x_j.

On CUDA a Triton kernel reads each row twice, the second time mostly from the L2 cache, and writes the gradient over the scores.
Elsewhere PyTorch's operations do the same on blocks of rows that fit the cache.

Shape legend: c rows, n columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 2**31
ROW_TILE = 128  # rows of a tile in a matrix product


class RowSums(NamedTuple):
    """Results per row [c], float32 or wider; 0 in rows without own column."""

    loss: Tensor
    own_score: Tensor
    """z_o"""
    is_best: Tensor
    """1 where z_o is strictly above every other allowed score."""
    grad_scale: Tensor
    """d loss / d s"""
    counted: Tensor
    """Size of A, including the own column."""


def softmax_rows_(
    scores: Tensor,
    own: Tensor,
    scale: Tensor,
    count: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    cap: float | None = None,
) -> RowSums:
    """Replace scores by the gradient of each row's loss with respect to `scale * scores`, in the dtype of the scores.

    Args:
        scores: [c, n], each row contiguous. All arithmetic is in float32 or wider.
        own: int64 [c], own column of each row. A negative one excludes the row: its loss and gradient are 0. An own column >=
            `count` or >= n makes the loss NaN.
        scale: 0-d, s.
        count: 0-d integer, number of leading columns that count; None means all. Own columns must be among them.
        excluded: int64 [c] and [c], first and last column of a range that does not count for a row, except its own column. An
            empty range has last < first. None excludes nothing.
        keys: integers [n] and [c] of the same dtype: key of each column, and of each row's own column. Other columns with that
            key do not count for the row. A narrow dtype saves memory traffic. None excludes nothing.
        cap: c, greater than 0. None leaves the scores as they are.
    """
    return (_launch if scores.is_cuda else _compute)(scores, own, scale, count, excluded, keys, cap)


BLOCK_SCORES = 2**19
"""Scores of a block on CPUs: 2 MiB in float32."""


def _compute(
    scores: Tensor,
    own: Tensor,
    scale: Tensor,
    count: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    cap: float | None = None,
) -> RowSums:
    """On CPUs: blocks of rows that stay in the cache while they are read again and again."""
    factor, columns = float(scale), scores.shape[1]
    limit = columns if count is None else min(int(count), columns)
    scores[:, limit:] = 0.0
    step = max(BLOCK_SCORES // max(columns, 1), 1)
    blocks = [slice(start, start + step) for start in range(0, max(len(scores), 1), step)]
    sums = [
        _compute_block(
            scores[block, :limit],
            own[block],
            factor,
            None if excluded is None else (excluded[0][block], excluded[1][block]),
            None if keys is None else (keys[0][:limit], keys[1][block]),
            cap,
        )
        for block in blocks
    ]
    return RowSums(*(torch.cat(parts) for parts in zip(*sums, strict=True)))


def _compute_block(
    scores: Tensor,
    own: Tensor,
    scale: float,
    excluded: tuple[Tensor, Tensor] | None,
    keys: tuple[Tensor, Tensor] | None,
    cap: float | None,
) -> RowSums:
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if cap is not None:
        wide = torch.tanh(wide / cap).mul_(cap)
    has_own = (own >= 0) & (own < scores.shape[1])
    place = torch.where(has_own, own, 0)[:, None]
    if not scores.shape[1]:
        nothing = wide.new_zeros(len(scores))
        return RowSums(torch.where(own < 0, 0.0, nothing + torch.nan), nothing, nothing, nothing, nothing)
    left_out = _find_left_out(scores.shape[1], place, excluded, keys)
    own_score = wide.gather(1, place)[:, 0]

    logits = wide * scale
    if left_out is not None:
        logits.masked_fill_(left_out, -torch.inf)
    logits.scatter_(1, place, -torch.inf)
    best_other, own_logit = logits.amax(dim=-1), own_score * scale
    top = torch.maximum(best_other, own_logit)
    probs = logits.scatter_(1, place, own_logit[:, None]).sub_(top[:, None]).exp_()
    total = probs.sum(dim=-1)
    probs.div_(total[:, None]).scatter_add_(1, place, probs.new_full(place.shape, -1.0))
    if left_out is not None:
        wide.masked_fill_(left_out, 0.0)
    grad_scale = torch.linalg.vecdot(probs, wide)
    if cap is not None:
        probs.mul_(1 - (wide / cap) ** 2)
    if not has_own.all():
        probs[~has_own] = 0.0  # no product: a row without own column may hold anything
    scores.copy_(probs)

    loss = torch.where(has_own, total.log() + top - own_logit, torch.where(own < 0, 0.0, torch.nan))
    left = 0 if left_out is None else left_out.sum(dim=-1)
    rest = (own_score, (own_logit > best_other).to(wide.dtype), grad_scale, wide.new_full(own.shape, scores.shape[1]) - left)
    return RowSums(loss, *(torch.where(has_own, part, 0.0) for part in rest))


def _find_left_out(
    columns: int, place: Tensor, excluded: tuple[Tensor, Tensor] | None, keys: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """Bool [c, n]: which columns do not count."""
    if excluded is None and keys is None:
        return None
    left_out = torch.zeros(len(place), columns, dtype=torch.bool)
    if excluded is not None:
        index = torch.arange(columns)
        left_out |= (index >= excluded[0][:, None]) & (index <= excluded[1][:, None])
    if keys is not None:
        left_out |= keys[0] == keys[1][:, None]
    return left_out.scatter_(1, place, False)


@triton.jit
def _add_block(best, total, score, log2_scale):
    """Add a block of scores to a row's running maximum and its sum of exp2(log2_scale * (score - maximum))."""
    new_best = tl.maximum(best, tl.max(score, axis=0))
    block_total = tl.sum(tl.exp2((score - new_best) * log2_scale), axis=0)
    return new_best, total * tl.exp2((best - new_best) * log2_scale) + block_total


@triton.jit
def _cap_scores(score, cap, nothing):
    """cap * tanh(score / cap), by one exponential; a score that never counts stays as it is."""
    capped = cap * (1.0 - 2.0 / (tl.exp2(score / cap * 2.8853900817779268) + 1.0))
    return tl.where(score > 0.5 * nothing, capped, nothing)


@triton.jit
def _find_slope(score, cap, nothing):
    """d z / d x at a capped score z; 0 for a score that never counts, whose square would overflow."""
    part = tl.where(score > 0.5 * nothing, score / cap, 1.0)
    return 1.0 - part * part


@triton.jit
def _softmax_rows_kernel(
    scores_ptr, row_stride, own_ptr, scale_ptr, count_ptr, first_ptr, last_ptr, keys_ptr, own_keys_ptr, sums_ptr, rows, columns,
    cap, HAS_COUNT: tl.constexpr, HAS_EXCLUDED: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row. sums [5, c] float32: loss, own score, is best, gradient by the scale, columns counted.

    Full blocks are loaded without a mask, since a mask prevents wide loads. The last, partial block is loaded separately. The
    own score is overwritten by one that never counts, so that the loops need no test for it.
    """
    row = tl.program_id(0)
    row_ptr = scores_ptr + row.to(tl.int64) * row_stride
    own = tl.load(own_ptr + row)
    offsets = tl.arange(0, BLOCK)
    nothing: tl.constexpr = -1e30  # its exponential is 0; finite, since 0 * infinity would be NaN

    limit = columns
    if HAS_COUNT:
        limit = tl.load(count_ptr).to(tl.int32)
    has_own = (own >= 0) & (own < limit)
    fault = tl.where(own < 0, 0.0, float("nan"))  # loss of a row without own column, or with one that does not count
    limit = tl.where(has_own, limit, 0)
    whole = limit // BLOCK * BLOCK

    log2_scale = tl.load(scale_ptr).to(tl.float32) * 1.4426950408889634
    own_score = tl.load(row_ptr + own, mask=has_own, other=0.0).to(tl.float32)
    if HAS_CAP:
        own_score = _cap_scores(own_score, cap, nothing)
    first = own
    last = own
    if HAS_EXCLUDED:
        first = tl.load(first_ptr + row)
        last = tl.load(last_ptr + row)
    if HAS_KEYS:
        own_key = tl.load(own_keys_ptr + row)
        shown = tl.zeros([BLOCK], tl.int32)
    else:
        left_out = tl.maximum(tl.minimum(last, limit - 1) - tl.maximum(first, 0) + 1, 0)
        counted = limit - left_out + tl.where((own >= first) & (own <= last), 1, 0)
        tl.store(sums_ptr + 4 * rows + row, tl.where(has_own, counted, 0).to(tl.float32))
    tl.debug_barrier()
    tl.store(row_ptr + own, nothing, mask=has_own)
    tl.debug_barrier()

    best = own_score * 0.0 + nothing  # of the other columns
    total = own_score * 0.0
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        column = start + offsets
        score = tl.load(row_ptr + column).to(tl.float32)
        if HAS_CAP:
            score = _cap_scores(score, cap, nothing)
        if HAS_EXCLUDED:
            score = tl.where((column >= first) & (column <= last), nothing, score)
        if HAS_KEYS:
            score = tl.where(tl.load(keys_ptr + column) == own_key, nothing, score)
            shown += (score > 0.5 * nothing).to(tl.int32)
        best, total = _add_block(best, total, score, log2_scale)
    tail = whole + offsets
    tail_score = tl.load(row_ptr + tail, mask=tail < limit, other=nothing).to(tl.float32)
    if HAS_CAP:
        tail_score = _cap_scores(tail_score, cap, nothing)
    if HAS_EXCLUDED:
        tail_score = tl.where((tail >= first) & (tail <= last), nothing, tail_score)
    if HAS_KEYS:
        tail_score = tl.where(tl.load(keys_ptr + tail, mask=tail < limit, other=0) == own_key, nothing, tail_score)
        shown += (tail_score > 0.5 * nothing).to(tl.int32)
    best, total = _add_block(best, total, tail_score, log2_scale)
    if HAS_KEYS:
        tl.store(sums_ptr + 4 * rows + row, tl.where(has_own, tl.sum(shown, axis=0) + 1, 0).to(tl.float32))

    top = tl.maximum(best, own_score)
    total = total * tl.exp2((best - top) * log2_scale) + tl.exp2((own_score - top) * log2_scale)
    log2_total = tl.log2(total)
    own_prob = tl.exp2((own_score - top) * log2_scale - log2_total)
    shift = top * log2_scale + log2_total

    # In reverse order, since the blocks read last are still in the cache.
    tail_prob = tl.where(tail < limit, tl.exp2(tail_score * log2_scale - shift), 0.0)
    grad_scale = tail_prob * tail_score
    if HAS_CAP:
        tail_prob *= _find_slope(tail_score, cap, nothing)
    tl.store(row_ptr + tail, tail_prob.to(scores_ptr.dtype.element_ty), mask=tail < columns)
    for block in tl.range(0, whole // BLOCK, num_stages=STAGES):
        column = whole - (block + 1) * BLOCK + offsets
        score = tl.load(row_ptr + column).to(tl.float32)
        if HAS_CAP:
            score = _cap_scores(score, cap, nothing)
        if HAS_EXCLUDED:
            score = tl.where((column >= first) & (column <= last), nothing, score)
        if HAS_KEYS:
            score = tl.where(tl.load(keys_ptr + column) == own_key, nothing, score)
        prob = tl.exp2(score * log2_scale - shift)
        grad_scale += prob * score
        if HAS_CAP:
            prob *= _find_slope(score, cap, nothing)
        tl.store(row_ptr + column, prob.to(scores_ptr.dtype.element_ty))
    for start in tl.range(whole + BLOCK, columns, BLOCK):
        column = start + offsets
        tl.store(row_ptr + column, tl.zeros([BLOCK], scores_ptr.dtype.element_ty), mask=column < columns)

    tl.debug_barrier()
    own_grad = own_prob - 1.0
    if HAS_CAP:
        own_grad *= _find_slope(own_score, cap, nothing)
    tl.store(row_ptr + own, own_grad.to(scores_ptr.dtype.element_ty), mask=has_own)
    loss = (log2_total - (own_score - top) * log2_scale) * 0.6931471805599453
    tl.store(sums_ptr + row, tl.where(has_own, loss, fault))
    tl.store(sums_ptr + rows + row, own_score)
    tl.store(sums_ptr + 2 * rows + row, tl.where(has_own & (own_score > best), 1.0, 0.0))
    by_scale = tl.sum(grad_scale, axis=0) + (own_prob - 1.0) * own_score
    tl.store(sums_ptr + 3 * rows + row, tl.where(has_own, by_scale, 0.0))


BLOCK = 2048
NUM_WARPS = 4
STAGES = 3


def _launch(
    scores: Tensor,
    own: Tensor,
    scale: Tensor,
    count: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    keys: tuple[Tensor, Tensor] | None = None,
    cap: float | None = None,
) -> RowSums:
    rows, columns = scores.shape
    assert scores.stride(1) == 1
    sums = torch.empty(5, rows, dtype=torch.float32, device=scores.device)
    first, last = excluded if excluded is not None else (own, own)
    column_keys, own_keys = keys if keys is not None else (own, own)
    _softmax_rows_kernel[(rows,)](
        scores, scores.stride(0), own, scale, own if count is None else count, first, last, column_keys, own_keys, sums,
        rows, columns, 1.0 if cap is None else cap,
        HAS_COUNT=count is not None, HAS_EXCLUDED=excluded is not None, HAS_KEYS=keys is not None, HAS_CAP=cap is not None,
        BLOCK=BLOCK, STAGES=STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return RowSums(*sums)


def count_chunk_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Rows of a chunk whose scores take about `CHUNK_BYTES`: a multiple of `ROW_TILE`. Only the last chunk may have fewer."""
    chunks = -(-rows * columns * dtype.itemsize // CHUNK_BYTES)
    return -(-max(rows, 1) // (max(chunks, 1) * ROW_TILE)) * ROW_TILE
