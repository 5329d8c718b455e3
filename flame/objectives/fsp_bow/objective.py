"""Future summary prediction, bag of words (FSP-BoW; Mahajan et al. 2025, arXiv:2510.14751, eqs. 7, 9 and 10).

One auxiliary head on the final hidden states predicts which tokens occur in a window ahead. The window leaves out the next token,
which next-token prediction covers:

    a_v = 1 if v in {x_{t+2}, .., x_{t+tau}}, else 0,
    l = - sum_v w_v [a_v ln sigmoid(z_v) + (1 - a_v) ln(1 - sigmoid(z_v))].

The paper adds l to next-token prediction with factor 1. Its weights w are tf-idf weights from counts over the corpus, which in
most cases of its ablation did a little better than none; here they are 1. Its windows are 12 and 100 tokens. l is a sum over
the vocabulary and starts at about V ln 2. With a large vocabulary, an `fsp_bow.loss_weight` of 1 / V makes it a mean. The head
is a transformer layer, like each head of MTP, with its own unembedding. The window ends with the document. Near the end the bag
is small or empty, and is predicted too. If only some tokens count (`training.loss_on`), only those are in the bag.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import NO_LABEL
from flame.models.extra_layer import build_extra_layer, find_extra_layer_conflicts
from flame.models.vocabulary_head import Differentiate, Upcoming, VocabularyHead, find_upcoming
from flame.objectives.base import Setup
from flame.objectives.fsp_bow.options import BagOfWordsOptions
from flame.objectives.label_objective import BackboneOutput, LabelObjective

WIDE_COPIES = 8
"""Working memory for each score, in half-precision numbers: the score itself and its float32 derivatives."""
POSITION_COPIES = 16
"""Working memory for each position of the window, likewise: int64 positions and tokens, and float32 scores."""


class BagOfWords(LabelObjective):
    """The head that predicts the bag, and its loss.

    Raises:
        UserError: as `build_extra_layer`.
    """

    name: ClassVar[str] = "fsp_bow"
    Options: ClassVar[type[BagOfWordsOptions]] = BagOfWordsOptions

    def __init__(self, setup: Setup):
        assert isinstance(setup.options, BagOfWordsOptions)
        super().__init__(setup, [build_extra_layer(self.name, setup.lm.config, setup.attention)])
        self.window = setup.options.window or setup.context_len  # the longest chunk of a document
        self.head = VocabularyHead.build_for(setup.lm.config)

    @classmethod
    def find_model_conflicts(cls, options: BagOfWordsOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        return find_extra_layer_conflicts(cls.name, config)

    @property
    def fits_graph(self) -> bool:
        return True

    def sum_losses(self, output: BackboneOutput) -> Tensor:
        """See `LabelObjective.sum_losses`."""
        states = output.pick(output.encode(cast(PreTrainedModel, self.layers[0]), output.hidden_states))
        horizon = min(self.window - 1, len(output.hidden_states))
        columns = WIDE_COPIES * len(self.head.weight) + POSITION_COPIES * horizon
        bag = _build_bag_loss(find_upcoming(output.batch), output.list_positions(), output.labels, horizon)
        return self.head(states, bag, columns)

    def count_head_weights(self) -> float:
        return float(self.head.weight.numel())


def _build_bag_loss(upcoming: Upcoming, positions: Tensor, labels: Tensor, horizon: int) -> Differentiate:
    """Binary cross entropy with the bag of `horizon` tokens, at positions int64 [n] with labels int64 [n]."""

    def differentiate(scores: Tensor, chunk: slice) -> Tensor:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        tokens, is_first = upcoming.look_ahead(positions[chunk], nearest=2, horizon=horizon)
        in_bag = is_first.to(wide.dtype)
        counts = labels[chunk] != NO_LABEL
        # -ln(1 - sigmoid(z)) = softplus(z), and ln sigmoid(z) = z + ln(1 - sigmoid(z)).
        losses = F.softplus(wide).sum(dim=-1) - (wide.gather(1, tokens) * in_bag).sum(dim=-1)
        grad = torch.sigmoid(wide).scatter_add_(1, tokens, -in_bag)
        scores.copy_(grad.mul_(counts[:, None]))
        return torch.where(counts, losses, 0.0).sum()

    return differentiate
