"""Where a run's model configuration, tokenizer and first weights come from."""

from __future__ import annotations

import os
from pathlib import Path

from flame.config import JobConfig

CHECKPOINT_MARKS = (".metadata", "trainer.json")


def find_model_source(config: JobConfig) -> str:
    """What `model.config` names or, where that is empty, what comes with the weights; empty if there are none either."""
    return config.model.config or _find_beside_weights(config)


def find_tokenizer_source(config: JobConfig) -> str:
    """What `model.tokenizer_path` names or, where that is empty, what comes with the weights; empty if there are none either."""
    return config.model.tokenizer_path or _find_beside_weights(config)


def name_model_option(config: JobConfig) -> str:
    """The key that `find_model_source` goes by."""
    return "model.config" if config.model.config else "checkpoint.initial_load_path"


def needs_assets(config: JobConfig) -> bool:
    """Whether the configuration or the tokenizer is what comes with the weights."""
    return bool(config.checkpoint.initial_load_path) and not (config.model.config and config.model.tokenizer_path)


def _find_beside_weights(config: JobConfig) -> str:
    path = config.checkpoint.initial_load_path
    return os.path.join(path, "hf") if path and is_checkpoint(Path(os.path.expanduser(path))) else path


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a `step-N` folder of this trainer, complete or not, and no Hugging Face folder."""
    return any(os.path.exists(folder / name) for name in CHECKPOINT_MARKS)


def looks_like_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; all else can only be meant as a path."""
    return name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1
