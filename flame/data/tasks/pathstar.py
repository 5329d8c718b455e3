"""Path-star graphs, generated: a task that next-token prediction fails to learn (Bachmann and Nagarajan 2024, arXiv:2403.06963).

G(d, l) has d arms that start at one center. The path along an arm has l nodes, including the center. A document lists the edges
in random order, each directed away from the center. Then come the center and the goal, which is the last node of one arm. The
answer is the path between them:

    4,1|0,5|4,0|1,2/4,5=4,0,5        one document of G(2, 3)

Commas are for readability. The tokenizer "pathstar" drops them, as the published code does: 4 1 | 0 5 | 4 0 | 1 2 / 4 5 = 4 0 5.

Whether a graph is held out depends on its center and arms alone, not on the order of edges or the goal. Otherwise a model could
see a graph with every goal but one in training, and learn to choose the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from flame.config.schema import JobConfig
from flame.config.types import NonNegativeInt, Section, Seed, option
from flame.data.tasks.generated import GeneratedKind, GeneratedSource, build_label_tokenizer, draw_orders, mix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FEWEST_GRAPHS = 300
"""Fewest graphs of one size. Among fewer, there may be none to hold out."""
MARKS = ("|", "/", "=")


@dataclass(kw_only=True)
class PathstarOptions(Section):
    """Path-star graphs, which dataset = "pathstar" generates. Validation graphs are never trained on."""

    section: ClassVar[str] = "pathstar"

    labels: Annotated[int, Field(gt=0, le=10_000)] = option(30, fixed=True)
    """Number of node ids. The nodes of a graph have different ids, drawn from these."""
    graphs: NonNegativeInt = option(0, fixed=True)
    """Graphs in the training set, each with one order of edges. Each epoch shuffles them again. Each worker process keeps them in
    memory. 0 generates new graphs all the time."""
    seed: Seed = option(0, fixed=True)
    """Seed of the graphs; training.seed decides their order."""


class Pathstar(GeneratedKind):
    """Path-star graphs of the sizes that `dataset_name` gives."""

    name = "pathstar"
    uses = frozenset({"dataset_name"})
    Options = PathstarOptions
    second_token_metric = "first_branch"  # the answer begins with the center, which the prompt holds

    options: PathstarOptions

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        yield from super().find_conflicts(job)
        key, names = f"{self.section}.dataset_name", self.corpus.dataset_name
        try:
            sizes = parse_sizes(names)
        except ValueError as error:
            yield (
                f'{key} = "{names}": "{error}" is no size of path-star graphs: give arms x nodes of a path with the center, both '
                '2 to 999, such as "5x5", or several, "2x3,5x5"'
            )
            return
        labels, context_len = self.options.labels, job.training.context_len
        for size in sizes:
            if labels < size.num_nodes:
                yield f"pathstar.labels = {labels} are too few for {key}: a graph {size} has {size.num_nodes} nodes: raise it"
            elif size.count_graphs(labels) < FEWEST_GRAPHS:
                yield (
                    f"pathstar.labels = {labels} leaves {size.count_graphs(labels)} graphs of {key} = {size}, too few to keep "
                    f"some for validation (at least {FEWEST_GRAPHS}): raise it"
                )
            if job.model.tokenizer_path == self.name and context_len < size.num_tokens:
                yield (
                    f"training.context_len = {context_len} cuts the graphs {size} of {key}, which have {size.num_tokens} tokens: "
                    "raise it"
                )

    def open(self) -> PathstarSource:
        return PathstarSource(parse_sizes(self.corpus.dataset_name), self.options, self.is_held_out)

    @classmethod
    def build_tokenizer(cls, options: PathstarOptions) -> PreTrainedTokenizerFast:
        return build_label_tokenizer(cls.name, options.labels, MARKS, "[0-9]+|.")

    def name_answers(self) -> dict[int, str]:
        names: dict[int, list[str]] = {}
        for size in dict.fromkeys(parse_sizes(self.corpus.dataset_name)):
            names.setdefault(size.num_tokens, []).append(str(size))
        return {length: ",".join(alike) for length, alike in names.items()} if len(names) > 1 else {}


class Size(NamedTuple):
    """G(arms, nodes)."""

    arms: int
    nodes: int
    """Nodes of the path along one arm, including the center."""

    @property
    def num_nodes(self) -> int:
        """Nodes of the whole graph."""
        return self.arms * (self.nodes - 1) + 1

    @property
    def num_tokens(self) -> int:
        """Tokens of a document under the tokenizer "pathstar", including the end of text."""
        return 3 * (self.num_nodes - 1) + 4 + self.nodes

    def count_graphs(self, labels: int) -> int:
        """Number of graphs with this many labels, not counting goals."""
        return math.perm(labels, self.num_nodes) // math.factorial(self.arms)

    def __str__(self) -> str:
        return f"{self.arms}x{self.nodes}"


def parse_sizes(text: str) -> list[Size]:
    """Read sizes such as "2x3,5x5".

    Raises:
        ValueError: it is not a size, or has fewer than two arms or fewer than two nodes per path.
    """
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,3})x([0-9]{1,3})\s*", word)
        if match is None or int(match[1]) < 2 or int(match[2]) < 2:
            raise ValueError(word)
        sizes.append(Size(int(match[1]), int(match[2])))
    return sizes


class Graphs(NamedTuple):
    """n graphs of one size with N nodes and E = N - 1 edges, each with an order of its edges.

    Node 0 is the center; the others are numbered outwards along one arm after the other. Edge e leads to node e + 1.
    """

    labels: np.ndarray
    """int64 [n, N], label of each node."""
    goal_arm: np.ndarray
    """int64 [n]"""
    edge_order: np.ndarray
    """int64 [n, E]"""


class PathstarSource(GeneratedSource):
    """Path-star graphs.

    Args:
        sizes: sizes of the graphs, equally likely.
    """

    def __init__(self, sizes: list[Size], options: PathstarOptions, is_held_out: bool):
        self._sizes, self._num_labels = sizes, options.labels
        num_words = 2 + options.labels + max(size.num_nodes for size in sizes) - 1
        super().__init__(options.seed, options.graphs, is_held_out, num_words)

    def _split_by_size(self, words: np.ndarray) -> Iterator[tuple[Size, np.ndarray]]:
        """Yield each size with the rows of words, uint64 [n, num_words], that make a graph of this size."""
        choice = words[:, 0] % np.uint64(len(self._sizes))
        for index, size in enumerate(self._sizes):
            yield size, np.flatnonzero(choice == index)

    def _label_nodes(self, size: Size, words: np.ndarray) -> np.ndarray:
        return draw_orders(words[:, 2 : 2 + self._num_labels])[:, : size.num_nodes]

    def _draw_graphs(self, size: Size, words: np.ndarray) -> Graphs:
        edges = words[:, 2 + self._num_labels :][:, : size.num_nodes - 1]
        goal_arm = (words[:, 1] % np.uint64(size.arms)).astype(np.int64)
        return Graphs(self._label_nodes(size, words), goal_arm, draw_orders(edges))

    def _hash_contents(self, words: np.ndarray) -> np.ndarray:
        hashes = np.empty(len(words), dtype=np.uint64)
        for size, rows in self._split_by_size(words):
            labels = self._label_nodes(size, words[rows]).astype(np.uint64) + np.uint64(1)
            arms = labels[:, 1:].reshape(len(rows), size.arms, size.nodes - 1)
            along = np.zeros(arms.shape[:2], dtype=np.uint64)
            for step in range(size.nodes - 1):
                along = mix(along + arms[:, :, step])
            hashes[rows] = mix(mix(~labels[:, 0]) + along.sum(axis=1))  # a sum, since arms have no order
        return hashes

    def _write(self, words: np.ndarray) -> list[str]:
        texts = [""] * len(words)
        for size, rows in self._split_by_size(words):
            graphs = self._draw_graphs(size, words[rows])
            for row, *graph in zip(rows, *(column.tolist() for column in graphs), strict=True):
                texts[row] = write_graph(size, *graph)
        return texts

    def _encode(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.empty(len(words), dtype=np.int64)
        encoded = []
        for size, rows in self._split_by_size(words):
            lengths[rows] = size.num_tokens
            encoded.append((rows, encode_graphs(size, self._draw_graphs(size, words[rows]), self._num_labels)))
        starts = lengths.cumsum() - lengths
        tokens = np.empty(int(lengths.sum()), dtype=np.uint16)
        for rows, ids in encoded:
            tokens[starts[rows][:, None] + np.arange(ids.shape[1])] = ids
        return tokens, lengths


def write_graph(size: Size, labels: list[int], goal_arm: int, edge_order: list[int]) -> str:
    """The text of one graph."""
    center, step = labels[0], size.nodes - 1
    arms = [labels[first : first + step] for first in range(1, size.num_nodes, step)]
    edges = [f"{u},{v}" for arm in arms for u, v in zip([center, *arm], arm, strict=False)]
    path = [center, *arms[goal_arm]]
    return f"{'|'.join(edges[edge] for edge in edge_order)}/{center},{path[-1]}={','.join(map(str, path))}"


def encode_graphs(size: Size, graphs: Graphs, num_labels: int) -> np.ndarray:
    """Graphs as ids of the tokenizer "pathstar", int64 [n, num_tokens]."""
    bar, slash, equals, end_of_text = range(num_labels, num_labels + len(MARKS) + 1)
    num_edges, step = size.num_nodes - 1, size.nodes - 1
    sources = np.arange(num_edges)
    sources[::step] = 0  # the first edge of each arm leaves the center
    path = np.zeros((len(graphs.labels), size.nodes), dtype=np.int64)
    path[:, 1:] = 1 + graphs.goal_arm[:, None] * step + np.arange(step)
    path = np.take_along_axis(graphs.labels, path, axis=1)

    ids = np.full((len(graphs.labels), size.num_tokens), bar, dtype=np.int64)
    question = 3 * num_edges
    ids[:, 0:question:3] = np.take_along_axis(graphs.labels, sources[graphs.edge_order], axis=1)
    ids[:, 1:question:3] = np.take_along_axis(graphs.labels, graphs.edge_order + 1, axis=1)
    ids[:, question - 1] = slash
    ids[:, question], ids[:, question + 1] = path[:, 0], path[:, -1]
    ids[:, question + 2] = equals
    ids[:, question + 3 : -1] = path
    ids[:, -1] = end_of_text
    return ids
