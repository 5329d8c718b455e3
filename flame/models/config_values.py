"""Finds values of a model's configuration that no model can have. Looks at the file, before transformers computes with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "ffn_dim", "d_model"),
    *("num_layers", "n_layers", "n_heads", "num_heads"),
)
"""Keys of numbers that must be at least 1, in any family."""
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
MOST_LAYERS = 2000
"""Building more takes minutes, and no model has them."""
LONGEST_SHOWN = 100


def find_impossible_values(settings: dict[str, Any]) -> Iterator[str]:
    """Yield one line for each value, such as 0 attention heads or an epsilon of infinity.

    Args:
        settings: the keys and values of the file.
    """
    for key, value in settings.items():
        if isinstance(value, bool):
            continue
        if key in COUNTS and isinstance(value, int | float) and not value >= 1:
            yield f"{key} = {_show(value)}: it must be at least 1"
        elif key in LAYER_COUNTS and isinstance(value, int | float) and value > MOST_LAYERS:
            yield f"{key} = {_show(value)}: it must be at most {MOST_LAYERS}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key} = {value}: it must be a finite number"
        elif _is_epsilon(key) and isinstance(value, int | float) and not 0 <= value <= 1:
            yield f"{key} = {_show(value)}: it must be a number from 0 to 1"
        elif key.startswith("rope_") and isinstance(value, dict):
            wrong = {name: each for name, each in value.items() if isinstance(each, float) and not math.isfinite(each)}
            yield from (f"{key}.{name} = {each}: it must be a finite number" for name, each in wrong.items())


def _is_epsilon(key: str) -> bool:
    return key.endswith(("_eps", "_epsilon")) or key == "eps"


def _show(value: float) -> str:
    shown = str(value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]} ..."
