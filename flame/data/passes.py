"""How even passes over a corpus are.

Documents belong to streams by number (`flame.data.document_streams`), and streams take turns with packed sequences of one length.
So a stream of short documents begins the next pass while others are still in this one.
"""

from __future__ import annotations

import math

import numpy as np

MOST_DRAWN = 5_000_000
"""Documents, over all passes. The streams of more are even enough."""
MOST_DRAWS = 10
"""Orders, of which the mean is taken."""


def estimate_repeats(lengths: np.ndarray, num_streams: int, epochs: float) -> float:
    """Share of the tokens of some passes that are read once too often, while as many are read once too seldom.

    Args:
        lengths: integer [n], tokens of each document.
        num_streams: at most n. Of fewer documents, streams read the same ones at once.
        epochs: passes.
    """
    count = len(lengths)
    # Streams that are ahead go on into later passes.
    passes = 2 * math.ceil(min(epochs, MOST_DRAWN)) + 5
    if not num_streams <= count or passes * count > MOST_DRAWN:
        return 0.0
    generator = np.random.default_rng(0)
    draws = min(MOST_DRAWN // (passes * count), MOST_DRAWS)
    return float(np.mean([_draw_repeats(lengths, num_streams, epochs, passes, generator) for _ in range(draws)]))


def _draw_repeats(lengths: np.ndarray, num_streams: int, epochs: float, passes: int, generator: np.random.Generator) -> float:
    order = np.concatenate([generator.permutation(len(lengths)) for _ in range(passes)])
    order = order[: len(order) // num_streams * num_streams].reshape(-1, num_streams)
    asked = lengths[order]
    before = np.cumsum(asked, axis=0) - asked
    found = np.clip(lengths.sum() * epochs / num_streams - before, 0, asked)
    read = np.bincount(order.ravel(), weights=found.ravel(), minlength=len(lengths))
    return float(np.maximum(read - math.ceil(epochs) * lengths, 0).sum() / read.sum())
