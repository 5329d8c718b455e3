"""Finds unknown keys in a model's configuration. transformers keeps them as attributes that nothing reads."""

from __future__ import annotations

import difflib
import json
from textwrap import shorten
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

CLOSENESS = 0.85
"""Similarity from which an unknown key counts as misspelt. Other unknown keys on the Hub, such as those of other families, are
less similar to any key that is left out."""
OLDER_NAMES = ("rope_theta", "rope_scaling", "torch_dtype")
"""Older keys that transformers still reads in place of renamed attributes."""
READ_BY_FAMILY = {
    "gemma3_text": ("rope_local_base_freq", "sliding_window_pattern"),
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "phi3": ("partial_rotary_factor",),
}
"""Older keys that only a family's own class reads."""
LONGEST_SHOWN_VALUE = 100


def list_unknown_keys(config: PretrainedConfig) -> list[str]:
    """Attributes of a configuration that its class does not have."""
    plain, of_generation = _build_plain(config), vars(GenerationConfig())  # older files also hold generation settings
    known = {*READ_BY_FAMILY.get(config.model_type, ()), *of_generation}
    return sorted(key for key in vars(config) if _is_public(key) and key not in known and not hasattr(plain, key))


def find_misspelt_keys(config: PretrainedConfig, settings: dict[str, Any]) -> list[str]:
    """One line for each unknown key that is similar to a known key which the settings leave out.

    Args:
        settings: the keys and values that the configuration was read from.
    """
    names, faults = config.attribute_map, []
    given = {names.get(key, key) for key in settings}
    known = [*vars(_build_plain(config)), *names, *OLDER_NAMES, *READ_BY_FAMILY.get(config.model_type, ())]
    left_out = [key for key in known if _is_public(key) and names.get(key, key) not in given]
    for key in filter(settings.__contains__, list_unknown_keys(config)):
        for meant in difflib.get_close_matches(key, left_out, n=1, cutoff=CLOSENESS):
            faults.append(
                f'{key} = {show_value(settings[key])}: model_type "{config.model_type}" has no such key, did you mean {meant}? '
                "Put it right, or leave it out"
            )
    return faults


def show_value(value: Any) -> str:
    """A value as JSON, shortened if it is long."""
    return shorten(json.dumps(value), LONGEST_SHOWN_VALUE, placeholder=" ...")


def _build_plain(config: PretrainedConfig) -> PretrainedConfig:
    """A default configuration of the same class; the given one if a user's class has no defaults."""
    try:
        return type(config)()
    except Exception:  # a model's own code may raise anything
        return config


def _is_public(key: str) -> bool:
    return not key.startswith("_") and key != "auto_map"
