"""A seeded random order of the documents, in constant memory. Step 3 in the life of a batch (`flame.data.loader`)."""

from __future__ import annotations

import math
from hashlib import blake2b

ROUNDS = 8


def shuffled_index(position: int, n: int, seed: int, epoch: int) -> int:
    """Return the document at `position` in the order of this seed and epoch.

    For fixed `n`, `seed` and `epoch` this is a bijection of [0, n), computed in constant memory. It is a Feistel network over a
    grid of slightly more than `n` cells. A result outside [0, n) is sent through the network again. The network permutes the
    grid, so this ends inside [0, n).
    """
    assert 0 <= position < n
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    index = position
    while True:
        index = _permute_grid(index, rows, columns, f"{seed}/{epoch}")
        if index < n:
            return index


def _permute_grid(cell: int, rows: int, columns: int, key: str) -> int:
    row, column = divmod(cell, columns)
    for turn in range(0, ROUNDS, 2):
        row = (row + _mix(f"{key}/{turn}/{column}")) % rows
        column = (column + _mix(f"{key}/{turn + 1}/{row}")) % columns
    return row * columns + column


def _mix(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
