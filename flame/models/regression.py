"""Estimators without negatives, as controls: a prediction is pulled to its own summary, and nothing is pushed apart.

If all summaries collapse to one vector, these losses are 0. Only the asymmetry prevents that: one side has a predictor, the other
has no gradient. Compare "positive_cosine" with "negative_cosine" to see whether summaries have collapsed.

As in InfoNCE, the forward computes the gradient, so that a gradient that is not finite is known before the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.softmax_rows import count_chunk_rows
from flame.models.aux_loss import AuxLoss
from flame.models.estimator import Candidates, Estimator, at_least_float32, average_others, sum_valid
from flame.runtime.measures import Mean, Measures

Regress = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(predictions [c, d], unit targets [c, d]) -> losses [c], unit predictions [c, d], in float32 or wider."""


class _RegressionSum(torch.autograd.Function):
    """(x [N, d], targets [N, d], valid [N], regress) -> sums of loss, cosine and unit predictions [d]; whether all are finite."""

    @staticmethod
    def forward(ctx, x: Tensor, targets: Tensor, valid: Tensor, regress: Regress) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = count_chunk_rows(len(x), x.shape[1], at_least_float32(x))
        grad_x = torch.empty_like(x)
        sums, directions = [], []
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                predictions = x[chunk].detach().requires_grad_()
                losses, units = regress(predictions, targets[chunk])
                (grad,) = torch.autograd.grad(losses.sum(), predictions)
            units, counts = units.detach(), valid[chunk]
            grad_x[chunk] = torch.where(counts[:, None], grad, 0.0)
            cosines = (units * targets[chunk]).sum(dim=-1)
            sums.append(torch.stack([torch.where(counts, values, 0.0).sum() for values in (losses.detach(), cosines)]))
            directions.append(sum_valid(units, counts))
        wide = at_least_float32(x)
        numbers = torch.stack(sums).sum(dim=0) if sums else x.new_zeros(2, dtype=wide)
        direction = torch.stack(directions).sum(dim=0) if sums else x.new_zeros(x.shape[1], dtype=wide)
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
    """Loss of each prediction against its own summary. The other candidates are only used for "negative_cosine"."""

    def __init__(self, hidden_size: int, projection_dim: int = 0):
        super().__init__(hidden_size, projection_dim)
        self.init_weights()

    @staticmethod
    def regress(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[c, d] and [c, d] -> losses [c], unit predictions [c, d]."""
        raise NotImplementedError

    def compare_with(self, x: Tensor, valid: Tensor, candidates: Candidates) -> AuxLoss:
        """As `Estimator.compare_with`. Exclusions have no effect."""
        own = candidates.summaries[candidates.own]
        loss_sum, positive, direction, is_finite = _RegressionSum.apply(x, own, valid, self.regress)
        with torch.no_grad():
            count = torch.where(is_finite, valid.sum(), 0).to(loss_sum.dtype)
            all_pairs = (direction * sum_valid(candidates.summaries, candidates.is_valid)).sum()
            negative = average_others(all_pairs, positive, candidates.is_valid.sum())
            # If another candidate is not finite, the loss has not failed; only this measure is meaningless.
            negative = torch.where(is_finite & negative.isfinite(), negative, 0.0)
            failed = 1.0 - is_finite.to(loss_sum.dtype)
        measures: Measures = {"positive_cosine": Mean(positive, count), "negative_cosine": Mean(negative, count)}
        return AuxLoss(loss_sum, count, failed, measures)


class CosineEstimator(RegressionEstimator):
    """1 - cos(x, y), which is half the squared distance of the unit vectors: half the loss of BYOL (Grill et al. 2020,
    arXiv:2006.07733, eq. 2)."""

    @staticmethod
    def regress(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        units = F.normalize(predictions.to(at_least_float32(predictions)), dim=-1)
        return 1.0 - (units * targets).sum(dim=-1), units


class SmoothL1Estimator(RegressionEstimator):
    """Huber loss (beta = 1) between layer-normalised vectors, averaged over the components.

    data2vec (Baevski et al. 2022, arXiv:2202.03555) uses this loss (section 3.4) with targets that are layer-normalised without
    parameters (section 3.3). Its predictions are not normalised. Here the predictor gives unit vectors, so predictions are
    normalised like targets. With a, b of d components, mean 0 and mean square 1,

        loss = 1/d sum_k h(a_k - b_k),      h(r) = r^2 / 2 where |r| <= 1, and |r| - 1/2 beyond.

    If all |r| <= 1, the loss is 1 - cos(a, b), the cosine loss of centered vectors. Larger differences count less.
    """

    def normalize(self, vectors: Tensor) -> Tensor:
        """[..., width] -> centered vectors of unit length: layer normalisation without its factor sqrt(width)."""
        return super().normalize(_center(vectors)).to(vectors.dtype)

    @staticmethod
    def regress(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        units = F.normalize(_center(predictions), dim=-1)
        root = predictions.shape[1] ** 0.5
        losses = F.smooth_l1_loss(units * root, targets.to(units.dtype) * root, reduction="none", beta=1.0).mean(dim=-1)
        return losses, units


def _center(vectors: Tensor) -> Tensor:
    wide = vectors.to(at_least_float32(vectors))
    return wide - wide.mean(dim=-1, keepdim=True)
