"""Arithmetic that a step requires, for the model FLOPs utilisation (MFU).

Counted: matrix products of the layers and the output head (2 FLOPs a weight and token forward, 4 backward), attention by the
pairs that the masks really allow (4 FLOPs a pair, layer and channel forward, 8 backward), predictor and InfoNCE (4 N^2 d).
Not counted: embedding look-ups, norms, the projection of summaries, the recurrences of linear attention, and what activation
checkpointing computes again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from flame.config import JobConfig
from flame.models.future_encoder import is_recurrent
from flame.models.future_lm import FutureLM
from flame.models.future_mask import count_anchors


class Flops(NamedTuple):
    """FLOPs of one packed batch."""

    next_token: float
    future: float
    """The anti-causal forward."""
    infonce: float
    """Predictor and InfoNCE."""


def count_attention_channels(config: PretrainedConfig) -> int:
    """Width of all query heads of all layers together."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * head_dim


class FlopCounter:
    """Counts the FLOPs of packed batches of one model."""

    def __init__(self, model: FutureLM, config: JobConfig):
        lm_config = model.lm.config
        head = model.lm.get_output_embeddings().weight
        tables = {id(module.weight) for module in model.lm.modules() if isinstance(module, nn.Embedding)} | {id(head)}
        self.body = sum(p.numel() for p in model.lm.parameters() if p.ndim > 1 and id(p) not in tables)
        self.head = head.numel()
        self.attention = 0 if is_recurrent(lm_config) else count_attention_channels(lm_config)
        self.width = config.future_encoder.projection_dim or lm_config.hidden_size
        self.predictor = sum(p.numel() for p in model.predictor.parameters() if p.ndim > 1) if model.predictor else 0
        self.future = config.future_encoder
        self.frozen = config.experimental.freeze_lm_for_infonce

    def count(self, cu_seqlens: Tensor, with_future: bool) -> Flops:
        """FLOPs of one packed batch, int32 cu_seqlens [S+1] on the CPU."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).double()
        tokens = float(lengths.sum())
        causal_forward = 2 * self.body * tokens + 4 * self.attention * float((lengths * (lengths + 1) / 2).sum())
        next_token = causal_forward if self.frozen else 3 * (causal_forward + 2 * self.head * tokens)
        if not with_future:
            return Flops(next_token, 0.0, 0.0)
        reach = (lengths - 1).clamp(max=self.future.future_k or float("inf"))
        future_pairs = float((lengths * reach - reach * (reach + 1) / 2).sum())
        future = 2 * self.body * tokens + 4 * self.attention * future_pairs
        anchors = count_anchors(cu_seqlens, self.future.target_shift, self.future.max_anchors)
        guesses = min(tokens, self.future.max_anchors or tokens)
        return Flops(next_token, future, 6 * self.predictor * guesses + 4 * anchors**2 * self.width)
