"""What a Hugging Face folder holds beside weights."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerFast


def write_hf_assets(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model's configuration, with the tokenizer's special tokens, and the tokenizer: generation then stops where
    training ended documents."""
    model_config = copy.deepcopy(model_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model_config, name, getattr(tokenizer, name))
    model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
