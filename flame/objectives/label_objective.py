"""Objectives whose loss is a sum over the positions that have a label, like the cross entropy's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flame.data.batch import PackedBatch
from flame.kernels.gradient_guard import guard_gradient
from flame.models.aux_loss import AuxLoss
from flame.models.causal_lm import find_decoder_layers
from flame.models.flops import (
    ModelFlops,
    count_attention_channels,
    count_causal_attention,
    count_predicted,
    count_weights_used,
    measure_lengths,
)
from flame.models.output_head import OutputHead
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops, LayerStack, Objective, Setup
from flame.objectives.step import list_predicted, pick

Encode = Callable[[PreTrainedModel, Tensor], Tensor]
"""(base model, inputs_embeds [T, d]) -> its final hidden states [T, d], from a causal pass over the packed sequence."""


def _embed_nothing() -> Tensor:
    raise NotImplementedError("this output has no embeddings")


class BackboneOutput(NamedTuple):
    """The language model's output for a packed sequence of T tokens, and the positions and labels to predict from it."""

    hidden_states: Tensor
    """[T, d], final states, with gradient."""
    batch: PackedBatch
    """A position's targets must come from its own document."""
    positions: Tensor | None
    """int64 [n], the predicted positions; those without a label are padding. None is all T."""
    labels: Tensor
    """int64 [n], the next token at each position, or -100."""
    output_head: OutputHead
    """Of the language model."""
    encode: Encode
    """Runs a layer of the objective."""
    embed: Callable[[], Tensor] = _embed_nothing
    """The tokens' input embeddings, [T, d], with gradient."""

    def pick(self, states: Tensor) -> Tensor:
        """[T, d] -> [n, d], the states at the positions."""
        return pick(states, self.positions)

    def list_positions(self) -> Tensor:
        """int64 [n]"""
        return torch.arange(len(self.labels), device=self.labels.device) if self.positions is None else self.positions


class LabelObjective(Objective):
    """Derive from this and write `sum_losses`.

    Args:
        layers: base models of one layer each, which run on the language model's final states.
    """

    def __init__(self, setup: Setup, layers: Sequence[PreTrainedModel] = ()):
        super().__init__(setup)
        self.layers = nn.ModuleList(layers)

    @abstractmethod
    def sum_losses(self, output: BackboneOutput) -> Tensor:
        """Loss in nats, summed over the positions that have a label. It must not wait for the device.

        Returns:
            0-d float32 (float64 for float64 states). If no position has a label, exactly 0, with zero gradients.
        """

    def loss(
        self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch, prepared: Any, *, with_sample: bool = False
    ) -> AuxLoss:
        loss_sum = self.sum_losses(self.read_output(backbone, hidden_states, batch))
        count = batch.sum_labels().to(loss_sum.dtype)
        return AuxLoss(loss_sum, count, torch.zeros_like(count), {})

    def read_output(self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch) -> BackboneOutput:
        """What `sum_losses` gets."""

        def encode(part: PreTrainedModel, embeddings: Tensor) -> Tensor:
            return backbone.encode_embeddings(part, embeddings, batch)

        def embed() -> Tensor:
            return guard_gradient(backbone.embed_tokens(batch))

        positions = list_predicted(batch)
        labels = pick(batch.labels[0], positions)
        return BackboneOutput(hidden_states, batch, positions, labels, backbone.output_head, encode, embed)

    def find_future_pass(self) -> None:
        """None: labels are tokens."""

    def list_layer_stacks(self) -> Sequence[LayerStack]:
        return [LayerStack(find_decoder_layers(cast(PreTrainedModel, layer)), is_trained=True) for layer in self.layers]

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        lengths = measure_lengths(batch)
        layers = self.list_counted_layers()
        by_token = sum(count_weights_used(layer, layer.config) for layer in layers)
        attention = sum(count_causal_attention(lengths, count_attention_channels(layer.config)) for layer in layers)
        heads = self.count_head_weights() * count_predicted(batch)
        return AuxFlops(heads=6 * (by_token * float(lengths.sum()) + heads) + 12 * attention)

    def list_counted_layers(self) -> list[PreTrainedModel]:
        """The layers that a step runs."""
        return [cast(PreTrainedModel, layer) for layer in self.layers]

    def count_head_weights(self) -> float:
        """Matrix weights that one predicted position is multiplied by after the layers."""
        return 0.0
