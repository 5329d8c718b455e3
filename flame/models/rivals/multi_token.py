"""Multi-token prediction (MTP; Gloeckle et al. 2024, arXiv:2404.19737, sections 2 and 3).

k heads on one trunk predict the next k tokens, each by itself. With trunk f_s, heads f_1 .. f_k of one transformer layer each and
the unembedding f_u that they share,

    P(x_{t+i} | x_{<=t}) = softmax(f_u(f_i(f_s(x_{<=t})))),      L = - sum_t sum_{i=1..k} ln P(x_{t+i} | x_{<=t}).

Here the trunk is the language model up to its final norm, which predicts the next token itself: head 1 adds no layer, and its
term of L is the cross entropy that is computed anyway. Heads 2 .. k are a layer and a norm each. The model keeps all of its own
layers; the paper takes those of the heads out of the trunk, so that the numbers of weights are equal.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import NO_LABEL
from flame.models.future_encoder import Attention
from flame.models.losses import linear_cross_entropy
from flame.models.rivals.extra_layer import build_extra_layer
from flame.models.rivals.rival import Rival, Trunk


class MultiTokenPrediction(Rival):
    """Heads 2 .. k; the loss is the sum of their cross entropies.

    Args:
        tokens: k. With 1 there is no further head, and the loss is 0.
        config: of the language model.
        attention: as the language model's.

    Raises:
        UserError: as `build_extra_layer`.
    """

    def __init__(self, tokens: int, config: PretrainedConfig, attention: Attention):
        super().__init__([build_extra_layer("mtp", config, attention) for _ in range(tokens - 1)])
        self.embedding_size = config.vocab_size * config.hidden_size

    def forward(self, trunk: Trunk) -> Tensor:
        """See `Rival.forward`. At a position with a label, the tokens ahead count that are labels themselves."""
        states = trunk.hidden_states
        total = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        for steps, layer in enumerate(self.layers, start=1):
            ahead = trunk.pick(trunk.encode(cast(PreTrainedModel, layer), states))
            total = total + linear_cross_entropy(ahead, trunk.output_embedding, shift_labels(trunk, steps))
        return total

    def _count_head_weights(self) -> float:
        return float(len(self.layers) * self.embedding_size)


def shift_labels(trunk: Trunk, steps: int) -> Tensor:
    """The labels `steps` tokens after the positions: int64 [n], -100 past the document's end and where there is no label here."""
    here, labels = trunk.list_positions(), trunk.labels
    all_labels, segments = trunk.batch.labels[0], trunk.batch.segment_ids[0]
    there = (here + steps).clamp(max=len(all_labels) - 1)  # where the last token of the pack has no label
    counts = (labels != NO_LABEL) & (segments[here] == segments[there])
    return torch.where(counts, all_labels[there], NO_LABEL)
