"""The base class of estimators: their input, their result, and the space in which they compare.

Shape legend: N anchors, K candidates, d width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.models.aux_loss import AuxLoss


class Candidates(NamedTuple):
    """The K summaries that the predictions of N anchors are compared with, from one packed sequence or several."""

    summaries: Tensor
    """[K, width], from `Estimator.encode_targets`."""
    is_valid: Tensor
    """bool [K]: which candidates count."""
    own: Tensor
    """int64 [N]: the candidate that belongs to each anchor. For a valid anchor it must be valid."""
    excluded: tuple[Tensor, Tensor] | None = None
    """int64 [N] and [N]: first and last candidate of the range that an anchor excludes from its negatives. Its own candidate
    always counts. In an empty range, last = first - 1."""
    keys: Tensor | None = None
    """int64 [K]: candidates with the same key as an anchor's own are not its negatives."""


class Estimator(nn.Module):
    """Scores predictions against summaries.

    Its `AuxLoss` counts anchors and measures, as far as they apply:

    - "mi_lower_bound": ln K - loss, where K counts the anchor's negatives and its own candidate. Its mean is a lower bound on the
      mutual information, in nats.
    - "infonce_accuracy": share of anchors whose own summary scores strictly above every other. Ties are misses, so collapsed
      summaries score 0, and so does an anchor without negatives.
    - "positive_cosine": cosine of prediction and own summary.
    - "negative_cosine": mean cosine of a prediction and all other candidates. If it is near "positive_cosine", summaries have
      collapsed.

    Args:
        hidden_size: width d of the summaries, and of the predictions if projection_dim is 0.
        projection_dim: if not 0, predictions have this width, and a fixed random matrix projects the summaries to it. Random
            projections to p dimensions change cosines by about 1 / sqrt(p) (Johnson and Lindenstrauss 1984).
    """

    projection: Tensor | None
    log_temperature: nn.Parameter | None

    def __init__(self, hidden_size: int, projection_dim: int = 0):
        super().__init__()
        self.hidden_size = hidden_size
        self.width = projection_dim or hidden_size
        self.log_temperature = None
        self.register_buffer("projection", torch.empty(hidden_size, projection_dim) if projection_dim else None)

    @classmethod
    def build(cls, hidden_size: int, temperature: float, learnable_temperature: bool, projection_dim: int) -> Estimator:
        """One with the arguments of `flame.models.mi_estimator.build_mi_estimator`. Here the temperature is not used."""
        return cls(hidden_size, projection_dim=projection_dim)

    def count_flops(self, anchors: int, candidates: int) -> int:
        """FLOPs, forward and backward, of comparing N anchors with K candidates."""
        return 0

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the parameters and draw the projection; needed after building on the meta device."""
        if self.projection is not None:
            self.projection.normal_(std=self.width**-0.5)

    def limit_temperature(self) -> None:
        """Clamp a learned temperature to its bounds. Call it after each optimizer step."""

    def normalize(self, vectors: Tensor) -> Tensor:
        """[..., width] -> unit vectors of the same dtype."""
        return (_normalize_compiled if vectors.is_cuda else _normalize)(vectors)

    def encode_targets(self, y: Tensor) -> Tensor:
        """Project and normalise summaries [..., d], detached, to the [..., width] that `compare_with` needs. Ranks exchange
        candidates in this form."""
        assert not y.requires_grad, "summaries are labels: detach them"
        if self.projection is not None:
            y = y @ self.projection.to(y.dtype)
        return self.normalize(y)

    def compare_with(self, x: Tensor, valid: Tensor, candidates: Candidates) -> AuxLoss:
        """Compare the predictions of anchors with candidates.

        Args:
            x: [N, width], predictions.
            valid: bool [N], which rows are anchors. If none is, every sum is exactly 0, and the backward still runs.
        """
        raise NotImplementedError

    def compare(
        self,
        x: Tensor,
        y: Tensor,
        valid_mask: Tensor | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> AuxLoss:
        """Compare every valid prediction with every valid summary of the same packed sequence.

        Args:
            x: [..., d] predictions ([..., projection_dim] with a projection).
            y: [..., d] summaries, detached. Row i of y belongs to row i of x.
            valid_mask: bool [...]; an invalid row is neither anchor nor candidate. None: all rows are valid.
            excluded, keys: as in `Candidates`, by row.
        """
        x, summaries = x.reshape(-1, self.width), self.encode_targets(y.reshape(-1, self.hidden_size))
        valid = x.new_ones(len(x), dtype=torch.bool) if valid_mask is None else valid_mask.reshape(-1)
        own = torch.arange(len(valid), device=valid.device)
        return self.compare_with(x, valid, Candidates(summaries, valid, own, excluded, keys))

    def forward(
        self, x: Tensor, y: Tensor, valid_mask: Tensor | None = None, reduction: Literal["mean", "sum"] = "mean"
    ) -> Tensor:
        """Loss, 0-d: the mean over valid anchors (0 if there are none) or their sum. Shapes as `compare`.

        Raises:
            ValueError: unknown reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction = "{reduction}": allowed are "mean" and "sum"')
        outcome = self.compare(x, y, valid_mask)
        return outcome.loss_sum / outcome.num_items.clamp(min=1) if reduction == "mean" else outcome.loss_sum


def at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _normalize(vectors: Tensor) -> Tensor:
    """Unit vectors. The norm is computed in float32 or wider: in bfloat16 it would be off by up to 0.4%."""
    return F.normalize(vectors.to(at_least_float32(vectors)), dim=-1).to(vectors.dtype)


def _sum_valid(vectors: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[:, None], vectors, 0.0).sum(dim=0, dtype=at_least_float32(vectors))


_normalize_compiled = torch.compile(_normalize, dynamic=False)
_sum_valid_compiled = torch.compile(_sum_valid, dynamic=False)


def sum_valid(vectors: Tensor, valid: Tensor) -> Tensor:
    """[N, d], bool [N] -> sum over valid rows [d], in float32 or wider."""
    return (_sum_valid_compiled if vectors.is_cuda else _sum_valid)(vectors, valid)


def average_others(all_pairs: Tensor, own_pairs: Tensor, num_candidates: Tensor) -> Tensor:
    """Sum over anchors of the mean over their other candidates, 0-d.

    Args:
        all_pairs: sum over all pairs of anchor and candidate.
        own_pairs: sum over pairs of anchor and own candidate.
    """
    return (all_pairs - own_pairs) / (num_candidates - 1).clamp(min=1)
