"""The method: both forwards and both losses of one packed batch, and what is logged of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flame.components.metrics import Metrics
from flame.config import JobConfig
from flame.data.batch import PackedBatch
from flame.models.future_lm import FutureLM
from flame.models.future_mask import find_anchors
from flame.models.gradient_guard import guard_gradient
from flame.models.losses import linear_cross_entropy
from flame.models.mi_estimator import Contrast


class Losses(NamedTuple):
    """Sums over one packed batch, to be divided by global counts; None where not computed."""

    ce_sum: Tensor | None
    contrast: Contrast | None


def compute_losses(model: FutureLM, batch: PackedBatch, config: JobConfig, with_future: bool) -> Losses:
    """Both forwards and both losses of one packed batch of T tokens. Run it as `model(compute_losses, ...)`."""
    future, frozen = config.future_encoder, config.experimental.freeze_lm_for_infonce

    # 1. Causal forward: hidden states h [T, d], and next-token cross entropy from them.
    hidden_states = model.encode_past(batch)
    ce_sum = None if frozen else linear_cross_entropy(hidden_states, model.output_embedding, batch.labels[0])
    if not with_future:
        return Losses(ce_sum, None)

    # 2. Anti-causal forward of the same network: summaries F [T, d] of each position's future. Labels: no gradient, no logits.
    with torch.no_grad():
        summaries = model.encode_future(batch, future.future_k).detach()

    # 3. Position t guesses F at t + target_shift; the summaries of all other anchors are the negatives.
    assert model.predictor is not None and model.estimator is not None
    anchors = find_anchors(batch.segment_ids[0], future.target_shift)
    targets = summaries.roll(-future.target_shift, dims=0)
    contrast = model.estimator.contrast(model.predictor(guard_gradient(hidden_states)), targets, anchors)
    return Losses(ce_sum, contrast)


def record_losses(
    metrics: Metrics, losses: Losses, batch: PackedBatch, sources: list[str], prefix: str = "", times: int = 1
) -> None:
    """Record the losses of one packed batch as means per label and per anchor.

    Args:
        sources: names of all sources of the mixture. Where there are several, cross entropy is recorded for each.
        prefix: of the metrics' names.
        times: 0 records the names alone, which all ranks must have in common.
    """

    def record(name: str, total: Tensor, count: Tensor | int, weight: int = times) -> None:
        metrics.record_mean(prefix + name, total if weight else 0.0, count if weight else 0)

    if losses.ce_sum is not None:
        record("ce_loss", losses.ce_sum, batch.num_labels)
        for name in sources if len(sources) > 1 else ():
            record(f"ce_loss/{name}", losses.ce_sum, batch.num_labels, times * (name == batch.source))
    if losses.contrast is not None:
        contrast = losses.contrast
        record("aux_loss", contrast.loss_sum, contrast.num_anchors)
        record("mi_lower_bound", contrast.mi_sum, contrast.num_anchors)
        record("infonce_accuracy", contrast.correct, contrast.num_anchors)
        record("positive_cosine", contrast.positive_cosine_sum, contrast.num_anchors)
        record("negative_cosine", contrast.negative_cosine_sum, contrast.num_anchors)
