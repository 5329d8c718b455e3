"""Estimators without negatives, for comparison: guess and own summary are brought together, and nothing is pushed apart.

Nothing but the asymmetry (a predictor on one side, no gradient on the other) keeps summaries from collapsing to one vector, which
makes these losses 0. "positive_cosine" beside "negative_cosine" tells whether they have.

The gradient is formed in the forward, as InfoNCE's is, so that what is not finite is known before anything flows back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.estimator import Candidates, Contrast, Estimator, at_least_float32, average_others, sum_valid
from flame.models.softmax_rows import count_chunk_rows

Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(guesses [c, d], unit targets [c, d]) -> losses [c], unit guesses [c, d], in float32 or wider."""


class _RegressionSum(torch.autograd.Function):
    """(x [N, d], own targets [N, d], valid [N], compare) -> sums of loss, cosine and unit guesses [d]; whether all is finite."""

    @staticmethod
    def forward(ctx, x: Tensor, targets: Tensor, valid: Tensor, compare: Compare) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = count_chunk_rows(len(x), x.shape[1], at_least_float32(x))
        grad_x = torch.empty_like(x)
        sums, directions = [], []
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                guesses = x[chunk].detach().requires_grad_()
                losses, units = compare(guesses, targets[chunk])
                (grad,) = torch.autograd.grad(losses.sum(), guesses)
            units, counts = units.detach(), valid[chunk]
            grad_x[chunk] = torch.where(counts[:, None], grad, 0.0)
            cosines = (units * targets[chunk]).sum(dim=-1)
            sums.append(torch.stack([torch.where(counts, part, 0.0).sum() for part in (losses.detach(), cosines)]))
            directions.append(sum_valid(units, counts))
        numbers, direction = torch.stack(sums).sum(dim=0), torch.stack(directions).sum(dim=0)
        is_finite = numbers.isfinite().all() & grad_x.isfinite().all()
        ctx.save_for_backward(grad_x.masked_fill_(~is_finite, 0.0))
        # Cloned, since views must not leave an FSDP module.
        loss, cosine = (number.clone() for number in torch.where(is_finite, numbers, 0.0))
        ctx.mark_non_differentiable(cosine, direction, is_finite)
        return loss, cosine, direction, is_finite

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (grad_x,) = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), None, None, None


class RegressionEstimator(Estimator):
    """Loss of each guess against its own summary alone; the other candidates serve "negative_cosine" and nothing else."""

    def __init__(self, hidden_size: int, projection_dim: int = 0):
        super().__init__(hidden_size, projection_dim)
        self.init_weights()

    @staticmethod
    def compare(guesses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[c, d] and [c, d] -> losses [c], unit guesses [c, d]."""
        raise NotImplementedError

    def contrast_among(self, x: Tensor, valid: Tensor, candidates: Candidates) -> Contrast:
        """As `Estimator.contrast_among`. Exclusions change nothing here."""
        own = candidates.summaries[candidates.own]
        loss_sum, positive, direction, is_finite = _RegressionSum.apply(x, own, valid, self.compare)
        with torch.no_grad():
            count = torch.where(is_finite, valid.sum(), 0).to(loss_sum.dtype)
            all_pairs = (direction * sum_valid(candidates.summaries, candidates.is_valid)).sum()
            negative = average_others(all_pairs, positive, candidates.is_valid.sum())
            # Another candidate that is not finite is no fault of the loss: it only makes this number useless.
            negative = torch.where(is_finite & negative.isfinite(), negative, 0.0)
            failed = 1.0 - is_finite.to(loss_sum.dtype)
        measures = {"positive_cosine": (positive, count), "negative_cosine": (negative, count)}
        return Contrast(loss_sum, count, failed, measures)


class CosineEstimator(RegressionEstimator):
    """1 - cos(x, y): half the squared distance of the unit vectors, which is the loss of BYOL (Grill et al. 2020,
    arXiv:2006.07733, eq. 2)."""

    @staticmethod
    def compare(guesses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        units = F.normalize(guesses.to(at_least_float32(guesses)), dim=-1)
        return 1.0 - (units * targets).sum(dim=-1), units


class SmoothL1Estimator(RegressionEstimator):
    """Huber loss, beta = 1, between layer-normalised vectors, averaged over the components.

    data2vec (Baevski et al. 2022, arXiv:2202.03555) regresses to targets behind a layer normalisation without parameters (section
    3.3) with this loss (section 3.4). Its guess is free; here the predictor gives unit vectors, so the guess is normalised in
    the same way. With a, b of d components, mean 0 and mean square 1,

        loss = 1/d sum_k h(a_k - b_k),      h(r) = r^2 / 2 where |r| <= 1, and |r| - 1/2 beyond.

    Where all components are that close it is 1 - cos(a, b): the cosine loss of centered vectors, with outliers held down.
    """

    def normalize(self, vectors: Tensor) -> Tensor:
        """[..., width] -> vectors without their mean, at unit length: layer-normalised but for a factor sqrt(width)."""
        return super().normalize(_center(vectors)).to(vectors.dtype)

    @staticmethod
    def compare(guesses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        units = F.normalize(_center(guesses), dim=-1)
        root = guesses.shape[1] ** 0.5
        losses = F.smooth_l1_loss(units * root, targets.to(units.dtype) * root, reduction="none", beta=1.0).mean(dim=-1)
        return losses, units


def _center(vectors: Tensor) -> Tensor:
    wide = vectors.to(at_least_float32(vectors))
    return wide - wide.mean(dim=-1, keepdim=True)
