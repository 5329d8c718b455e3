"""Which continuation belongs to which prefix: retrieval by predictions of the future, beside plain hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from flame.errors import UserError
from flame.library.embeddings import FutureModules, embed


class Retrieval(NamedTuple):
    """How often each prefix finds its own continuation among all."""

    queries: str
    """What stands for the prefix."""
    keys: str
    """What stands for the continuation."""
    accuracy: float
    """Share of prefixes whose own continuation has the highest score. A tie is a miss."""
    reciprocal_rank: float
    """Mean of 1 / rank of the own continuation."""


def split_texts(texts: Sequence[Tensor], shift: int) -> tuple[list[Tensor], list[Tensor]]:
    """The first half of each text, and what follows it as the loss sees it: from the target of the last token of that half on.

    Args:
        texts: int64 [n] each. Those of less than 4 tokens are left out.
        shift: `future_encoder.target_shift`.
    """
    prefixes, continuations = [], []
    for tokens in texts:
        cut = len(tokens) // 2
        if len(tokens) >= 4 and cut - 1 + shift < len(tokens):
            prefixes.append(tokens[:cut])
            continuations.append(tokens[cut - 1 + shift :])
    return prefixes, continuations


def retrieve(
    modules: FutureModules, lm: nn.Module, texts: Sequence[Tensor], most_tokens: int, end: int | None = None
) -> list[Retrieval]:
    """Match prefixes and continuations of texts in three ways.

    Args:
        most_tokens, end: as `embed`.

    Raises:
        UserError: fewer than two texts are long enough.
    """
    prefixes, continuations = split_texts(texts, modules.shift)
    if len(prefixes) < 2:
        raise UserError(f"{len(prefixes)} of {len(texts)} texts are long enough to be cut in two: give two or more")
    before, after = (embed(modules, lm, parts, most_tokens, end) for parts in (prefixes, continuations))
    pairs = [
        ("prediction of the future", before.predictions, "summary", after.summaries),
        ("hidden state", before.states, "hidden state of its last token", after.states),
    ]
    if before.states.shape[1] == after.summaries.shape[1]:
        pairs.insert(1, ("hidden state", before.states, "summary", after.summaries))
    return [Retrieval(query, key, *rank(left @ right.T)) for query, left, key, right in pairs]


def rank(scores: Tensor) -> tuple[float, float]:
    """Accuracy and mean reciprocal rank of the diagonal of scores [n, n], each row a query."""
    own = scores.diagonal()[:, None]
    ranks = (scores >= own).sum(1)  # a tie stands before
    return (ranks == 1).float().mean().item(), (1.0 / ranks).mean().item()
