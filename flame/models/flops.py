"""FLOPs that a network requires for a packed sequence, for the model FLOPs utilisation (MFU).

Counted are:

- matrix products of the layers and the output head: 2 FLOPs per weight and token forward, 4 backward. Of experts, only those that
  a token is routed to;
- attention, over the pairs that the masks allow: 4 FLOPs per pair, layer and channel forward, 8 backward.

Embedding look-ups, norms, the recurrences of linear attention and the recomputation of activation checkpointing are not counted.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.attention.backends import find_head_dims, is_recurrent
from flame.attention.families import list_layer_limits, tighten
from flame.attention.kernel_masks import Privileged
from flame.data.batch import PackedBatch
from flame.models.causal_lm import find_decoder_layers


class ModelFlops:
    """FLOPs of forwards of one language model over packed sequences.

    Attributes:
        body: matrix weights of the layers that one token is multiplied by.
        head: weights of the output embedding.
    """

    def __init__(self, lm: PreTrainedModel):
        self.body = count_weights_used(lm, lm.config)
        self._by_layer = [count_weights_used(layer, lm.config) for layer in find_decoder_layers(lm)]
        self.head = lm.get_output_embeddings().weight.numel()
        self.channels = count_attention_channels(lm.config)
        self._config = lm.config

    def count_causal_forward(self, lengths: Tensor) -> float:
        """FLOPs of the layers in a causal forward, without the output head.

        Args:
            lengths: float64 [S], tokens of each document.
        """
        return 2 * self.body * float(lengths.sum()) + 4 * count_causal_attention(lengths, self.channels)

    def count_future_forward(self, lengths: Tensor, window_k: int, layers: int = 0) -> float:
        """FLOPs of the layers in an anti-causal forward; `lengths` as `count_causal_forward`.

        Args:
            layers: decoder layers that run, from the first; 0 is all.
        """
        body, channels = self.body, self.channels
        if layers:
            body -= sum(self._by_layer[layers:])
            channels = count_attention_channels(self._config, layers)
        pairs = {limit: _count_later_pairs(lengths, tighten(limit, window_k)) for limit in channels}
        return 2 * body * float(lengths.sum()) + 4 * sum(width * pairs[limit] for limit, width in channels.items())

    def count_privileged_forward(self, lengths: Tensor, view: Privileged) -> float:
        """FLOPs of the layers in a forward of `TrainingModel.encode_privileged`; `lengths` as `count_causal_forward`."""
        pairs, next_tokens = {}, float((lengths - 1).sum())
        for limit in self.channels:
            side = _count_later_pairs(lengths, limit)
            pairs[limit] = float(lengths.sum()) + (2 * side - next_tokens if view == "all_but_next" else side + next_tokens)
        return 2 * self.body * float(lengths.sum()) + 4 * sum(width * pairs[limit] for limit, width in self.channels.items())

    def count_next_token(self, batch: PackedBatch, *, is_frozen: bool) -> float:
        """FLOPs of causal forward, output head and backward; only the forward if the language model is frozen."""
        forward = self.count_causal_forward(measure_lengths(batch))
        return forward if is_frozen else 3 * (forward + 2 * self.head * count_predicted(batch))


def measure_lengths(batch: PackedBatch) -> Tensor:
    """float64 [S]: tokens of each document, of a batch on the CPU."""
    return batch.cu_seqlens.diff().double()


def measure_suffixes(batch: PackedBatch) -> Tensor:
    """float64 [answers]: tokens of each answer, plus the last token of its prompt (`PackedBatch.answers`)."""
    answers: np.ndarray = batch.answers
    return torch.from_numpy(answers[:, 1] - answers[:, 0]).double()


def count_predicted(batch: PackedBatch) -> float:
    """Number of positions that need logits: all or, if only answers count, those with a label."""
    return float(batch.num_labels if batch.answers_only else batch.input_ids.shape[1])


def count_weights_used(model: nn.Module, config: PretrainedConfig) -> float:
    """Weights of the layers' matrices that one token is multiplied by, of a model or of a part of it. Of experts, only those that
    it is routed to count. Embeddings and the output head do not count."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= set() if head is None else {id(head.weight)}
    used = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in tables and not name.endswith("bias"):
            is_of_experts = parameter.ndim == 3 and ".experts." in name
            share = config.num_experts_per_tok / len(parameter) if is_of_experts else 1
            used += parameter.numel() * share
    return used


def count_matrix_weights(module: nn.Module) -> int:
    """Weights of all matrices of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def count_attention_channels(config: PretrainedConfig, layers: int = 0) -> dict[int, float]:
    """Total width of the heads of all layers, or of the first `layers`, the mean of queries and values, by window of the layer (0
    is no limit)."""
    width = 0 if is_recurrent(config) else config.num_attention_heads * sum(find_head_dims(config)) / 2
    channels: dict[int, float] = defaultdict(float)
    for limit in list_layer_limits(config)[: layers or None]:
        channels[limit] += width
    return channels


def count_causal_attention(lengths: Tensor, channels: dict[int, float]) -> float:
    """Pairs of query and key, including a token with itself, times the channels of the layers that attend to them."""
    return sum(width * (_count_later_pairs(lengths, limit) + float(lengths.sum())) for limit, width in channels.items())


def _count_later_pairs(lengths: Tensor, limit: int) -> float:
    """Pairs of a token and a later token of its document, at most `limit` away (0 is no limit)."""
    span = (lengths - 1).clamp(max=limit or float("inf"))
    return float((lengths * span - span * (span + 1) / 2).sum())
