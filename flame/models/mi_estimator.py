"""Lower bounds on the mutual information between a prediction and its future, used as losses.

InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4): with N anchors x_i, K candidates y_j, of which y_o(i) belongs to x_i,
a score s and a temperature t,

    loss = -1/N sum_i log( exp(s(x_i, y_o(i)) / t) / sum_j exp(s(x_i, y_j) / t) ),      I(x; y) >= ln K - loss.

The bound holds for candidates drawn independently of the anchor. Candidates here come from the same packed sequence (N = K) or
from several, and some may be excluded, so the bound is approximate.

Candidates are labels, so only x and the parameters of the score need a gradient, and the incoming gradient is a scalar. The
forward therefore computes the gradient itself, in chunks of rows. This costs two matrix products (4 N K d FLOPs), one pass of
`softmax_rows_` over the scores of each chunk, and O(chunk x K) memory.

In a narrow dtype, candidates are centred first. A vector c that is taken from all of them changes the scores of an anchor by one
number, x_i . c, and so neither its loss nor its gradient; their rounding is then relative to how candidates differ. In bfloat16,
numbers near 1 are 0.004 apart, more than the cosines of candidates in a narrow cone.

Shape legend: N anchors, K candidates, d width, c rows of a chunk.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flame.kernels.gradient_guard import guard_gradient
from flame.kernels.softmax_rows import count_chunk_rows, softmax_rows_
from flame.models.aux_loss import AuxLoss
from flame.models.estimator import Candidates, Estimator, at_least_float32, average_others, sum_valid
from flame.models.estimators import ESTIMATORS, HIGHEST_LEARNED_TEMPERATURE, LOWEST_LEARNED_TEMPERATURE
from flame.runtime.measures import Mean, Measures

__all__ = [
    "AuxLoss",
    "BilinearEstimator",
    "Candidates",
    "Estimator",
    "InfoNCEEstimator",
    "build_mi_estimator",
    "read_temperature",
]


class _Columns(NamedTuple):
    """The candidate in each column of the scores: the valid ones in order, then arbitrary ones as padding up to K."""

    order: Tensor
    """int64 [K]: candidate of each column."""
    own: Tensor
    """int64 [N]: column of each row's own candidate; -1 for rows that are not valid."""
    total: Tensor
    """int64 0-d: number of columns that count."""
    excluded: tuple[Tensor, Tensor] | None
    """int64 [N] and [N]: first and last column that do not count for a row."""
    keys: tuple[Tensor, Tensor] | None
    """int32 [K] and [N]: key of each column, and of each row's own column."""


def _arrange_columns(valid: Tensor, candidates: Candidates) -> _Columns:
    """Arrange the columns. Does not wait for the device.

    Args:
        valid: bool [N], which rows are anchors.
    """
    total = candidates.is_valid.numel()
    before = torch.cat([valid.new_zeros(1, dtype=torch.long), candidates.is_valid.cumsum(0)])  # valid candidates before each
    order = before.new_zeros(total + 1)
    order.scatter_(0, torch.where(candidates.is_valid, before[:-1], total), torch.arange(total, device=valid.device))
    order = order[:total]
    # An anchor whose own candidate is not valid is the caller's error. Its column is out of range, which makes its loss NaN.
    own = torch.where(candidates.is_valid[candidates.own], before[candidates.own], total)
    excluded, keys = None, None
    if candidates.excluded is not None:
        first, last = candidates.excluded
        excluded = before[first], before[last + 1] - 1
    if candidates.keys is not None:
        numbers = _number_keys(candidates.keys)
        keys = numbers[order], numbers[candidates.own]
    return _Columns(order, torch.where(valid, own, -1), before[-1].clone(), excluded, keys)


def _number_keys(keys: Tensor) -> Tensor:
    """int64 [K] -> int32 [K], equal if and only if the keys are. This halves what is read for each row of scores."""
    ascending, order = keys.sort()
    is_new = torch.cat([ascending.new_zeros(1), (ascending[1:] != ascending[:-1]).long()])
    return torch.empty_like(keys).scatter_(0, order, is_new.cumsum(0)).int()


