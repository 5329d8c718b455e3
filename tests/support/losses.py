"""Losses with small tiles."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

from flame.kernels import softmax_rows


@contextmanager
def chunks_of(rows: int):
    with patch.object(softmax_rows, "ROW_TILE", rows), patch.object(softmax_rows, "CHUNK_BYTES", 8 if rows < 100 else 2**30):
        yield
