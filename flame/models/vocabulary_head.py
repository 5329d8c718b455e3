"""A second output head over the vocabulary, and the upcoming tokens that are its targets.

The targets of token order and bag of words have V entries at each of T positions. Neither targets nor scores are held for a whole
packed sequence. As in `flame.kernels.cross_entropy`, the forward computes gradients chunk by chunk. The targets of a chunk are
given sparsely, as the R upcoming tokens of each row.

Shape legend: T tokens, n predicted positions, d width, V vocabulary, c rows of a chunk, R tokens ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flame.data.batch import NO_LABEL, PackedBatch
from flame.kernels.cross_entropy import _add_product_
from flame.kernels.softmax_rows import count_chunk_rows


class Upcoming(NamedTuple):
    """The tokens of a packed sequence, with indices to find those ahead of a position. All int64 [T]."""

    tokens: Tensor
    last: Tensor
    """Last position of each token's document."""
    previous: Tensor
    """Previous position of the same token id, in any document; -1 if there is none. Only of tokens that count."""
    counts: Tensor | None = None
    """bool [T], whether each token counts; None if all do."""

    def look_ahead(self, positions: Tensor, nearest: int, horizon: int) -> tuple[Tensor, Tensor]:
        """The tokens at distance `nearest`, `nearest + 1`, ... after each position.

        Args:
            positions: int64 [c].
            nearest: at least 1.
            horizon: R, number of tokens.

        Returns:
            int64 [c, R], the tokens; bool [c, R], whether each counts, is in the position's document, and is the first such of
            its id among R.
        """
        begin = (positions + nearest)[:, None]
        ahead = begin + torch.arange(horizon, device=positions.device)
        inside = ahead <= self.last[positions][:, None]
        ahead = ahead.clamp_(max=len(self.tokens) - 1)
        if self.counts is not None:
            inside = inside & self.counts[ahead]
        return self.tokens[ahead], inside & (self.previous[ahead] < begin)


def find_upcoming(batch: PackedBatch) -> Upcoming:
    """Index the tokens of a packed sequence, by one sort. Does not wait for the device."""
    tokens, segments = batch.input_ids[0], batch.segment_ids[0]
    last = torch.searchsorted(segments, segments, side="right") - 1
    counts, keys = None, tokens
    if batch.answers_only:
        counts = torch.zeros_like(tokens, dtype=torch.bool)
        counts[1:] = batch.labels[0, :-1] != NO_LABEL
        keys = torch.where(counts, tokens, -1)
    order = torch.argsort(keys, stable=True)  # by token, then by position
    is_repeated = keys[order[1:]] == keys[order[:-1]]
    previous = torch.full_like(tokens, -1)
    previous[order[1:]] = torch.where(is_repeated, order[:-1], -1)
    return Upcoming(tokens, last, previous, counts)


Differentiate = Callable[[Tensor, slice], Tensor]
"""(scores [c, V], slice of the n rows) -> sum of the rows' losses, 0-d float32 or wider. It overwrites the scores with the
gradient of that sum."""


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
        vocab_size: V.
        hidden_size: d.
        spread: standard deviation of the initial weights.
    """

    def __init__(self, vocab_size: int, hidden_size: int, spread: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.spread = spread

    @classmethod
    def build_for(cls, config: PretrainedConfig) -> VocabularyHead:
        """Build a head on the meta device, with a model's vocabulary, width and initial standard deviation."""
        with torch.device("meta"):
            return cls(config.vocab_size, config.hidden_size, getattr(config, "initializer_range", 0.02))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights; needed after building on the meta device."""
        self.weight.normal_(std=self.spread)

    def forward(self, hidden_states: Tensor, differentiate: Differentiate, columns: int) -> Tensor:
        """Sum of the losses of all rows.

        Args:
            hidden_states: [n, d], n at least 1.
            differentiate: the loss.
            columns: working memory of a row, in numbers of the states' dtype, including its scores.

        Returns:
            0-d float32 (float64 for float64 states).
        """
        return _HeadLossSum.apply(hidden_states, self.weight, differentiate, columns)
