"""An objective in one file: predict the token some steps ahead by a linear map and the model's own head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from flame.config.types import PositiveInt, option
from flame.data.batch import NO_LABEL
from flame.objectives.base import AuxLoss, Objective, ObjectiveOptions, Setup
from flame.runtime.measures import Mean


@dataclass(kw_only=True)
class SkipTokenOptions(ObjectiveOptions):
    """Predict the token some steps ahead."""

    section: ClassVar[str] = "skip_token"
    distance: PositiveInt = option(2, fixed=True)
    """Tokens ahead. 1 is the next token."""


class SkipToken(Objective):
    name = "skip_token"
    Options = SkipTokenOptions

    def __init__(self, setup: Setup):
        super().__init__(setup)
        width = setup.lm.config.hidden_size
        self.map = nn.Linear(width, width, bias=False)

    def count(self, batch):
        return batch.count_labels_ahead(self.setup.options.distance)

    def loss(self, backbone, hidden_states, batch, prepared, *, with_sample=False):
        distance, tokens, documents = self.setup.options.distance, batch.input_ids[0], batch.segment_ids[0]
        counts = batch.labels[0] != NO_LABEL  # whether the token after each position does
        is_labelled = counts[:-distance] & counts[distance - 1 : -1] & (documents[distance:] == documents[:-distance])
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:-distance] = torch.where(is_labelled, tokens[distance:], NO_LABEL)
        states = self.map(hidden_states)
        loss_sum = backbone.output_head.sum_cross_entropy(states, labels)
        count = is_labelled.sum().to(loss_sum.dtype)
        norm = Mean(torch.where(is_labelled, states.detach().float().norm(dim=-1)[:-distance], 0.0).sum(), count)
        return AuxLoss(loss_sum, count, torch.zeros_like(count), {"skip_token_norm": norm})
