"""Lower bounds on the mutual information between a guess and its future, used as losses.

InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4): with N valid pairs (x_i, y_i) and cosine similarity s,

    loss = -1/N sum_i log( exp(s_ii / t) / sum_j exp(s_ij / t) ),      I(x; y) >= ln N - loss.

The summaries y are labels, so only the gradient of x (and of the temperature t) is ever needed, and what arrives from above is
a scalar. It is therefore formed in the forward, one chunk of rows after another: 4 N^2 d FLOPs and O(chunk x N) memory.

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

ROWS_PER_CHUNK = 4096


class Contrast(NamedTuple):
    """Outcome of one comparison of N pairs; sums over the valid ones, 0-d float tensors. Only `loss_sum` carries gradients."""

    loss_sum: Tensor
    num_anchors: Tensor
    mi_sum: Tensor
    """ln N - loss, summed: divided by num_anchors it bounds the mutual information from below, in nats."""
    correct: Tensor
    """Anchors whose own summary scores strictly above every other: ties are misses, so collapsed summaries score 0."""
    positive_cosine_sum: Tensor
    negative_cosine_sum: Tensor
    """Each anchor contributes its mean over the N - 1 others."""
    failed: Tensor
    """1 if loss or gradient came out infinite or NaN, else 0. Then all of the above, and every gradient, is exactly 0."""


def _contrast_rows(x: Tensor, y: Tensor, valid: Tensor, rows: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradient of a chunk of rows.

    Args:
        x: [c, d] guesses of the chunk. y: [N, d]. valid: bool [N]. rows: int64 [c], the chunk's indices in y.
        scale: 0-d, 1 / temperature.

    Returns:
        loss sum, number of correct rows, sum of positive cosines, gradient of the sum by scale (all 0-d), and by x [c, d].
    """
    cosine = x @ y.t()
    cosine = cosine.to(_at_least_float32(cosine))
    logits = torch.where(valid[None, :], cosine * scale, -math.inf)
    own = torch.arange(y.shape[0], device=y.device)[None, :] == rows[:, None]
    positive = torch.where(own, logits, 0.0).sum(dim=-1)
    lse = logits.logsumexp(dim=-1)
    anchor = valid[rows]
    probs = torch.exp(logits - lse[:, None])
    probs_minus_own = torch.where(anchor[:, None], probs - own.to(probs.dtype), 0.0)

    loss = torch.where(anchor, lse - positive, 0.0).sum()
    correct = (anchor & (positive > torch.where(own, -math.inf, logits).amax(dim=-1))).sum()
    positive_cosine = torch.where(anchor, positive, 0.0).sum() / scale
    grad_scale = (probs_minus_own * cosine).sum()
    grad_x = (probs_minus_own.to(x.dtype) @ y) * scale
    return loss, correct.to(loss.dtype), positive_cosine, grad_scale, grad_x


_contrast_rows_compiled = torch.compile(_contrast_rows, dynamic=False)


class _InfoNCESum(torch.autograd.Function):
    """(x [N, d], y [N, d], valid [N], scale 0-d) -> loss sum, correct, positive cosine sum, whether all is finite."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, valid: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        contrast_rows = _contrast_rows_compiled if x.is_cuda else _contrast_rows
        grad_x = torch.empty_like(x)
        totals = []
        all_rows = torch.arange(x.shape[0], device=x.device)
        for x_chunk, rows, grad_chunk in zip(*(t.split(ROWS_PER_CHUNK) for t in (x, all_rows, grad_x)), strict=True):
            *sums, grad = contrast_rows(x_chunk, y, valid, rows, scale)
            grad_chunk.copy_(grad)
            totals.append(torch.stack(sums))
        # Cloned, since views must not leave an FSDP module.
        total = torch.stack(totals).sum(dim=0)
        is_finite = total.isfinite().all() & grad_x.isfinite().all()
        grad_x.masked_fill_(~is_finite, 0.0)
        loss, correct, positive_cosine, grad_scale = (number.clone() for number in torch.where(is_finite, total, 0.0))
        ctx.save_for_backward(grad_x, grad_scale)
        ctx.mark_non_differentiable(correct, positive_cosine, is_finite)
        return loss, correct, positive_cosine, is_finite

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_scale = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), None, None, grad_scale * grad_loss


class InfoNCEEstimator(nn.Module):
    """InfoNCE over the valid pairs of one packed batch, with cosine similarity.

    Args:
        hidden_size: width d of guesses and summaries.
        temperature: divides the cosines.
        learnable_temperature: make it a parameter (its logarithm, so that it stays positive), starting at `temperature`.
    """

    def __init__(self, hidden_size: int, temperature: float = 0.1, learnable_temperature: bool = False):
        super().__init__()
        self.hidden_size = hidden_size
        self.initial_temperature = temperature
        self.log_temperature = nn.Parameter(torch.empty(1)) if learnable_temperature else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the temperature; needed after building on the meta device."""
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.initial_temperature))

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

    def contrast(self, x: Tensor, y: Tensor, valid_mask: Tensor) -> Contrast:
        """Compare every valid guess with every valid summary.

        Args:
            x: [..., d] guesses. y: [..., d] summaries, detached; row i of y is the positive of row i of x.
            valid_mask: bool [...]; an invalid row is neither anchor nor candidate. It may be all false: then every sum is
                exactly 0 and the backward still runs.
        """
        assert not y.requires_grad, "summaries are labels: detach them"
        x, y = x.reshape(-1, self.hidden_size), y.reshape(-1, self.hidden_size)
        valid = valid_mask.reshape(-1)
        x, y = _normalize(x), _normalize(y)
        loss_sum, correct, positive_cosine, is_finite = _InfoNCESum.apply(x, y, valid, 1.0 / self.temperature(like=x))

        with torch.no_grad():
            count = torch.where(is_finite, valid.sum(), 0).to(loss_sum.dtype)
            all_cosines = torch.where(is_finite, (_sum_valid(x, valid) * _sum_valid(y, valid)).sum(), 0.0)
            negative_cosine = (all_cosines - positive_cosine) / (count - 1).clamp(min=1)
            mi = count * count.clamp(min=1).log() - loss_sum
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


@torch.no_grad()
def read_temperature(estimator: InfoNCEEstimator) -> Tensor:
    """The learned temperature, 0-d, outside a forward: there FSDP holds the parameter in shards. A collective call."""
    parameter = estimator.log_temperature
    assert parameter is not None
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.exp().squeeze()


def build_mi_estimator(
    estimator_type: Literal["infonce"], hidden_size: int, temperature: float = 0.1, learnable_temperature: bool = False
) -> InfoNCEEstimator:
    """The estimator of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if estimator_type != "infonce":
        raise ValueError(f'estimator_type = "{estimator_type}": allowed is "infonce"')
    return InfoNCEEstimator(hidden_size, temperature, learnable_temperature)
