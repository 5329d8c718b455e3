"""What a Hugging Face folder holds beside weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from flame.errors import UserError

Settings = dict[str, Any]


def write_hf_assets(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, generation: Settings, folder: Path
) -> None:
    """Write the model's configuration, with the tokenizer's special tokens, and the tokenizer: generation then stops where
    training ended documents.

    Args:
        generation: the settings for generation that came with the first weights; without any, no file of them is written.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model_config = copy.deepcopy(model_config)
    for name, number in special.items():
        setattr(model_config, name, number)
    model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation:
        settings = generation | {name: number for name, number in special.items() if number is not None}
        stops = generation.get("eos_token_id")
        if isinstance(stops, list) and tokenizer.eos_token_id in stops:  # a chat model has several
            settings["eos_token_id"] = stops
        (folder / GENERATION_CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n")


def read_generation_settings(folder: Path | None) -> Settings:
    """The settings for generation in a Hugging Face folder; empty if it has none.

    Raises:
        UserError: they cannot be read.
    """
    path = folder and folder / GENERATION_CONFIG_NAME
    if not path or not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f'"{path}" cannot be read ({reason}): fetch it again, or remove it') from error
    if not isinstance(settings, dict):
        raise UserError(f'"{path}" holds no settings by name: fetch it again, or remove it')
    return settings
