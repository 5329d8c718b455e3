"""A second output matrix over the vocabulary, and what it is to say of upcoming tokens.

The targets of token order and bag of words have an entry for each of V tokens at each of T positions. Neither they nor the scores
are ever held for a whole pack: as in `flame.models.losses`, gradients are formed in the forward, chunk by chunk, and a chunk's
targets are listed token by token, as the R upcoming tokens of each row.

Shape legend: T tokens, n predicted positions, d width, V vocabulary, c rows of a chunk, R tokens ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flame.data.batch import PackedBatch
from flame.models.losses import _add_product_
from flame.models.softmax_rows import count_chunk_rows


class Upcoming(NamedTuple):
    """The tokens of a pack, and what it takes to find those ahead of a position. All int64 [T]."""

    tokens: Tensor
    last: Tensor
    """Last position of the document that a token is in."""
    previous: Tensor
    """Where the same token was last before, in whatever document; -1 where it never was."""

    def look_ahead(self, positions: Tensor, nearest: int, reach: int) -> tuple[Tensor, Tensor]:
        """The tokens `nearest`, `nearest + 1`, ... places after each position.

        Args:
            positions: int64 [c]. nearest: at least 1. reach: R, how many.

        Returns:
            int64 [c, R], the tokens; bool [c, R], where they are in the position's document and among these R for the first time.
        """
        begin = (positions + nearest)[:, None]
        places = begin + torch.arange(reach, device=positions.device)
        inside = places <= self.last[positions][:, None]
        places = places.clamp_(max=len(self.tokens) - 1)
        return self.tokens[places], inside & (self.previous[places] < begin)


def find_upcoming(batch: PackedBatch) -> Upcoming:
    """Without waiting for the device: one sort of the T tokens."""
    tokens, segments = batch.input_ids[0], batch.segment_ids[0]
    last = torch.searchsorted(segments, segments, side="right") - 1
    order = torch.argsort(tokens, stable=True)  # by token, then by place
    is_repeated = tokens[order[1:]] == tokens[order[:-1]]
    previous = torch.full_like(tokens, -1)
    previous[order[1:]] = torch.where(is_repeated, order[:-1], -1)
    return Upcoming(tokens, last, previous)


Differentiate = Callable[[Tensor, slice], Tensor]
"""(scores [c, V], which of the n rows) -> sum of the rows' losses, 0-d float32 or wider. In place of the scores it leaves the
gradient of the losses by them."""


class _HeadLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, differentiate: Differentiate, columns: int) -> Tensor:
        rows = count_chunk_rows(len(hidden_states), columns, hidden_states.dtype)
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        losses = []
        for start in range(0, len(hidden_states), rows):
            chunk = slice(start, start + rows)
            scores = hidden_states[chunk] @ weight.t()
            losses.append(differentiate(scores, chunk))
            torch.mm(scores, weight, out=grad_hidden[chunk])
            _add_product_(grad_weight, scores.t(), hidden_states[chunk])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None, None


class VocabularyHead(nn.Module):
    """A matrix [V, d] from hidden states to a score for each token of the vocabulary.

    Args:
        vocab_size: V. hidden_size: d.
        spread: standard deviation of the initial weights.
    """

    def __init__(self, vocab_size: int, hidden_size: int, spread: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.spread = spread

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights anew; needed after building on the meta device."""
        self.weight.normal_(std=self.spread)

    def forward(self, hidden_states: Tensor, differentiate: Differentiate, columns: int) -> Tensor:
        """Sum of the losses of all rows.

        Args:
            hidden_states: [n, d], n at least 1.
            differentiate: the loss.
            columns: numbers, in the dtype of the states, that it holds for each row at once, the scores among them.

        Returns:
            0-d float32 (float64 for float64 states).
        """
        return _HeadLossSum.apply(hidden_states, self.weight, differentiate, columns)
