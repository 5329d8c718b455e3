"""Writes a model's configuration and tokenizer so that transformers 4 reads them as transformers 5 does.

transformers 4.57 ignores names that it does not know, and takes its defaults: a rotary base of 10,000, no scaling, 128 experts.
So the older names stand beside the new ones. transformers 5 reads both, and the older ones first: a name with which it would read
other rotary settings is left out. What transformers 4 cannot express is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer_config.json"
FULL, SLIDING = "full_attention", "sliding_attention"

NOT_SCALING = ("rope_theta", "partial_rotary_factor")
"""Keys of `rope_parameters` that were settings of their own."""
RENAMED = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}
"""The names of `NOT_SCALING`, by family, where they were others."""
LOCAL_BASE = "rope_local_base_freq"
HAVE_LOCAL_BASE = ("gemma3_text", "gemma3n_text")
"""Families whose sliding layers had a rotary base of their own."""
LONGROPE = ("short_factor", "long_factor")
NO_SCALING = ("olmo", "olmo2")
"""Families that refuse scaling in the form of `rope_parameters`, by an error."""
CONSTANTS = {"gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}}
"""Settings by family that have one value in transformers 4."""
ORIGINAL_LENGTH = "original_max_position_embeddings"
OF_THIS_MACHINE = ("is_local", "local_files_only")
"""Keys of a tokenizer's settings that say where it was loaded from."""


def write_config(config: PretrainedConfig, folder: Path) -> list[str]:
    """Write config.json, with the older names of rotary settings and experts beside the new ones.

    Returns:
        what transformers 4 computes otherwise.
    """
    config.save_pretrained(folder)
    names, missing = _list_readable(config, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    _update(folder / CONFIG_FILE, names)
    return [*missing, *_find_inexpressible(config)]


def adapt_tokenizer(folder: Path) -> None:
    """Name a class that both releases have in the tokenizer's settings, and remove what holds on this machine alone."""
    if not (folder / TOKENIZER_FILE).exists():
        return
    settings = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    older: dict[str, Any] = {}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"  # in transformers 5, another name of the same class
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = extra
    removed = [*OF_THIS_MACHINE, *(["extra_special_tokens"] if "additional_special_tokens" in older else [])]
    _update(folder / TOKENIZER_FILE, older, removed)


def _update(path: Path, added: dict[str, Any], removed: list[str] | None = None) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in (removed or ())}
    path.write_text(json.dumps(kept | added, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _list_readable(config: PretrainedConfig, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The older names with which transformers 5 reads the same rotary settings, and what had to be left out for that."""
    experts = {older: getattr(config, newer) for older, newer in config.attribute_map.items() if older.startswith("num_experts")}
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return experts, []
    names = _list_rotary_names(config, rope)
    if _is_read_back(config, settings | names):
        return experts | names, []
    fewer = {key: value for key, value in names.items() if key != "rope_scaling"}
    if _is_read_back(config, settings | fewer):
        return experts | fewer, ["it does not scale rotary positions"]
    return experts, ["it takes its default rotary settings"]


def _is_read_back(config: PretrainedConfig, settings: dict[str, Any]) -> bool:
    found, own = (
        {key: value for key, value in (each.rope_parameters or {}).items() if key != "type"}  # the older name of rope_type
        for each in (type(config).from_dict(json.loads(json.dumps(settings))), config)
    )
    return found == own


def _list_rotary_names(config: PretrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    main = rope.get(FULL, rope)  # settings by type of layer, or one for all
    older = RENAMED.get(config.model_type, NOT_SCALING)
    names = {name: main[key] for key, name in zip(NOT_SCALING, older, strict=True) if key in main}
    scaling = {key: value for key, value in main.items() if key not in NOT_SCALING}
    names["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if scaling.get("rope_type") == "longrope" and ORIGINAL_LENGTH in scaling:
        names[ORIGINAL_LENGTH] = scaling[ORIGINAL_LENGTH]  # read there alone
        if config.model_type == "phi3" and scaling.keys() <= {"type", "rope_type", ORIGINAL_LENGTH, *LONGROPE}:
            names["rope_scaling"] = {"type": "longrope"} | {key: scaling[key] for key in LONGROPE}  # it takes no other key
    if SLIDING in rope and config.model_type in HAVE_LOCAL_BASE:
        names[LOCAL_BASE] = rope[SLIDING]["rope_theta"]
    return names


def _find_inexpressible(config: PretrainedConfig) -> Iterator[str]:
    """What of the settings transformers 4 has no name for, or refuses."""
    for key, value in CONSTANTS.get(config.model_type, {}).items():
        if getattr(config, key, value) != value:
            yield f"it takes {key} = {value} instead of {getattr(config, key)}"
    rope = getattr(config, "rope_parameters", None) or {}
    main, sliding = rope.get(FULL, rope), rope.get(SLIDING)
    kind = main.get("rope_type", "default")
    if sliding is not None and sliding.get("rope_type", "default") != "default":
        yield f'it does not scale rotary positions of sliding layers (rope_type "{sliding["rope_type"]}")'
    if sliding is not None and config.model_type not in HAVE_LOCAL_BASE and sliding.get("rope_theta") != main.get("rope_theta"):
        yield f"its sliding layers take rope_theta = {main.get('rope_theta')} instead of {sliding.get('rope_theta')}"
    if kind != "default" and config.model_type in NO_SCALING:
        yield f'its {config.model_type} refuses rope_type "{kind}"'
    if config.model_type == "deepseek_v2" and kind != "default" and main.get("mscale_all_dim"):
        yield f"its deepseek_v2 does not scale attention by mscale_all_dim = {main['mscale_all_dim']}"
    if config.model_type == "phi3" and (kind not in ("default", "longrope") or {"factor", "attention_factor"} & main.keys()):
        yield "its phi3 refuses scaling beside the factors of longrope"
    elif kind == "longrope" and "attention_factor" not in main and ORIGINAL_LENGTH in main:
        ratio = config.max_position_embeddings / main[ORIGINAL_LENGTH]
        if main.get("factor", ratio) != ratio:
            yield f"its longrope takes the factor {ratio:g} instead of {main['factor']}"
