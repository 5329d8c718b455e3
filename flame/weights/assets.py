"""The files of a Hugging Face folder other than weights: configuration, tokenizer, generation settings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from flame.errors import UserError
from flame.weights.older_names import adapt_tokenizer, write_config

Settings = dict[str, Any]


def write_hf_assets(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, generation: Settings, folder: Path
) -> None:
    """Write the model's configuration, the tokenizer, and the generation settings.

    Configuration and settings get the tokenizer's special tokens. So generation stops at the token that ended documents in
    training.

    Args:
        generation: settings that came with the initial weights, of the same tokenizer; if empty, none are written. They keep
            their value of a special token that the tokenizer lacks, and a list of end tokens that contains the tokenizer's.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model_config = copy.deepcopy(model_config)
    for name, number in special.items():
        setattr(model_config, name, _keep_list(getattr(model_config, name, None), number))
    write_config(model_config, folder)
    tokenizer.save_pretrained(folder)
    adapt_tokenizer(folder)
    if generation:
        known = {name: number for name, number in special.items() if number is not None}
        settings = generation | {name: _keep_list(generation.get(name), number) for name, number in known.items()}
        (folder / GENERATION_CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _keep_list(before: Any, number: int | None) -> Any:
    """The tokenizer's token, or the list of several that has it: chat models have several end tokens."""
    return before if isinstance(before, list) and number in before else number


def read_generation_settings(folder: Path, label: str) -> Settings:
    """The generation settings in a Hugging Face folder; empty if it has none.

    Args:
        label: the option and its value that named the folder, for messages.

    Raises:
        UserError: transformers cannot load them.
    """
    try:
        settings = json.loads((folder / GENERATION_CONFIG_NAME).read_text(encoding="utf-8"))
        GenerationConfig.from_dict(settings)
    except FileNotFoundError:
        return {}
    except Exception as error:  # transformers has no common error type
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{label}: {GENERATION_CONFIG_NAME} cannot be used, as transformers would not ({reason}): mend or remove it"
        ) from error
    return settings
