"""Keys of a model's configuration that its class does not have: transformers keeps any as an attribute, which nothing reads."""

from __future__ import annotations

import difflib
import json
from textwrap import shorten
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

CLOSENESS = 0.85
"""From here on a key is another one, misspelt. What configurations on the Hub carry beside a family's own keys, such as those of
other families, is less like any that they leave out."""
OLDER_NAMES = ("rope_theta", "rope_scaling", "torch_dtype")
"""What the library takes in place of attributes of other names."""
READ_BY_FAMILY = {
    "gemma3_text": ("rope_local_base_freq", "sliding_window_pattern"),
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "phi3": ("partial_rotary_factor",),
}
"""Likewise, where a family's class reads them by itself."""
LONGEST_SHOWN_VALUE = 100


def list_unknown_keys(config: PretrainedConfig) -> list[str]:
    """Attributes of a configuration that others of its class are without."""
    plain, of_generation = _build_plain(config), vars(GenerationConfig())  # which older files hold too
    known = {*READ_BY_FAMILY.get(config.model_type, ()), *of_generation}
    return sorted(key for key in vars(config) if _is_public(key) and key not in known and not hasattr(plain, key))


def find_misspelt_keys(config: PretrainedConfig, settings: dict[str, Any]) -> list[str]:
    """One line for each unknown key that is close to one of the class which the settings leave out.

    Args:
        settings: what the configuration was read from.
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
    """A value as JSON has it, cut where it is long."""
    return shorten(json.dumps(value), LONGEST_SHOWN_VALUE, placeholder=" ...")


def _build_plain(config: PretrainedConfig) -> PretrainedConfig:
    """Another configuration of the same class; the same one where the class, of the user's own, has no defaults."""
    try:
        return type(config)()
    except Exception:  # whatever code that comes with a model raises
        return config


def _is_public(key: str) -> bool:
    return not key.startswith("_") and key != "auto_map"
