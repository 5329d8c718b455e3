"""Arithmetic that a step requires, for the model FLOPs utilisation (MFU).

Counted: matrix products of the layers and the output head (2 FLOPs a weight and token forward, 4 backward; of experts, those that
a token is sent to), attention by the pairs that the masks really allow (4 FLOPs a pair, layer and channel forward, 8 backward),
predictor and InfoNCE (4 N^2 d).
Not counted: embedding look-ups, norms, the projection of summaries, the recurrences of linear attention, and what activation
checkpointing computes again.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.config import JobConfig
from flame.models.families import list_layer_limits, tighten
from flame.models.future_encoder import find_head_dim, is_recurrent
from flame.models.future_lm import FutureLM
from flame.models.future_mask import count_anchors


class Flops(NamedTuple):
    """FLOPs of one packed batch."""

    next_token: float
    future: float
    """The anti-causal forward."""
    infonce: float
    """Predictor and InfoNCE."""


def count_attention_channels(config: PretrainedConfig) -> Counter[int]:
    """Width of all query heads of all layers together, by how far their keys may be (0 is no limit)."""
    width = 0 if is_recurrent(config) else config.num_attention_heads * find_head_dim(config)
    channels: Counter[int] = Counter()
    for limit in list_layer_limits(config):
        channels[limit] += width
    return channels


def count_weights_used(model: PreTrainedModel) -> float:
    """Weights of the layers' matrices that one token meets."""
    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head)}
    used = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in tables:
            is_of_experts = parameter.ndim == 3 and ".experts." in name
            share = model.config.num_experts_per_tok / len(parameter) if is_of_experts else 1
            used += parameter.numel() * share
    return used


class FlopCounter:
    """Counts the FLOPs of packed batches of one model."""

    def __init__(self, model: FutureLM, config: JobConfig):
        lm_config = model.lm.config
        self.body = count_weights_used(model.lm)
        self.head = model.output_embedding.numel()
        self.channels = count_attention_channels(lm_config)
        self.width = config.future_encoder.projection_dim or lm_config.hidden_size
        self.predictor = sum(p.numel() for p in model.predictor.parameters() if p.ndim > 1) if model.predictor else 0
        self.future = config.future_encoder
        self.frozen = config.experimental.freeze_lm_for_infonce

    def count(self, cu_seqlens: Tensor, with_future: bool, labels: np.ndarray | None = None) -> Flops:
        """FLOPs of one packed batch, int32 cu_seqlens [S+1] on the CPU.

        Args:
            labels: int64 [S], labels in each piece, where only answers count: the others need neither logits nor guesses.
        """
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).double()
        tokens = float(lengths.sum())
        predicted = tokens if labels is None else float(labels.sum())
        causal_pairs = {limit: _count_later_pairs(lengths, limit) + tokens for limit in self.channels}
        causal_forward = 2 * self.body * tokens + 4 * self._weigh(causal_pairs)
        next_token = causal_forward if self.frozen else 3 * (causal_forward + 2 * self.head * predicted)
        if not with_future:
            return Flops(next_token, 0.0, 0.0)
        future_pairs = {limit: _count_later_pairs(lengths, tighten(limit, self.future.future_k)) for limit in self.channels}
        future = 2 * self.body * tokens + 4 * self._weigh(future_pairs)
        anchors = count_anchors(cu_seqlens, self.future.target_shift, self.future.max_anchors, labels)
        guesses = min(tokens, self.future.max_anchors or tokens) if labels is None else anchors
        return Flops(next_token, future, 6 * self.predictor * guesses + 4 * anchors**2 * self.width)

    def _weigh(self, pairs: dict[int, float]) -> float:
        return sum(channels * pairs[limit] for limit, channels in self.channels.items())


def _count_later_pairs(lengths: Tensor, limit: int) -> float:
    """Pairs of a token and one that is later in its document, at most `limit` away."""
    reach = (lengths - 1).clamp(max=limit or float("inf"))
    return float((lengths * reach - reach * (reach + 1) / 2).sum())
