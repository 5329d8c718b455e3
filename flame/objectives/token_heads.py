"""Objectives with a head for each of the tokens after the next one, which share the language model's output head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxLoss, Setup
from flame.objectives.label_objective import BackboneOutput, LabelObjective
from flame.runtime.measures import Mean


class TokenHeads(LabelObjective):
    """Derive from this and write `list_head_losses` and `combine`.

    Args:
        layers: as in `LabelObjective`, one for each head. Head 0 predicts the token two ahead.
    """

    def __init__(self, setup: Setup, layers: Sequence[PreTrainedModel]):
        super().__init__(setup, layers)
        config = setup.lm.config
        self._embedding_size = config.vocab_size * config.hidden_size

    @property
    def num_active(self) -> int:
        """How many of the heads learn in this step, from the first on."""
        return len(self.layers)

    @abstractmethod
    def list_head_losses(self, output: BackboneOutput) -> list[Tensor]:
        """Cross entropy of each active head, summed over the positions that have a label of their own and, so far ahead, of its
        own: 0-d float32 (float64 for float64 states)."""

    @abstractmethod
    def combine(self, losses: list[Tensor]) -> Tensor:
        """The loss of the active heads, at least one."""

    def sum_losses(self, output: BackboneOutput) -> Tensor:
        """See `LabelObjective.sum_losses`. A position needs a label of its own; of the tokens ahead, only labels count."""
        return self._combine(output, self.list_head_losses(output))

    def loss(
        self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch, prepared: Any, *, with_sample: bool = False
    ) -> AuxLoss:
        output = self.read_output(backbone, hidden_states, batch)
        losses = self.list_head_losses(output)
        loss_sum = self._combine(output, losses)
        count = batch.sum_labels().to(loss_sum.dtype)
        measures = {
            f"{self.name}_ce_{ahead}": Mean(loss.detach(), batch.sum_labels(ahead).to(loss.dtype))
            for ahead, loss in enumerate(losses, start=2)
        }
        return AuxLoss(loss_sum, count, torch.zeros_like(count), {**measures})

    def _combine(self, output: BackboneOutput, losses: list[Tensor]) -> Tensor:
        if losses:
            return self.combine(losses)
        states = output.hidden_states  # without a head: 0, with a gradient of 0
        return states[:1].sum(dtype=torch.promote_types(states.dtype, torch.float32)) * 0.0

    def estimate_memory(self, tokens: int) -> float:
        """Each head's states before and after the norm, and gradients of those and of the output embedding, beside what its layer
        keeps."""
        width = self.setup.lm.config.hidden_size
        return 2.0 * len(self.layers) * (3 * tokens * width + self._embedding_size)

    def list_counted_layers(self) -> list[PreTrainedModel]:
        return super().list_counted_layers()[: self.num_active]

    def count_head_weights(self) -> float:
        return float(self.num_active * self._embedding_size)


def shift_labels(output: BackboneOutput, steps: int) -> Tensor:
    """The labels `steps` tokens after the positions: int64 [n]. -100 past the document's end and at positions without a label."""
    here, labels = output.list_positions(), output.labels
    all_labels, segments = output.batch.labels[0], output.batch.segment_ids[0]
    there = (here + steps).clamp(max=len(all_labels) - 1)  # the last token of a packed sequence has no label
    counts = (labels != NO_LABEL) & (segments[here] == segments[there])
    return torch.where(counts, all_labels[there], NO_LABEL)
