"""Future summary prediction, bag of words (FSP-BoW; Mahajan et al. 2025, arXiv:2510.14751, eqs. 7, 9 and 10).

One auxiliary head on the trunk's states says which tokens come in the window, but not the next, which next-token prediction has:

    a_v = 1 if v in {x_{t+2}, .., x_{t+tau}}, else 0,
    l = - sum_v w_v [a_v ln sigmoid(z_v) + (1 - a_v) ln(1 - sigmoid(z_v))].

It is added to next-token prediction with factor 1. The weights w are 1 here; the paper's may be tf-idf, from counts over the
corpus, which its ablation finds to help in few cases. l is a sum over the vocabulary, V ln 2 at first: with a large one, an
`objective.loss_weight` of 1 / V makes it a mean. The head is a transformer layer, as each of MTP's, with an unembedding of its
own. The window ends with the document; near its end the bag is small or empty, which is predicted too.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import NO_LABEL
from flame.models.future_encoder import Attention
from flame.models.rivals.extra_layer import build_extra_layer
from flame.models.rivals.rival import Rival, Trunk
from flame.models.rivals.vocabulary_head import Differentiate, Upcoming, VocabularyHead, find_upcoming

WIDE_COPIES = 8
"""Numbers of half precision that the loss holds at once for each score: the score itself and its float32 derivatives."""
PLACE_COPIES = 16
"""The same for each place of the window: int64 places and tokens, and float32 scores."""


class BagOfWords(Rival):
    """The head that predicts the bag, and its loss.

    Args:
        window: tau, tokens ahead, at least 2.
        config: of the language model.
        attention: as the language model's.
        spread: standard deviation of the unembedding's initial weights.

    Raises:
        UserError: as `build_extra_layer`.
    """

    def __init__(self, window: int, config: PretrainedConfig, attention: Attention, spread: float):
        super().__init__([build_extra_layer("fsp_bow", config, attention)])
        self.window = window
        self.head = VocabularyHead(config.vocab_size, config.hidden_size, spread)

    def init_weights(self) -> None:
        super().init_weights()
        self.head.init_weights()

    def forward(self, trunk: Trunk) -> Tensor:
        """See `Rival.forward`."""
        states = trunk.pick(trunk.encode(cast(PreTrainedModel, self.layers[0]), trunk.hidden_states))
        reach = min(self.window - 1, len(trunk.hidden_states))
        columns = WIDE_COPIES * len(self.head.weight) + PLACE_COPIES * reach
        return self.head(states, _compare(find_upcoming(trunk.batch), trunk.list_positions(), trunk.labels, reach), columns)

    def _count_head_weights(self) -> float:
        return float(self.head.weight.numel())


def _compare(upcoming: Upcoming, positions: Tensor, labels: Tensor, reach: int) -> Differentiate:
    """Binary cross entropy with the bag of `reach` tokens, at positions int64 [n] with labels int64 [n]."""

    def differentiate(scores: Tensor, chunk: slice) -> Tensor:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        tokens, is_first = upcoming.look_ahead(positions[chunk], nearest=2, reach=reach)
        in_bag = is_first.to(wide.dtype)
        counts = labels[chunk] != NO_LABEL
        # -ln(1 - sigmoid(z)) is softplus(z), and ln sigmoid(z) is z more than ln(1 - sigmoid(z)).
        losses = F.softplus(wide).sum(dim=-1) - (wide.gather(1, tokens) * in_bag).sum(dim=-1)
        grad = torch.sigmoid(wide).scatter_add_(1, tokens, -in_bag)
        scores.copy_(grad.mul_(counts[:, None]))
        return torch.where(counts, losses, 0.0).sum()

    return differentiate
