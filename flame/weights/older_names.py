"""Writes a model's configuration and tokenizer so that transformers 4 reads them as transformers 5 does.

transformers 4.57 ignores names that it does not know, and takes its defaults: a rotary base of 10,000, no scaling, 128 experts.
So the older names stand beside the new ones. transformers 5 reads both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer_config.json"
FULL, SLIDING = "full_attention", "sliding_attention"

NOT_SCALING = ("rope_theta", "partial_rotary_factor")
"""Keys of `rope_parameters` that were settings of their own."""
OF_THIS_MACHINE = ("is_local", "local_files_only")
"""Keys of a tokenizer's settings that say where it was loaded from."""


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """Write config.json, with the older names of rotary settings and experts beside the new ones."""
    config.save_pretrained(folder)
    _update(folder / CONFIG_FILE, _list_older_names(config))


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


def _list_older_names(config: PretrainedConfig) -> dict[str, Any]:
    names = {older: getattr(config, newer) for older, newer in config.attribute_map.items() if older.startswith("num_experts")}
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return names
    main = rope.get(FULL, rope)  # settings by type of layer, or one for all
    names |= {key: main[key] for key in NOT_SCALING if key in main}
    scaling = {key: value for key, value in main.items() if key not in NOT_SCALING}
    names["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if SLIDING in rope:
        names["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
    return names
