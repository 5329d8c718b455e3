"""What a Hugging Face folder holds beside weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from flame.errors import UserError

Settings = dict[str, Any]


def write_hf_assets(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, generation: Settings, folder: Path
) -> None:
    """Write the model's configuration, with the tokenizer's special tokens, the tokenizer, and the settings for generation, which
    then stops where training ended documents.

    Args:
        generation: those that came with the first weights, of the same tokenizer. What they have in place of a special token that
            the tokenizer lacks stays, and so do several ends with the tokenizer's among them. Without any, none are written.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model_config = copy.deepcopy(model_config)
    for name, number in special.items():
        setattr(model_config, name, number)
    model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation:
        settings = generation | {name: number for name, number in special.items() if number is not None}
        ends = generation.get("eos_token_id")
        if isinstance(ends, list) and tokenizer.eos_token_id in ends:  # a chat model has several
            settings["eos_token_id"] = ends
        (folder / GENERATION_CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_generation_settings(folder: Path, label: str) -> Settings:
    """The settings for generation in a Hugging Face folder; empty if it has none.

    Args:
        label: what gave the folder, for messages.

    Raises:
        UserError: transformers would not take them.
    """
    try:
        settings = json.loads((folder / GENERATION_CONFIG_NAME).read_text(encoding="utf-8"))
        GenerationConfig.from_dict(settings)
    except FileNotFoundError:
        return {}
    except Exception as error:  # the library has no common type
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{label}: {GENERATION_CONFIG_NAME} cannot be used, as transformers would not ({reason}): mend or remove it"
        ) from error
    return settings
