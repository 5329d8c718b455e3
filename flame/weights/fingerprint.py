"""Tells weights from others by a part of them, cheaply: names, shapes, sizes, and pieces of each file."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from flame.runtime.sameness import hash_pieces
from flame.weights.source import WeightSource


def describe_weights(source: WeightSource) -> dict[str, Any]:
    """What to compare between machines, by name."""
    entries = sorted((name, entry.shape, entry.dtype) for name, entry in source.entries.items())
    return {
        f"number of tensors in {source.label}": len(entries),
        f"bytes of {source.label}": sum(file.stat().st_size for file in source.files),
        f"tensors of {source.label}": sha256(json.dumps(entries).encode()).hexdigest()[:16],
        f"content of {source.label}": [hash_pieces(file) for file in sorted(source.files)],
    }
