"""Path-star graphs, generated: the task on which next-token prediction learns to guess (Bachmann and Nagarajan 2024,
arXiv:2403.06963).

G(d, l) has d arms that leave one center; the path along an arm, center included, has l nodes. A document lists the edges in
random order, each from the center outwards, then center and goal, the last node of one arm, and as answer the path between them:

    4,1|0,5|4,0|1,2/4,5=4,0,5        one document of G(2, 3)

A graph is a function of (seed, number). Graphs are divided by their contents, whatever the order of the edges and the goal: one
in `HELD_OUT_EVERY` is never trained on, so that a set to validate on shares no graph with training, even where there are few.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, shake_128
from typing import NamedTuple

import numpy as np

from flame.config import Pathstar

HELD_OUT_EVERY = 8
FEWEST_GRAPHS = 300
"""Of one size. Among fewer there might be none to hold out."""
ENDLESS = 2**40
"""Documents of a source that is generated on the fly."""
MARKS = (",", "|", "/", "=")


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
        return 4 * (self.num_nodes - 1) + 4 + 2 * self.nodes

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


class Graph(NamedTuple):
    """One drawn graph, with the order in which its edges are listed."""

    center: int
    arms: list[list[int]]
    """Labels along each arm, without the center."""
    goal_arm: int
    edge_order: list[int]
    """Of the edges, arm after arm."""

    def write(self) -> str:
        """The document."""
        edges = [f"{u},{v}" for arm in self.arms for u, v in zip([self.center, *arm], arm, strict=False)]
        listed = "|".join([edges[place] for place in self.edge_order])
        path = [self.center, *self.arms[self.goal_arm]]
        return f"{listed}/{path[0]},{path[-1]}={','.join(map(str, path))}"

    def is_held_out(self) -> bool:
        """Decided by the graph alone, not by the orders of edges and arms. Nor by the goal: who has seen a graph with all goals
        but one would have learned to choose the others."""
        content = f"{self.center}/{sorted(self.arms)}"
        return blake2b(content.encode(), digest_size=8).digest()[0] % HELD_OUT_EVERY == 0


@dataclass
class PathstarSource:
    """`flame.data.sources.Source` of generated documents. Every document costs the same, and none is kept."""

    name: str
    option: str
    sizes: tuple[Size, ...]
    """Each as likely as the others."""
    options: Pathstar
    is_held_out: bool
    """Documents of held-out graphs alone, or of the others alone."""

    def __len__(self) -> int:
        return self.options.graphs if self.options.graphs and not self.is_held_out else ENDLESS

    def read(self, index: int) -> str:
        """Return a document; it depends on `pathstar.seed`, the number, and whether graphs are held out."""
        attempt = 0
        while True:
            graph = self._draw(index, attempt)
            if graph.is_held_out() == self.is_held_out:
                return graph.write()
            attempt += 1

    def _draw(self, index: int, attempt: int) -> Graph:
        labels = self.options.labels
        key = f"{self.options.seed}/{int(self.is_held_out)}/{index}/{attempt}"
        bits = np.frombuffer(shake_128(key.encode()).digest(8 * (2 + labels + self._most_edges)), dtype="<u8")
        size = self.sizes[int(bits[0] % len(self.sizes))]
        edges = size.num_nodes - 1
        nodes = bits[2 : 2 + labels].argsort(kind="stable")[: size.num_nodes].tolist()
        step = size.nodes - 1
        arms = [nodes[first : first + step] for first in range(1, size.num_nodes, step)]
        edge_order = bits[2 + labels : 2 + labels + edges].argsort(kind="stable").tolist()
        return Graph(nodes[0], arms, int(bits[1] % size.arms), edge_order)

    @cached_property
    def _most_edges(self) -> int:
        return max(size.num_nodes for size in self.sizes) - 1
