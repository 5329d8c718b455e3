"""Siblings, generated: the task of Nagarajan et al. 2025 (arXiv:2504.15266) that asks for what has not been seen: "sibling
discovery".

There are parents, each with as many children of its own. A document is two different children of one parent, in random order,
then the parent, which the model has to be thinking of before it writes the first child:

    =17,203/2        children 17 and 203 of parent 2

The separator comes first, so that with `training.loss_on = "answer"` all else is the answer. A model that knows the families, and
nothing of which pairs are held out, has a cross entropy of ln(parents x children) + ln(children - 1) nats a document: that much
is chance. Parent and end of text follow.

Whether a pair is held out does not depend on its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flame.config import Siblings
from flame.data.generated import ENDLESS, GeneratedSource, draw_orders, draw_words, is_held_out, mix

SEPARATOR = "="
NUM_TOKENS = 5
"""Of a document under the tokenizer "siblings", end of text included."""


class SiblingsSource(GeneratedSource):
    """Pairs of siblings."""

    def __init__(self, name: str, option: str, options: Siblings, is_held_out: bool):
        super().__init__(name, option, options.seed, options.pairs, is_held_out, num_words=3)
        self._families = deal_children(options)

    def _draw_pairs(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First child, second child and parent, int64 [n] each."""
        num_parents, num_children = self._families.shape
        parents, places, steps = (
            (words[:, column] % np.uint64(count)).astype(np.int64)
            for column, count in enumerate((num_parents, num_children, num_children - 1))
        )
        others = (places + 1 + steps) % num_children
        return self._families[parents, places], self._families[parents, others], parents

    def _hash_contents(self, words: np.ndarray) -> np.ndarray:
        first, second, _ = self._draw_pairs(words)
        return hash_pairs(first, second)

    def _write(self, words: np.ndarray) -> list[str]:
        columns = (column.tolist() for column in self._draw_pairs(words))
        return [f"{SEPARATOR}{first},{second}/{parent}" for first, second, parent in zip(*columns, strict=True)]

    def _encode(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second, parents = self._draw_pairs(words)
        num_parents, num_children = self._families.shape
        separator = num_parents * (num_children + 1)
        ids = np.empty((len(words), NUM_TOKENS), dtype=np.uint16)
        for place, column in enumerate((separator, first, second, num_parents * num_children + parents, separator + 1)):
            ids[:, place] = column
        return ids.reshape(-1), np.full(len(words), NUM_TOKENS)


def deal_children(options: Siblings) -> np.ndarray:
    """The children of each parent, int64 [parents, children]: labels from 0 on, in an order drawn from the seed."""
    words = draw_words(options.seed, np.asarray([ENDLESS], dtype=np.uint64), 0, options.parents * options.children)
    return draw_orders(words).reshape(options.parents, options.children)


def hash_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What decides on holding out a pair, the same in both orders: int64 [n], int64 [n] -> uint64 [n]."""
    low, high = np.minimum(first, second).astype(np.uint64), np.maximum(first, second).astype(np.uint64)
    return mix(mix(low + np.uint64(1)) + high)


class SamplesJudged(NamedTuple):
    """Shares of all samples, each a part of the one before."""

    coherent: float
    """Two different children of one parent, then that parent, then the end of the text."""
    held_out: float
    """And the pair is one that training never shows, in neither order."""
    unique: float
    """And no sample before has it, in either order: the paper's creativity (equation 1), with "held out" for "not in the training
    set"."""


def judge_samples(samples: Sequence[Sequence[int]], options: Siblings) -> SamplesJudged:
    """Judge what a model has written behind the separator.

    Args:
        samples: one or more, as ids of the tokenizer "siblings". Whatever follows the end of a text is not looked at.
    """
    num_labels = options.parents * options.children
    end_of_text = num_labels + options.parents + 1
    parent_of = np.empty(num_labels, dtype=np.int64)
    parent_of[deal_children(options)] = np.arange(options.parents)[:, None]
    pairs = [
        (min(sample[:2]), max(sample[:2]))
        for sample in samples
        if len(sample) >= NUM_TOKENS - 1
        and max(sample[:2]) < num_labels
        and sample[0] != sample[1]
        and parent_of[sample[0]] == parent_of[sample[1]] == sample[2] - num_labels
        and sample[3] == end_of_text
    ]
    columns = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    new = columns[is_held_out(hash_pairs(columns[:, 0], columns[:, 1]))]
    return SamplesJudged(*(len(found) / len(samples) for found in (pairs, new, np.unique(new, axis=0))))
