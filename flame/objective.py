"""The method: both forwards and both losses of one packed batch, and what is logged of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flame.components.metrics import Metrics
from flame.config import JobConfig
from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.future_lm import FutureLM
from flame.models.future_mask import count_anchors, draw_anchors, find_anchors, find_neighbors, find_room, list_marked
from flame.models.gradient_guard import guard_gradient
from flame.models.losses import linear_cross_entropy
from flame.models.mi_estimator import Contrast
from flame.models.softmax_rows import count_chunk_rows


class Losses(NamedTuple):
    """Sums over one packed batch, to be divided by global counts; None where not computed."""

    ce_sum: Tensor | None
    contrast: Contrast | None
    is_hit: Tensor | None = None
    """bool [T]: where the label is the token that scores highest."""


def compute_losses(model: FutureLM, batch: PackedBatch, config: JobConfig, with_future: bool, with_hits: bool = False) -> Losses:
    """Both forwards and both losses of one packed batch of T tokens. Run it as `model(compute_losses, ...)`."""
    future, frozen = config.future_encoder, config.experimental.freeze_lm_for_infonce

    # 1. Anti-causal forward: summaries F [T, d] of each position's future. Labels: no gradient, no logits. It comes before the
    #    causal forward, so that its working memory is free again before that one's activations are kept.
    summaries = None
    if with_future:
        with torch.no_grad():
            summaries = model.encode_future(batch, future.future_k).detach()

    # 2. Causal forward of the same network: hidden states h [T, d], and next-token cross entropy from them.
    hidden_states = model.encode_past(batch)
    ce_sum = None if frozen else _compare_with_next(model, hidden_states, batch, config)
    is_hit = find_hits(hidden_states, model.output_embedding, batch.labels[0]) if with_hits else None
    if summaries is None:
        return Losses(ce_sum, None, is_hit)

    # 3. Position t guesses F at t + target_shift; the summaries of all other anchors are the negatives.
    return Losses(ce_sum, _contrast_with_future(model, guard_gradient(hidden_states), summaries, batch, config), is_hit)


def _compare_with_next(model: FutureLM, hidden_states: Tensor, batch: PackedBatch, config: JobConfig) -> Tensor:
    """Sum of the cross entropies from hidden_states [T, d]. Where only answers count, no other position has logits."""
    labels = batch.labels[0]
    if config.training.loss_on == "answer":
        positions = list_marked(labels != NO_LABEL, find_room(batch.num_labels, len(labels)))
        hidden_states, labels = hidden_states[positions], labels[positions]
    return linear_cross_entropy(hidden_states, model.output_embedding, labels)


def _contrast_with_future(
    model: FutureLM, hidden_states: Tensor, summaries: Tensor, batch: PackedBatch, config: JobConfig
) -> Contrast:
    """Compare guesses from hidden_states [T, d] with summaries [T, d], at all anchors or at `max_anchors` of them.

    Where only answers count, so do only the anchors whose next token is one. The others are neither guessed for nor negatives.
    """
    assert model.predictor is not None and model.estimator is not None
    future = config.future_encoder
    shift = future.target_shift
    segment_ids = batch.segment_ids[0]
    valid = find_anchors(segment_ids, shift)
    excluded = find_neighbors(segment_ids, future.exclude_neighbors) if future.exclude_neighbors else None
    room = future.max_anchors or len(valid)
    if config.training.loss_on == "answer":
        valid = valid & (batch.labels[0] != NO_LABEL)
        room = find_room(count_anchors(batch.cu_seqlens, shift, room, batch.piece_labels), min(room, len(valid)))
    if room < len(valid):
        positions, valid = draw_anchors(valid, room, (config.training.seed << 32) + batch.sequence_index)
        hidden_states, targets = hidden_states[positions], summaries[(positions + shift) % len(summaries)]
        if excluded is not None:
            first, last = (edge[positions] for edge in excluded)
            excluded = torch.searchsorted(positions, first), torch.searchsorted(positions, last, side="right") - 1
    else:
        targets = torch.cat([summaries[shift:], summaries[:shift]])
    return model.estimator.contrast(model.predictor(hidden_states), targets, valid, excluded)


@torch.no_grad()
def find_hits(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Where the highest logit of hidden_states [T, d] @ weight.T, weight [V, d], is the label's: bool [T]. The logits of all
    positions with a label are never held at once; the others are not computed. Waits for the device."""
    positions = (labels != NO_LABEL).nonzero().flatten()
    is_hit = torch.zeros_like(labels, dtype=torch.bool)
    for chunk in positions.split(count_chunk_rows(max(len(positions), 1), len(weight), hidden_states.dtype)):
        is_hit[chunk] = (hidden_states[chunk] @ weight.t()).argmax(dim=-1) == labels[chunk]
    return is_hit


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
