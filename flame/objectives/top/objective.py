"""Token order prediction (TOP; Zuhri et al. 2025, arXiv:2508.19228, the section that gives it its name).

A second unembedding on the final hidden states ranks the vocabulary by how soon each token occurs. Let d_v be the distance from
position t to the first v after it (1 for the next token). The target y and the ListNet loss L are

    y_v = W - d_v if d_v <= W, else -inf,      L = - sum_t sum_v softmax(y)_v ln softmax(z)_v.

The paper adds L to next-token prediction with factor 1. A softmax ignores constants, so the target is proportional to exp(-d_v).
Scoring the next token W - 1, as here, or W, as in the published code, therefore gives the same target. W only decides which
tokens are part of it. The published models set W to the sequence length. Here the window also ends with the document.
If only some tokens count (`training.loss_on`), only those are ranked.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from flame.data.batch import NO_LABEL
from flame.kernels.softmax_rows import softmax_rows_
from flame.models.vocabulary_head import Differentiate, Upcoming, VocabularyHead, find_upcoming
from flame.objectives.base import Setup
from flame.objectives.label_objective import BackboneOutput, LabelObjective
from flame.objectives.top.options import TokenOrderOptions


class TokenOrderPrediction(LabelObjective):
    """The ranking head and its loss."""

    name: ClassVar[str] = "top"
    Options: ClassVar[type[TokenOrderOptions]] = TokenOrderOptions

    def __init__(self, setup: Setup):
        super().__init__(setup)
        assert isinstance(setup.options, TokenOrderOptions)
        self.window = setup.options.window or setup.context_len  # the longest chunk of a document
        self.head = VocabularyHead.build_for(setup.lm.config)

    @property
    def fits_graph(self) -> bool:
        return True

    def sum_losses(self, output: BackboneOutput) -> Tensor:
        """See `LabelObjective.sum_losses`."""
        rank = _rank(find_upcoming(output.batch), output.list_positions(), output.labels, self.window)
        return self.head(output.pick(output.hidden_states), rank, len(self.head.weight))

    def count_head_weights(self) -> float:
        return float(self.head.weight.numel())


def _rank(upcoming: Upcoming, positions: Tensor, labels: Tensor, window: int) -> Differentiate:
    """ListNet's loss at positions int64 [n] with labels int64 [n]."""

    def differentiate(scores: Tensor, chunk: slice) -> Tensor:
        wide = torch.promote_types(scores.dtype, torch.float32)
        # Further ahead, exp(-distance) is below the smallest normal number, so tokens there do not change the target.
        horizon = min(window, len(upcoming.tokens), math.ceil(-math.log(torch.finfo(wide).tiny)))
        tokens, is_first = upcoming.look_ahead(positions[chunk], nearest=1, horizon=horizon)
        proximity = torch.exp(-torch.arange(horizon, dtype=wide, device=scores.device)) * is_first
        target = proximity / proximity.sum(dim=-1, keepdim=True)

        ranked = scores.gather(1, tokens).to(wide)
        counts = labels[chunk] != NO_LABEL
        one = torch.ones((), dtype=wide, device=scores.device)
        # Writes the gradient of the next token's cross entropy to `scores`. The columns of the target are corrected below.
        sums = softmax_rows_(scores, labels[chunk], one)
        lse = sums.loss + sums.own_score
        losses = lse - (target * ranked).sum(dim=-1)

        # `scatter_` must write the same number to a column that occurs twice, so repeated tokens write the next token's column.
        grad = torch.exp(ranked - lse[:, None]) - target
        grad = torch.where(is_first, grad, grad[:, :1])
        grad = torch.where(counts[:, None], grad, 0.0)
        scores.scatter_(1, torch.where(is_first, tokens, tokens[:, :1]), grad.to(scores.dtype))
        return torch.where(counts, losses, 0.0).sum()

    return differentiate
