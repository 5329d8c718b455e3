"""A seeded order of the documents that needs no memory, however many there are."""

from __future__ import annotations

import math
from hashlib import blake2b

ROUNDS = 8


def shuffled_index(position: int, n: int, seed: int, epoch: int) -> int:
    """Return the document that comes at `position` in the order of this seed and epoch.

    For fixed `n`, `seed` and `epoch` this is a bijection of [0, n), computed in constant memory: a Feistel network over a grid
    of barely more than `n` cells. A cell outside [0, n) is sent through again, which leads back inside since the network
    permutes the grid.
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