def _centre(y: Tensor, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
    """Candidates without what they share, and what was taken from each; in float32 or wider they stay as they are.

    Args:
        y: [K, d]. total: [d], sum of those that count, in float32 or wider. count: 0-d.
    """
    if y.dtype == at_least_float32(y):
        return y, None
    center = (total / count.clamp(min=1)).to(y.dtype)
    return y - center, center.to(total.dtype)


class _InfoNCESum(torch.autograd.Function):
    """(x [N, d], y [K, d], columns, scale 0-d) -> sums of loss, own score, correct, log of candidates; whether all is finite.

    Adding one vector to all of y changes own scores alone.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, columns: _Columns, scale: Tensor) -> tuple[Tensor, ...]:
        rows = count_chunk_rows(len(x), len(y), x.dtype)
        candidates = y[columns.order]
        grad_x = torch.empty_like(x)
        scores_buffer = x.new_empty(min(rows, len(x)), len(y))
        sums = []
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            scores = torch.mm(x[chunk], candidates.t(), out=scores_buffer[: len(x[chunk])])
            excluded = None if columns.excluded is None else (columns.excluded[0][chunk], columns.excluded[1][chunk])
            keys = None if columns.keys is None else (columns.keys[0], columns.keys[1][chunk])
            row = softmax_rows_(scores, columns.own[chunk], scale, columns.total, excluded, keys)
            torch.mm(scores, candidates, out=grad_x[chunk])
            is_correct = row.is_best * (row.counted > 1)  # without any negative, it does not count as correct
            log_counted = row.counted.clamp(min=1).log()
            sums.append(torch.stack([part.sum() for part in (row.loss, row.own_score, is_correct, row.grad_scale, log_counted)]))
        numbers = torch.stack(sums).sum(dim=0) if sums else x.new_zeros(5, dtype=at_least_float32(x))
        # Candidates that do not count have weight 0, but 0 times NaN or infinity is NaN.
        is_finite = numbers.isfinite().all() & grad_x.isfinite().all() & (scale > 0)
        grad_x.masked_fill_(~is_finite, 0.0)
        # Cloned, since views must not leave an FSDP module.
        loss, own_score, correct, grad_scale, log_counted = (n.clone() for n in torch.where(is_finite, numbers, 0.0))
        ctx.save_for_backward(grad_x, torch.where(is_finite, scale, 0.0), grad_scale)
        ctx.mark_non_differentiable(own_score, correct, log_counted, is_finite)
        return loss, own_score, correct, log_counted, is_finite

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, scale, grad_scale = ctx.saved_tensors
        return grad_x * (grad_loss * scale).to(grad_x.dtype), None, None, grad_scale * grad_loss


class InfoNCEEstimator(Estimator):
    """InfoNCE over the valid pairs, with cosine similarity.

    Args:
        hidden_size, projection_dim: as `Estimator`.
        temperature: divides the cosines.
        learnable_temperature: make it a parameter (its logarithm, so that it stays positive), starting at `temperature`.
    """

    def __init__(self, hidden_size: int, temperature: float = 0.1, learnable_temperature: bool = False, projection_dim: int = 0):
        super().__init__(hidden_size, projection_dim)
        self.initial_temperature = temperature
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.empty(1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the temperature and draw the projection; needed after building on the meta device."""
        super().init_weights()
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.initial_temperature))

    def temperature(self, like: Tensor) -> Tensor:
        """0-d tensor on the device of `like`, in float32 or wider."""
        dtype = at_least_float32(like)
        if self.log_temperature is None:
            return torch.full((), self.initial_temperature, dtype=dtype, device=like.device)
        return self.log_temperature.to(dtype).exp().squeeze()

    @classmethod
    def build(cls, hidden_size: int, temperature: float, learnable_temperature: bool, projection_dim: int) -> Estimator:
        return cls(hidden_size, temperature, learnable_temperature, projection_dim)

    def count_flops(self, anchors: int, candidates: int) -> int:
        """4 N K d."""
        return 4 * anchors * candidates * self.width

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Clamp the learned temperature to the bounds of `flame.models.estimators`. Call it after each optimizer step.

        The parameter is clamped, not its use in the loss: then it keeps a gradient at a bound and can move back.
        """
        if self.log_temperature is not None:
            self.log_temperature.clamp_(math.log(LOWEST_LEARNED_TEMPERATURE), math.log(HIGHEST_LEARNED_TEMPERATURE))

    def compare_with(self, x: Tensor, valid: Tensor, candidates: Candidates) -> AuxLoss:
        """As `Estimator.compare_with`."""
        x, y = self.normalize(x), candidates.summaries
        columns = _arrange_columns(valid, candidates)
        total_y = sum_valid(y, candidates.is_valid)
        centred, center = _centre(y, total_y, columns.total)
        loss_sum, own, correct, log_counted, is_finite = _InfoNCESum.apply(x, centred, columns, 1.0 / self.temperature(like=x))
        with torch.no_grad():
            total_x = sum_valid(x, valid)
            positive = torch.where(is_finite, own if center is None else own + total_x @ center, 0.0)
            all_pairs = (total_x * total_y).sum()
            negative = torch.where(is_finite, average_others(all_pairs, positive, columns.total), 0.0)
            outcome = _summarize(loss_sum, correct, log_counted, is_finite, valid)
            count = outcome.num_items
        return outcome._replace(
            measures={**outcome.measures, "positive_cosine": Mean(positive, count), "negative_cosine": Mean(negative, count)}
        )


class BilinearEstimator(Estimator):
    """InfoNCE with the score x^T W y (CPC, arXiv:1807.03748, eq. 3), where W is a learned [width, width] matrix.

    x and y have unit length; x^T W is not normalised. CPC normalises nothing. Here, the length of a summary comes from the
    network's last norm. It would favour some candidates for every anchor, and no prediction could change that. With unit vectors,
    the largest singular value of W bounds the scores. Normalising x^T W would take from W how sharply it separates directions.

    W starts as I / temperature, which is InfoNCE with cosines. A separate factor 1 / temperature beside W would make each step of
    Adam larger by that factor. The product x W costs 6 N d^2 FLOPs more, and autograd differentiates it.

    Args:
        hidden_size, projection_dim: as `Estimator`.
        temperature: sets the initial W.
    """

    def __init__(self, hidden_size: int, temperature: float = 0.1, projection_dim: int = 0):
        super().__init__(hidden_size, projection_dim)
        self.initial_temperature = temperature
        self.weight = nn.Parameter(torch.empty(self.width, self.width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set W and draw the projection; needed after building on the meta device."""
        super().init_weights()
        weight = self.weight.data
        start = torch.eye(self.width, dtype=weight.dtype) / self.initial_temperature
        if isinstance(weight, DTensor):
            start = distribute_tensor(start, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
            weight = weight.to_local()
        weight.copy_(start)

    @classmethod
    def build(cls, hidden_size: int, temperature: float, learnable_temperature: bool, projection_dim: int) -> Estimator:
        return cls(hidden_size, temperature, projection_dim)

    def count_flops(self, anchors: int, candidates: int) -> int:
        """4 N K d + 6 N d^2."""
        return 4 * anchors * candidates * self.width + 6 * anchors * self.width**2

    def compare_with(self, x: Tensor, valid: Tensor, candidates: Candidates) -> AuxLoss:
        """As `Estimator.compare_with`, but without the cosine measures: W maps predictions to another space."""
        x, weight = guard_gradient(x), guard_gradient(self.weight)  # 0 times NaN or infinity is NaN
        x = self.normalize(x) @ weight.to(x.dtype)
        one = torch.ones((), dtype=at_least_float32(x), device=x.device)
        columns, y = _arrange_columns(valid, candidates), candidates.summaries
        centred, _ = _centre(y, sum_valid(y, candidates.is_valid), columns.total)
        loss_sum, _, correct, log_counted, is_finite = _InfoNCESum.apply(x, centred, columns, one)
        with torch.no_grad():
            return _summarize(loss_sum, correct, log_counted, is_finite, valid)


def _summarize(loss_sum: Tensor, correct: Tensor, log_counted: Tensor, is_finite: Tensor, valid: Tensor) -> AuxLoss:
    count = torch.where(is_finite, valid.sum(), 0).to(loss_sum.dtype)
    measures: Measures = {
        "mi_lower_bound": Mean(log_counted - loss_sum.detach(), count),
        "infonce_accuracy": Mean(correct, count),
    }
    return AuxLoss(loss_sum, count, 1.0 - is_finite.to(loss_sum.dtype), measures)


@torch.no_grad()
def read_temperature(estimator: Estimator, compute_dtype: torch.dtype) -> Tensor | float | None:
    """The temperature that divides the cosines. Works outside a forward, where FSDP shards a learned one. A collective call.

    Args:
        compute_dtype: dtype to which FSDP rounds the parameter (the logarithm) in a forward. bfloat16 makes steps of 1.6 % for
            temperatures from 0.018 to 0.135.

    Returns:
        the learned temperature, 0-d; or the fixed one; or None if the estimator has no temperature.
    """
    parameter = estimator.log_temperature
    if parameter is None:
        return estimator.initial_temperature if isinstance(estimator, InfoNCEEstimator) else None
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.to(compute_dtype).to(whole.dtype).exp().squeeze()


def build_mi_estimator(
    estimator_type: str,
    hidden_size: int,
    temperature: float = 0.1,
    learnable_temperature: bool = False,
    projection_dim: int = 0,
) -> Estimator:
    """Build an estimator by name.

    Args:
        estimator_type: "infonce" or "bilinear"; without negatives and temperature, "cosine" or "smooth_l1".
        hidden_size, projection_dim: as `Estimator`.
        temperature: of "infonce"; sets the initial matrix of "bilinear".
        learnable_temperature: learn the temperature of "infonce".

    Raises:
        ValueError: unknown estimator_type, or a learnable temperature with another estimator than "infonce".
    """
    if estimator_type not in ESTIMATORS:
        raise ValueError(f'estimator_type = "{estimator_type}": allowed are ' + ", ".join(f'"{name}"' for name in ESTIMATORS))
    entry = ESTIMATORS[estimator_type]
    if learnable_temperature and not entry.can_learn_temperature:
        raise ValueError(f'learnable_temperature = True has no meaning for estimator_type = "{estimator_type}"')
    kind: type[Estimator] = getattr(import_module(f"flame.models.{entry.module}"), entry.class_name)
    return kind.build(hidden_size, temperature, learnable_temperature, projection_dim)
