"""What the objectives have in common that are compared with the future loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import PackedBatch
from flame.models.weight_count import count_weights_used

Encode = Callable[[PreTrainedModel, Tensor], Tensor]
"""(base model, inputs_embeds [T, d]) -> its final hidden states [T, d] of the causal pass over the pack."""


class Trunk(NamedTuple):
    """What the language model has made of a pack of T tokens, and what is to be predicted from it."""

    hidden_states: Tensor
    """[T, d], final states, with gradient."""
    batch: PackedBatch
    """What is predicted never leaves a position's own document."""
    positions: Tensor | None
    """int64 [n], where predictions count; those without label only fill up. None is all T."""
    labels: Tensor
    """int64 [n], the next token at each of them, or -100."""
    output_embedding: Tensor
    """[V, d]"""
    encode: Encode
    """Runs the layers of a rival."""

    def pick(self, states: Tensor) -> Tensor:
        """[T, d] -> [n, d], at the positions."""
        return states if self.positions is None else states[self.positions]

    def list_positions(self) -> Tensor:
        """int64 [n]"""
        return torch.arange(len(self.labels), device=self.labels.device) if self.positions is None else self.positions


class Rival(nn.Module, ABC):
    """An objective beside next-token prediction, with the heads that it trains.

    Args:
        layers: base models of one layer each that it runs on the trunk's states.
    """

    def __init__(self, layers: list[PreTrainedModel]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def init_weights(self) -> None:
        """Draw the weights anew; needed after building on the meta device."""
        for layer in self.layers:
            cast(PreTrainedModel, layer).init_weights()

    @abstractmethod
    def forward(self, trunk: Trunk) -> Tensor:
        """Loss in nats, summed over the positions that have a label. It never waits for the device.

        Returns:
            0-d float32 (float64 for float64 states). Exactly 0, with gradients that are 0, where no position has a label.
        """
        ...

    def list_layer_configs(self) -> list[PretrainedConfig]:
        """Configuration of each of the layers, by which their attention is counted."""
        return [cast(PreTrainedModel, layer).config for layer in self.layers]

    def count_weights(self) -> tuple[float, float]:
        """Weights of matrix products that one token of the pack meets, and that one predicted position meets besides."""
        return sum(count_weights_used(cast(PreTrainedModel, layer)) for layer in self.layers), self._count_head_weights()

    @abstractmethod
    def _count_head_weights(self) -> float:
        """Weights of the heads that one predicted position meets."""
        ...
