"""Tells weights from others by a part of them, cheaply: names, shapes, sizes, and pieces of each file."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from flame.runtime.sameness import hash_pieces
from flame.weights.source import WeightSource


def describe_weights(source: WeightSource) -> dict[str, Any]:
    """What to compare between machines, by names that do not hold the path: that may be another one on each machine."""
    entries = sorted((name, entry.shape, entry.dtype) for name, entry in source.entries.items())
    return {
        "number of tensors in checkpoint.initial_load_path": len(entries),
        "bytes of checkpoint.initial_load_path": sum(file.stat().st_size for file in source.files),
        "tensors of checkpoint.initial_load_path": sha256(json.dumps(entries).encode()).hexdigest()[:16],
        "content of checkpoint.initial_load_path": [hash_pieces(file) for file in sorted(source.files)],
    }
