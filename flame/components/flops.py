"""Arithmetic that a step requires, for the model FLOPs utilisation (MFU).

Counted: matrix products of the layers and the output head (2 FLOPs a weight and token forward, 4 backward; of experts, those that
a token is sent to), attention by the pairs that the masks really allow (4 FLOPs a pair, layer and channel forward, 8 backward),
predictor and InfoNCE (4 N K d, N anchors against K candidates), the layers and heads of other objectives.
Where only answers count, the anti-causal pass has to read these alone, and is counted so where it reads more (`answer_tails`).
Not counted: embedding look-ups, norms, the projection of summaries, the recurrences of linear attention, and what activation
checkpointing computes again.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from flame.components.distributed import get_world_size
from flame.config import JobConfig
from flame.models.families import list_layer_limits, tighten
from flame.models.future_encoder import find_head_dim, is_recurrent
from flame.models.future_lm import FutureLM
from flame.models.future_mask import count_anchors
from flame.models.rivals import Rival
from flame.models.weight_count import count_weights_used
from flame.objective_config import CONTRASTIVE


class Flops(NamedTuple):
    """FLOPs of one packed batch."""

    next_token: float
    future: float
    """The anti-causal forward."""
    heads: float
    """Predictor and estimator, or the layers and heads of another objective."""


def count_attention_channels(config: PretrainedConfig) -> Counter[int]:
    """Width of all query heads of all layers together, by how far their keys may be (0 is no limit)."""
    width = 0 if is_recurrent(config) else config.num_attention_heads * find_head_dim(config)
    channels: Counter[int] = Counter()
    for limit in list_layer_limits(config):
        channels[limit] += width
    return channels


class FlopCounter:
    """Counts the FLOPs of packed batches of one model."""

    def __init__(self, model: FutureLM, config: JobConfig):
        lm_config = model.lm.config
        self.body = count_weights_used(model.lm)
        self.head = model.output_embedding.numel()
        self.channels = count_attention_channels(lm_config)
        self.width = config.future_encoder.projection_dim or lm_config.hidden_size
        self.predictor = sum(p.numel() for p in model.predictor.parameters() if p.ndim > 1) if model.predictor else 0
        self.rival = model.rival
        self.future = config.future_encoder
        self.frozen = config.experimental.freeze_lm_for_infonce
        is_global = self.future.negatives == "global"
        self.packs_compared = config.training.gradient_accumulation_steps * get_world_size() if is_global else 1

    def count(self, cu_seqlens: Tensor, with_aux: bool, labels: np.ndarray | None = None) -> Flops:
        """FLOPs of one packed batch, int32 cu_seqlens [S+1] on the CPU.

        Args:
            with_aux: with the loss beside the next token's.
            labels: int64 [S], labels in each piece, where only answers count: the others need neither logits nor guesses, nor
                summaries.
        """
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).double()
        tokens = float(lengths.sum())
        predicted = tokens if labels is None else float(labels.sum())
        causal_forward = 2 * self.body * tokens + 4 * _count_causal_attention(lengths, self.channels)
        next_token = causal_forward if self.frozen else 3 * (causal_forward + 2 * self.head * predicted)
        if not with_aux:
            return Flops(next_token, 0.0, 0.0)
        if self.rival is not None:
            return Flops(next_token, 0.0, self._count_rival(self.rival, lengths, predicted))
        return Flops(next_token, self._count_summaries(lengths, labels), self._count_contrast(cu_seqlens, labels))

    def _count_summaries(self, lengths: Tensor, labels: np.ndarray | None) -> float:
        future = self.future
        if future.target == "mean_embedding":
            return 0.0
        if future.target == "causal":
            return 2 * self.body * float(lengths.sum()) + 4 * _count_causal_attention(lengths, self.channels)
        if labels is not None:
            lengths = torch.from_numpy(labels[labels > 0] + 1).double()
        tokens = float(lengths.sum())
        pairs = {limit: _count_later_pairs(lengths, tighten(limit, future.future_k)) for limit in self.channels}
        return 2 * self.body * tokens + 4 * sum(channels * pairs[limit] for limit, channels in self.channels.items())

    def _count_contrast(self, cu_seqlens: Tensor, labels: np.ndarray | None) -> float:
        future = self.future
        anchors = count_anchors(cu_seqlens, future.target_shift, future.max_anchors, labels)
        guesses = anchors if labels is not None else min(int(cu_seqlens[-1]), future.max_anchors or int(cu_seqlens[-1]))
        compared = 4 * anchors**2 * self.width * self.packs_compared if future.estimator_type in CONTRASTIVE else 0
        between = 6 * anchors * self.width**2 if future.estimator_type == "bilinear" else 0
        return float(6 * self.predictor * guesses + compared + between)

    def _count_rival(self, rival: Rival, lengths: Tensor, predicted: float) -> float:
        by_token, by_position = rival.count_weights()
        attention = sum(_count_causal_attention(lengths, count_attention_channels(c)) for c in rival.list_layer_configs())
        return 6 * (by_token * float(lengths.sum()) + by_position * predicted) + 12 * attention


def _count_causal_attention(lengths: Tensor, channels: Counter[int]) -> float:
    """Pairs that attend, the token's own one included, times the channels in which they do."""
    return sum(width * (_count_later_pairs(lengths, limit) + float(lengths.sum())) for limit, width in channels.items())


def _count_later_pairs(lengths: Tensor, limit: int) -> float:
    """Pairs of a token and one that is later in its document, at most `limit` away."""
    reach = (lengths - 1).clamp(max=limit or float("inf"))
    return float((lengths * reach - reach * (reach + 1) / 2).sum())
