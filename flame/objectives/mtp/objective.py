"""Multi-token prediction (MTP; Gloeckle et al. 2024, arXiv:2404.19737, sections 2 and 3).

k heads on one backbone predict the next k tokens independently. With backbone f_s, heads f_1 .. f_k of one transformer layer each
and a shared unembedding f_u,

    P(x_{t+i} | x_{<=t}) = softmax(f_u(f_i(f_s(x_{<=t})))),      L = - sum_t sum_{i=1..k} ln P(x_{t+i} | x_{<=t}).

Here the backbone is the whole language model up to its final norm. Head 1 adds no layer: its term of L is the next-token cross
entropy. Heads 2 .. k are one layer and one norm each. Unlike the paper, the backbone keeps all of its layers; the paper removes
as many as the heads add, so that the number of weights stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import NO_LABEL
from flame.models.extra_layer import build_extra_layer, find_extra_layer_conflicts
from flame.objectives.base import Setup
from flame.objectives.label_objective import BackboneOutput, LabelObjective
from flame.objectives.mtp.options import MultiTokenOptions


class MultiTokenPrediction(LabelObjective):
    """Heads 2 .. k. The loss is the sum of their cross entropies; with k = 1 there is no head and it is 0.

    Raises:
        UserError: as `build_extra_layer`.
    """

    name: ClassVar[str] = "mtp"
    Options: ClassVar[type[MultiTokenOptions]] = MultiTokenOptions

    def __init__(self, setup: Setup):
        assert isinstance(setup.options, MultiTokenOptions)
        config = setup.lm.config
        super().__init__(setup, [build_extra_layer(self.name, config, setup.attention) for _ in range(setup.options.tokens - 1)])
        self._embedding_size = config.vocab_size * config.hidden_size

    @classmethod
    def find_model_conflicts(cls, options: MultiTokenOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        return find_extra_layer_conflicts(cls.name, config)

    def sum_losses(self, output: BackboneOutput) -> Tensor:
        """See `LabelObjective.sum_losses`. A position needs a label of its own; of the tokens ahead, only labels count."""
        states = output.hidden_states
        total = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        for steps, layer in enumerate(self.layers, start=1):
            ahead = output.pick(output.encode(cast(PreTrainedModel, layer), states))
            total = total + output.output_head.sum_cross_entropy(ahead, shift_labels(output, steps))
        return total

    def estimate_memory(self, tokens: int) -> float:
        """Each head's gradients of its states and of the output embedding, beside what its layer keeps."""
        width = self.setup.lm.config.hidden_size
        return 2.0 * len(self.layers) * (tokens * width + self._embedding_size)

    def count_head_weights(self) -> float:
        return float(len(self.layers) * self._embedding_size)


def shift_labels(output: BackboneOutput, steps: int) -> Tensor:
    """The labels `steps` tokens after the positions: int64 [n]. -100 past the document's end and at positions without a label."""
    here, labels = output.list_positions(), output.labels
    all_labels, segments = output.batch.labels[0], output.batch.segment_ids[0]
    there = (here + steps).clamp(max=len(all_labels) - 1)  # the last token of a packed sequence has no label
    counts = (labels != NO_LABEL) & (segments[here] == segments[there])
    return torch.where(counts, all_labels[there], NO_LABEL)
