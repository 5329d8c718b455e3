"""Lower bounds on the mutual information between a guess and its future, used as losses.

InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4): with N valid pairs (x_i, y_i) and cosine similarity s,

    loss = -1/N sum_i log( exp(s_ii / t) / sum_j exp(s_ij / t) ),      I(x; y) >= ln N - loss.

The summaries y are labels, so only the gradient of x (and of the temperature t) is ever needed, and what arrives from above is
a scalar. It is therefore formed in the forward, one chunk of rows after another: 4 N^2 d FLOPs in two matrix products, and one
pass of `softmax_rows_` over the chunk's scores, with O(chunk x N) memory.

Shape legend: N candidates, d width, c rows of a chunk.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.config import LOWEST_LEARNED_TEMPERATURE
from flame.models.softmax_rows import count_chunk_rows, softmax_rows_


class Contrast(NamedTuple):
    """Outcome of one comparison of N pairs; sums over the valid ones, 0-d float tensors. Only `loss_sum` carries gradients."""

    loss_sum: Tensor
    num_anchors: Tensor
    mi_sum: Tensor
    """ln N - loss, summed, with N the candidates of each anchor: divided by num_anchors it bounds the mutual information from
    below, in nats."""
    correct: Tensor
    """Anchors whose own summary scores strictly above every other: ties are misses, so collapsed summaries score 0."""
    positive_cosine_sum: Tensor
    negative_cosine_sum: Tensor
    """Each anchor contributes its mean over the N - 1 others."""
    failed: Tensor
    """1 if loss or gradient came out infinite or NaN, else 0. Then all of the above, and every gradient, is exactly 0."""


class _Columns(NamedTuple):
    """Which candidate is in which column: only valid ones, in their order, then arbitrary ones to fill up N."""

    order: Tensor
    """int64 [N]: candidate of each column."""
    own: Tensor
    """int64 [N]: column of each row's own candidate; -1 for rows that are not valid."""
    total: Tensor
    """int64 0-d: columns that count."""
    excluded: tuple[Tensor, Tensor] | None
    """int64 [N] and [N]: first and last column that do not count for a row."""


def _arrange_columns(valid: Tensor, excluded: tuple[Tensor, Tensor] | None) -> _Columns:
    """Columns for valid: bool [N]; excluded: first and last candidate, int64 [N] each. Never waits for the device."""
    up_to = valid.cumsum(0)  # valid ones up to and with each
    before = up_to - valid.long()
    total = valid.numel()
    order = torch.zeros(total + 1, dtype=torch.long, device=valid.device)
    order.scatter_(0, torch.where(valid, before, total), torch.arange(total, device=valid.device))
    ranges = None if excluded is None else (before[excluded[0]], up_to[excluded[1]] - 1)
    return _Columns(order[:total], torch.where(valid, before, -1), up_to[-1], ranges)


