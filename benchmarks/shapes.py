"""Shapes of models that are measured, by name."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.pool import REPO

SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "340M": ("llama_340M.json", {}),
    "1B": ("llama_1B.json", {}),
    "8B": (
        "llama_1B.json",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
    ),
    "32B": (
        "llama_1B.json",
        {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
    ),
}
"""A file in configs/models, and what differs from it. 8B is Llama-3.1-8B, 32B has the sizes of Qwen2.5-32B in a Llama."""


def write_shape(name: str, folder: Path, layers: int | None = None) -> Path:
    """Write the model configuration of a shape, with its first `layers` layers if given."""
    file, changes = SHAPES[name]
    if layers is not None:
        changes = changes | {"num_hidden_layers": layers}
    path = folder / (f"{name}.json" if layers is None else f"{name}-{layers}-layers.json")
    path.write_text(json.dumps(json.loads((REPO / "configs" / "models" / file).read_text()) | changes))
    return path
