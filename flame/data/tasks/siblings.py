"""Siblings, generated: the task "sibling discovery" of Nagarajan et al. 2025 (arXiv:2504.15266), which asks for unseen pairs.

Each parent has the same number of children. A document is two different children of one parent, in random order, and then the
parent. The model must choose the parent before it writes the first child:

    =17,203/2        children 17 and 203 of parent 2

The separator comes first, so that with `training.loss_on = "answer"` everything else is the answer. A model that knows the
families, but not which pairs are held out, has a cross entropy of ln(parents x children) + ln(children - 1) nats per document.
That part is chance; parent and end of text are determined.

Whether a pair is held out does not depend on its order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from flame.config.schema import JobConfig
from flame.config.types import NonNegativeInt, Section, Seed, option
from flame.data.tasks.generated import (
    ENDLESS,
    GeneratedKind,
    GeneratedSource,
    build_label_tokenizer,
    draw_orders,
    draw_words,
    is_held_out,
    mix,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEPARATOR = "="
NUM_TOKENS = 5
"""Tokens of a document under the tokenizer "siblings", including the end of text."""


@dataclass(kw_only=True)
class SiblingsOptions(Section):
    """Pairs of siblings, which dataset = "siblings" generates. One pair in 8 is for validation and never trained on."""

    section: ClassVar[str] = "siblings"

    parents: Annotated[int, Field(ge=2, le=64)] = option(5, fixed=True)
    """Number of parents."""
    children: Annotated[int, Field(ge=20, le=1000)] = option(500, fixed=True)
    """Children of each parent."""
    pairs: NonNegativeInt = option(0, fixed=True)
    """Documents in the training set, each a pair in one order. Each epoch shuffles them again. 0 draws new documents all the
    time, from all pairs that are not held out."""
    seed: Seed = option(0, fixed=True)
    """Seed of the families and the documents; training.seed decides the order of documents."""


class Siblings(GeneratedKind):
    """Pairs of siblings."""

    name = "siblings"
    Options = SiblingsOptions

    options: SiblingsOptions

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        yield from super().find_conflicts(job)
        if job.model.tokenizer_path == self.name and job.training.context_len < NUM_TOKENS:
            yield f"training.context_len = {job.training.context_len} cuts pairs of siblings, of {NUM_TOKENS} tokens: raise it"

    def open(self) -> SiblingsSource:
        return SiblingsSource(self.options, self.is_held_out)

    @classmethod
    def build_tokenizer(cls, options: SiblingsOptions) -> PreTrainedTokenizerFast:
        marks = [*(f"/{parent}" for parent in range(options.parents)), SEPARATOR]
        return build_label_tokenizer(cls.name, options.parents * options.children, marks, "/?[0-9]+|.")


class SiblingsSource(GeneratedSource):
    """Pairs of siblings."""

    def __init__(self, options: SiblingsOptions, is_held_out: bool):
        super().__init__(options.seed, options.pairs, is_held_out, num_words=3)
        self._families = deal_children(options)

    def _draw_pairs(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First child, second child and parent, int64 [n] each."""
        num_parents, num_children = self._families.shape
        parents, children, steps = (
            (words[:, column] % np.uint64(count)).astype(np.int64)
            for column, count in enumerate((num_parents, num_children, num_children - 1))
        )
        others = (children + 1 + steps) % num_children
        return self._families[parents, children], self._families[parents, others], parents

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
        for index, column in enumerate((separator, first, second, num_parents * num_children + parents, separator + 1)):
            ids[:, index] = column
        return ids.reshape(-1), np.full(len(words), NUM_TOKENS)


def deal_children(options: SiblingsOptions) -> np.ndarray:
    """The children of each parent, int64 [parents, children]: labels from 0 on, in an order drawn from the seed."""
    words = draw_words(options.seed, np.asarray([ENDLESS], dtype=np.uint64), 0, options.parents * options.children)
    return draw_orders(words).reshape(options.parents, options.children)


def hash_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Hash that decides whether a pair is held out, equal for both orders: int64 [n], int64 [n] -> uint64 [n]."""
    low, high = np.minimum(first, second).astype(np.uint64), np.maximum(first, second).astype(np.uint64)
    return mix(mix(low + np.uint64(1)) + high)


class SamplesJudged(NamedTuple):
    """Shares of all samples. Each condition adds to the one before."""

    coherent: float
    """Two different children of one parent, then that parent, then the end of text."""
    held_out: float
    """Coherent, and the pair is held out: training shows it in neither order."""
    unique: float
    """Held out, and no earlier sample has the pair in either order. This is the paper's creativity (equation 1), with "held out"
    instead of "not in the training set"."""


def judge_samples(samples: Sequence[Sequence[int]], options: SiblingsOptions) -> SamplesJudged:
    """Judge what a model has generated after the separator.

    Args:
        samples: at least one, as ids of the tokenizer "siblings". Ids after the end of text are ignored.
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