class _InfoNCESum(torch.autograd.Function):
    """(x [N, d], y [N, d], columns, scale 0-d) -> loss sum, correct, positive cosine sum, whether all is finite."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, columns: _Columns, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = len(x)
        rows = count_chunk_rows(total, total, x.dtype)
        candidates = y[columns.order]
        grad_x = torch.empty_like(x)
        scores_buffer = x.new_empty(min(rows, total), total)
        sums = []
        for start in range(0, total, rows):
            chunk = slice(start, start + rows)
            scores = torch.mm(x[chunk], candidates.t(), out=scores_buffer[: len(x[chunk])])
            excluded = None if columns.excluded is None else (columns.excluded[0][chunk], columns.excluded[1][chunk])
            parts = softmax_rows_(scores, columns.own[chunk], scale, columns.total, excluded)
            torch.mm(scores, candidates, out=grad_x[chunk])
            sums.append(torch.stack([part.sum() for part in parts]))
        numbers = torch.stack(sums).sum(dim=0)
        # Candidates that do not count have weight 0, but 0 times what is not finite is not 0.
        is_finite = numbers.isfinite().all() & grad_x.isfinite().all() & (scale > 0)
        grad_x.masked_fill_(~is_finite, 0.0)
        # Cloned, since views must not leave an FSDP module.
        loss, positive_cosine, correct, grad_scale = (n.clone() for n in torch.where(is_finite, numbers, 0.0))
        ctx.save_for_backward(grad_x, torch.where(is_finite, scale, 0.0), grad_scale)
        ctx.mark_non_differentiable(correct, positive_cosine, is_finite)
        return loss, correct, positive_cosine, is_finite

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, scale, grad_scale = ctx.saved_tensors
        return grad_x * (grad_loss * scale).to(grad_x.dtype), None, None, grad_scale * grad_loss


class InfoNCEEstimator(nn.Module):
    """InfoNCE over the valid pairs of one packed batch, with cosine similarity.

    Args:
        hidden_size: width d of the summaries, and of the guesses.
        temperature: divides the cosines.
        learnable_temperature: make it a parameter (its logarithm, so that it stays positive), starting at `temperature`.
        projection_dim: if not 0, guesses have this width, and a fixed random matrix takes the summaries to it. Random projections
            to p dimensions change cosines by about 1 / sqrt(p) (Johnson and Lindenstrauss 1984).
    """

    projection: Tensor | None

    def __init__(self, hidden_size: int, temperature: float = 0.1, learnable_temperature: bool = False, projection_dim: int = 0):
        super().__init__()
        self.hidden_size = hidden_size
        self.width = projection_dim or hidden_size
        self.initial_temperature = temperature
        self.log_temperature = nn.Parameter(torch.empty(1)) if learnable_temperature else None
        self.register_buffer("projection", torch.empty(hidden_size, projection_dim) if projection_dim else None)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the temperature and draw the projection; needed after building on the meta device."""
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.initial_temperature))
        if self.projection is not None:
            self.projection.normal_(std=self.width**-0.5)

    def temperature(self, like: Tensor) -> Tensor:
        """0-d tensor on the device of `like`, in float32 or wider."""
        dtype = _at_least_float32(like)
        if self.log_temperature is None:
            return torch.full((), self.initial_temperature, dtype=dtype, device=like.device)
        return self.log_temperature.to(dtype).exp().squeeze()

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Keep the learned temperature at `LOWEST_LEARNED_TEMPERATURE` or above; call after each optimizer step.

        Limiting the parameter and not its use leaves it a gradient to come back with.
        """
        if self.log_temperature is not None:
            self.log_temperature.clamp_(min=math.log(LOWEST_LEARNED_TEMPERATURE))

    def contrast(self, x: Tensor, y: Tensor, valid_mask: Tensor, excluded: tuple[Tensor, Tensor] | None = None) -> Contrast:
        """Compare every valid guess with every valid summary.

        Args:
            x: [..., d] guesses ([..., projection_dim] with a projection). y: [..., d] summaries, detached; row i of y is the
                positive of row i of x.
            valid_mask: bool [...]; an invalid row is neither anchor nor candidate. It may be all false: then every sum is
                exactly 0 and the backward still runs.
            excluded: int64 [N] and [N], for each row the first and the last row that are no negatives of it, itself between
                them.
        """
        assert not y.requires_grad, "summaries are labels: detach them"
        x, y = x.reshape(-1, self.width), y.reshape(-1, self.hidden_size)
        valid = valid_mask.reshape(-1)
        if self.projection is not None:
            y = y @ self.projection.to(y.dtype)
        normalize = _normalize_compiled if x.is_cuda else _normalize
        x, y = normalize(x), normalize(y)
        columns = _arrange_columns(valid, excluded)
        loss_sum, correct, positive_cosine, is_finite = _InfoNCESum.apply(x, y, columns, 1.0 / self.temperature(like=x))

        with torch.no_grad():
            sum_valid = _sum_valid_compiled if x.is_cuda else _sum_valid
            count = torch.where(is_finite, columns.total, 0).to(loss_sum.dtype)
            all_cosines = torch.where(is_finite, (sum_valid(x, valid) * sum_valid(y, valid)).sum(), 0.0)
            negative_cosine = (all_cosines - positive_cosine) / (count - 1).clamp(min=1)
            mi = torch.where(is_finite, _sum_log_candidates(valid, columns, loss_sum.dtype), 0.0) - loss_sum
            failed = 1.0 - is_finite.to(loss_sum.dtype)
        return Contrast(loss_sum, count, mi, correct, positive_cosine, negative_cosine, failed)

    def forward(self, x: Tensor, y: Tensor, valid_mask: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Loss, 0-d: the mean over valid anchors (0 where there are none) or their sum. Shapes as `contrast`.

        Raises:
            ValueError: for another reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction = "{reduction}": allowed are "mean" and "sum"')
        outcome = self.contrast(x, y, valid_mask)
        return outcome.loss_sum / outcome.num_anchors.clamp(min=1) if reduction == "mean" else outcome.loss_sum


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _normalize(vectors: Tensor) -> Tensor:
    """Unit vectors. The norm is taken in float32 or wider: rounded to bfloat16 it would be off by up to 0.4%."""
    return F.normalize(vectors.to(_at_least_float32(vectors)), dim=-1).to(vectors.dtype)


def _sum_valid(vectors: Tensor, valid: Tensor) -> Tensor:
    """[N, d] -> [d], in float32 or wider."""
    return torch.where(valid[:, None], vectors, 0.0).sum(dim=0, dtype=_at_least_float32(vectors))


_normalize_compiled = torch.compile(_normalize, dynamic=False)
_sum_valid_compiled = torch.compile(_sum_valid, dynamic=False)


def _sum_log_candidates(valid: Tensor, columns: _Columns, dtype: torch.dtype) -> Tensor:
    """Sum over anchors of the logarithm of the number of candidates, the own one included."""
    if columns.excluded is None:
        return columns.total * columns.total.clamp(min=1).to(dtype).log()
    first, last = columns.excluded
    candidates = columns.total - (last - first)
    return torch.where(valid, candidates.clamp(min=1).to(dtype).log(), 0.0).sum()


@torch.no_grad()
def read_temperature(estimator: InfoNCEEstimator) -> Tensor:
    """The learned temperature, 0-d, outside a forward: there FSDP holds the parameter in shards. A collective call."""
    parameter = estimator.log_temperature
    assert parameter is not None
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.exp().squeeze()


def build_mi_estimator(
    estimator_type: Literal["infonce"],
    hidden_size: int,
    temperature: float = 0.1,
    learnable_temperature: bool = False,
    projection_dim: int = 0,
) -> InfoNCEEstimator:
    """The estimator of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if estimator_type != "infonce":
        raise ValueError(f'estimator_type = "{estimator_type}": allowed is "infonce"')
    return InfoNCEEstimator(hidden_size, temperature, learnable_temperature, projection_dim)
