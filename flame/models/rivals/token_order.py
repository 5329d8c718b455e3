"""Token order prediction (TOP; Zuhri et al. 2025, arXiv:2508.19228, the section that gives it its name).

One more unembedding, on the same final states as the next token's, ranks the vocabulary by how soon each token comes. With d_v
the distance from position t to the first v after it (1 for the next token), the target and the loss, ListNet's, are

    y_v = W - d_v if d_v <= W, else -inf,      L = - sum_t sum_v softmax(y)_v ln softmax(z)_v.

It is added to next-token prediction with factor 1. A softmax does not see what is added to all scores, so the target is
proportional to exp(-d_v): whether the next token scores W - 1 as here or W as in the published code, the target is the same,
and W decides only which tokens have any share in it. The published models have W = the sequence length. Here the window ends
with the document too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PretrainedConfig

from flame.data.batch import NO_LABEL
from flame.models.rivals.rival import Rival, Trunk
from flame.models.rivals.vocabulary_head import Differentiate, Upcoming, VocabularyHead, find_upcoming
from flame.models.softmax_rows import softmax_rows_


class TokenOrderPrediction(Rival):
    """The ranking head and its loss.

    Args:
        window: W, tokens ahead, at least 1.
        config: of the language model.
        spread: standard deviation of the head's initial weights.
    """

    def __init__(self, window: int, config: PretrainedConfig, spread: float):
        super().__init__([])
        self.window = window
        self.head = VocabularyHead(config.vocab_size, config.hidden_size, spread)

    def init_weights(self) -> None:
        super().init_weights()
        self.head.init_weights()

    def forward(self, trunk: Trunk) -> Tensor:
        """See `Rival.forward`."""
        rank = _rank(find_upcoming(trunk.batch), trunk.list_positions(), trunk.labels, self.window)
        return self.head(trunk.pick(trunk.hidden_states), rank, len(self.head.weight))

    def _count_head_weights(self) -> float:
        return float(self.head.weight.numel())


def _rank(upcoming: Upcoming, positions: Tensor, labels: Tensor, window: int) -> Differentiate:
    """ListNet's loss at positions int64 [n] with labels int64 [n]."""

    def differentiate(scores: Tensor, chunk: slice) -> Tensor:
        wide = torch.promote_types(scores.dtype, torch.float32)
        # Tokens further ahead have no share in this arithmetic: exp(-distance) is below the smallest normal number.
        reach = min(window, len(upcoming.tokens), math.ceil(-math.log(torch.finfo(wide).tiny)))
        tokens, is_first = upcoming.look_ahead(positions[chunk], nearest=1, reach=reach)
        proximity = torch.exp(-torch.arange(reach, dtype=wide, device=scores.device)) * is_first
        target = proximity / proximity.sum(dim=-1, keepdim=True)

        ranked = scores.gather(1, tokens).to(wide)
        counts = labels[chunk] != NO_LABEL
        one = torch.ones((), dtype=wide, device=scores.device)
        sums = softmax_rows_(scores, labels[chunk], one)  # of the next token: right but for the columns of the target
        lse = sums.loss + sums.own_score
        losses = lse - (target * ranked).sum(dim=-1)

        # A column that occurs twice must be written the same number twice: what does not count writes the next token's again.
        grad = torch.exp(ranked - lse[:, None]) - target
        grad = torch.where(is_first, grad, grad[:, :1])
        grad = torch.where(counts[:, None], grad, 0.0)
        scores.scatter_(1, torch.where(is_first, tokens, tokens[:, :1]), grad.to(scores.dtype))
        return torch.where(counts, losses, 0.0).sum()

    return differentiate
