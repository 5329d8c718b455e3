"""What all estimators have in common: what they are given, what they return, and the space in which they compare.

Shape legend: N anchors, K candidates, d width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Contrast(NamedTuple):
    """Outcome of one comparison; sums over the valid anchors, 0-d float tensors. Only `loss_sum` carries gradients."""

    loss_sum: Tensor
    num_anchors: Tensor
    failed: Tensor
    """1 if loss or gradient came out infinite or NaN, else 0. Then all else in here, and every gradient, is exactly 0."""
    measures: dict[str, tuple[Tensor, Tensor]]
    """Sum and count of what this estimator measures besides, by metric:

    - "mi_lower_bound": ln K - loss, with K the candidates that count for the anchor, its own included. The mean bounds the mutual
      information from below, in nats.
    - "infonce_accuracy": anchors whose own summary scores strictly above every other: ties are misses, so collapsed summaries
      score 0, and so does an anchor without negatives.
    - "positive_cosine": between guess and own summary.
    - "negative_cosine": each anchor contributes its mean over all other candidates. Near the positive one, summaries have
      collapsed.
    """


class Candidates(NamedTuple):
    """What the guesses of N anchors are compared with: K summaries, of one pack or of many."""

    summaries: Tensor
    """[K, width], as `Estimator.encode_targets` gives them."""
    is_valid: Tensor
    """bool [K]: which ones count."""
    own: Tensor
    """int64 [N]: the candidate that belongs to each anchor, a valid one if the anchor is valid."""
    excluded: tuple[Tensor, Tensor] | None = None
    """int64 [N] and [N]: first and last candidate that are no negatives of an anchor; its own still counts. An empty range has
    its last right before its first."""
    keys: Tensor | None = None
    """int64 [K]: candidates with the key of the own one are no negatives."""


class Estimator(nn.Module):
    """Scores guesses against summaries.

    Args:
        hidden_size: width d of the summaries, and of the guesses.
        projection_dim: if not 0, guesses have this width, and a fixed random matrix takes the summaries to it. Random projections
            to p dimensions change cosines by about 1 / sqrt(p) (Johnson and Lindenstrauss 1984).
    """

    projection: Tensor | None
    log_temperature: nn.Parameter | None

    def __init__(self, hidden_size: int, projection_dim: int = 0):
        super().__init__()
        self.hidden_size = hidden_size
        self.width = projection_dim or hidden_size
        self.log_temperature = None
        self.register_buffer("projection", torch.empty(hidden_size, projection_dim) if projection_dim else None)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the parameters and draw the projection; needed after building on the meta device."""
        if self.projection is not None:
            self.projection.normal_(std=self.width**-0.5)

    def limit_temperature(self) -> None:
        """Keep a learned temperature in its bounds; call after each optimizer step."""

    def normalize(self, vectors: Tensor) -> Tensor:
        """[..., width] -> unit vectors of the same dtype."""
        return (_normalize_compiled if vectors.is_cuda else _normalize)(vectors)

    def encode_targets(self, y: Tensor) -> Tensor:
        """Summaries [..., d], detached, as what `contrast_among` compares with, [..., width]. Candidates from elsewhere travel
        as this: it is all that the comparison needs."""
        assert not y.requires_grad, "summaries are labels: detach them"
        if self.projection is not None:
            y = y @ self.projection.to(y.dtype)
        return self.normalize(y)

    def contrast_among(self, x: Tensor, valid: Tensor, candidates: Candidates) -> Contrast:
        """Compare the guesses of anchors with candidates.

        Args:
            x: [N, width] guesses.
            valid: bool [N], which rows are anchors; the others count nothing. It may be all false: then every sum is exactly 0
                and the backward still runs.
        """
        raise NotImplementedError

    def contrast(
        self,
        x: Tensor,
        y: Tensor,
        valid_mask: Tensor,
        excluded: tuple[Tensor, Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> Contrast:
        """Compare every valid guess with every valid summary of the same pack.

        Args:
            x: [..., d] guesses ([..., projection_dim] with a projection). y: [..., d] summaries, detached; row i of y belongs to
                row i of x.
            valid_mask: bool [...]; an invalid row is neither anchor nor candidate.
            excluded, keys: as in `Candidates`, by row.
        """
        x, summaries = x.reshape(-1, self.width), self.encode_targets(y.reshape(-1, self.hidden_size))
        valid = valid_mask.reshape(-1)
        own = torch.arange(len(valid), device=valid.device)
        return self.contrast_among(x, valid, Candidates(summaries, valid, own, excluded, keys))

    def forward(self, x: Tensor, y: Tensor, valid_mask: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Loss, 0-d: the mean over valid anchors (0 where there are none) or their sum. Shapes as `contrast`.

        Raises:
            ValueError: for another reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction = "{reduction}": allowed are "mean" and "sum"')
        outcome = self.contrast(x, y, valid_mask)
        return outcome.loss_sum / outcome.num_anchors.clamp(min=1) if reduction == "mean" else outcome.loss_sum


def at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _normalize(vectors: Tensor) -> Tensor:
    """Unit vectors. The norm is taken in float32 or wider: rounded to bfloat16 it would be off by up to 0.4%."""
    return F.normalize(vectors.to(at_least_float32(vectors)), dim=-1).to(vectors.dtype)


def _sum_valid(vectors: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[:, None], vectors, 0.0).sum(dim=0, dtype=at_least_float32(vectors))


_normalize_compiled = torch.compile(_normalize, dynamic=False)
_sum_valid_compiled = torch.compile(_sum_valid, dynamic=False)


def sum_valid(vectors: Tensor, valid: Tensor) -> Tensor:
    """[N, d], bool [N] -> [d], in float32 or wider."""
    return (_sum_valid_compiled if vectors.is_cuda else _sum_valid)(vectors, valid)


def average_others(all_pairs: Tensor, own_pairs: Tensor, num_candidates: Tensor) -> Tensor:
    """From sums over all pairs of anchor and candidate, and over own ones, 0-d: each anchor's mean over the others, summed."""
    return (all_pairs - own_pairs) / (num_candidates - 1).clamp(min=1)
