"""Path-star graphs, generated: the task on which next-token prediction learns to guess (Bachmann and Nagarajan 2024,
arXiv:2403.06963).

G(d, l) has d arms that leave one center; the path along an arm, center included, has l nodes. A document lists the edges in
random order, each from the center outwards, then center and goal, the last node of one arm, and as answer the path between them:

    4,1|0,5|4,0|1,2/4,5=4,0,5        one document of G(2, 3)

Commas are for the reader; the tokenizer "pathstar" drops them, as the published code does: 4 1 | 0 5 | 4 0 | 1 2 / 4 5 = 4 0 5.

Whether a graph is held out depends on its center and arms alone. Not on the order in which edges are listed, nor on the goal: who
has seen a graph with all goals but one would have learned to choose the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flame.config import Pathstar
from flame.data.generated import GeneratedSource, draw_orders, mix

FEWEST_GRAPHS = 300
"""Of one size. Among fewer there might be none to hold out."""
MARKS = ("|", "/", "=")


class Size(NamedTuple):
    """G(arms, nodes)."""

    arms: int
    nodes: int
    """Of the path along one arm, center included."""

    @property
    def num_nodes(self) -> int:
        """Of the whole graph."""
        return self.arms * (self.nodes - 1) + 1

    @property
    def num_tokens(self) -> int:
        """Of a document under the tokenizer "pathstar", end of text included."""
        return 3 * (self.num_nodes - 1) + 4 + self.nodes

    def count_graphs(self, labels: int) -> int:
        """Graphs over so many labels, whatever the goal."""
        return math.perm(labels, self.num_nodes) // math.factorial(self.arms)

    def __str__(self) -> str:
        return f"{self.arms}x{self.nodes}"


def parse_sizes(text: str) -> list[Size]:
    """Read sizes such as "2x3,5x5".

    Raises:
        ValueError: it is none, or has no two arms to choose between, or no node besides the center.
    """
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,3})x([0-9]{1,3})\s*", word)
        if match is None or int(match[1]) < 2 or int(match[2]) < 2:
            raise ValueError(word)
        sizes.append(Size(int(match[1]), int(match[2])))
    return sizes


class Graphs(NamedTuple):
    """n drawn graphs of one size with N nodes and E = N - 1 edges, each with the order in which its edges are listed.

    Nodes are numbered from the center, 0, outwards along one arm after the other; edge e leads to node e + 1.
    """

    labels: np.ndarray
    """int64 [n, N], of the nodes."""
    goal_arm: np.ndarray
    """int64 [n]"""
    edge_order: np.ndarray
    """int64 [n, E]"""


class PathstarSource(GeneratedSource):
    """Path-star graphs.

    Args:
        sizes: each as likely as the others.
    """

    def __init__(self, name: str, option: str, sizes: list[Size], options: Pathstar, is_held_out: bool):
        self._sizes, self._num_labels = sizes, options.labels
        num_words = 2 + options.labels + max(size.num_nodes for size in sizes) - 1
        super().__init__(name, option, options.seed, options.graphs, is_held_out, num_words)

    def _split_by_size(self, words: np.ndarray) -> Iterator[tuple[Size, np.ndarray]]:
        """Each size with the rows of words, uint64 [n, num_words], that draw one of it."""
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
            hashes[rows] = mix(mix(~labels[:, 0]) + along.sum(axis=1))  # a sum, for arms have no order
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
    """The graphs as ids of the tokenizer "pathstar", int64 [n, num_tokens]."""
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
