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
LARGEST_COUNT = 1 << 40
"""Sizes beyond it overflow the products of sizes."""
POSITIVE = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "factor")
"""Keys of numbers above 0: others divide by 0, or take a power of a negative number."""
MOST_LAYERS = 2000
"""Building more takes minutes, and no model has them."""
ROPE = "rope_"
"""Prefix of keys of tables about rotary embeddings."""
LONGEST_SHOWN = 100


def find_impossible_values(settings: dict[str, Any]) -> Iterator[str]:
    """Yield one line for each value, such as 0 attention heads or an epsilon of infinity.

    Args:
        settings: the keys and values of the file.
    """
    for key, value in settings.items():
        if isinstance(value, dict) and key.startswith(ROPE):
            yield from (f"{key}.{fault}" for fault in _find_rope_faults(value))
        elif fault := _find_fault(key, value):
            yield fault


def _find_rope_faults(rope: dict[str, Any]) -> Iterator[str]:
    """As above, of a table about rotary embeddings. Some families have one for each kind of layer."""
    for key, value in rope.items():
        if isinstance(value, dict):
            yield from (f"{key}.{fault}" for fault in _find_rope_faults(value))
        elif fault := _find_fault(key, value):
            yield fault


def _find_fault(key: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if key in COUNTS and not value >= 1:
        return f"{key} = {_show(value)}: it must be at least 1"
    if key in LAYER_COUNTS and value > MOST_LAYERS:
        return f"{key} = {_show(value)}: it must be at most {MOST_LAYERS}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} = {value}: it must be a finite number"
    if key in COUNTS and value > LARGEST_COUNT:
        return f"{key} = {_show(value)}: it must be at most {LARGEST_COUNT}"
    if _is_epsilon(key) and not 0 <= value <= 1:
        return f"{key} = {_show(value)}: it must be a number from 0 to 1"
    if key in POSITIVE and not value > 0:
        return f"{key} = {_show(value)}: it must be more than 0"
    return None


def _is_epsilon(key: str) -> bool:
    return key.endswith(("_eps", "_epsilon")) or key == "eps"


def _show(value: float) -> str:
    shown = str(value)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]} ..."
