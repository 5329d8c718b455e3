"""Loads a causal language model for a command: from a folder, a configuration or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flame.attention.fla_families import register_fla_family
from flame.config.locations import find_checkpoint_in, is_checkpoint, looks_like_path
from flame.errors import UserError
from flame.models.custom_model import import_custom_model

LONGEST_REASON = 300
WEIGHTS = ("*.safetensors", "*.bin")


def check_model(name: str) -> None:
    """Check what a command names as its model, as far as that needs neither the Hub nor the weights.

    Raises:
        UserError: it can only be a path, and there is nothing; or it is a run's folder or a checkpoint.
    """
    path, label = Path(name).expanduser(), f'MODEL = "{name}"'
    if not path.exists():
        if looks_like_path(name):
            raise UserError(f"{label}: no such file or folder here: give a folder, a JSON configuration or a Hub name")
        return
    export = "give what flame-convert-dcp-to-hf --checkpoint {} --out FOLDER writes"
    if is_checkpoint(path):
        raise UserError(f"{label} is a checkpoint: {export.format(name)}")
    if (path / "hf" / "config.json").is_file() and not (path / "config.json").exists():
        raise UserError(f'{label} is a run\'s folder: give "{path / "hf"}"')
    if checkpoint := find_checkpoint_in(name):
        raise UserError(f"{label} is a run's folder without an export: {export.format(checkpoint)}")


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    custom_model_path: str = "",
) -> PreTrainedModel:
    """Load the model in evaluation mode.

    Args:
        name: Hub name, folder, or a configuration (JSON, or a folder without weights).
        device: None is a GPU if there is one.
        attention: transformers' `attn_implementation`; None is the model's own.
        random_weights: read the configuration alone, and draw weights, as for a configuration without any.

    Raises:
        UserError: it cannot be loaded.
    """
    check_model(name)
    import_custom_model(custom_model_path)
    path = Path(name).expanduser()
    is_config = path.is_file() or (path.is_dir() and not any(file for kind in WEIGHTS for file in path.glob(kind)))
    source = str(path) if path.exists() else name
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attention:
        settings["attn_implementation"] = attention
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        written, _ = PretrainedConfig.get_config_dict(source)
        if "auto_map" not in written:
            register_fla_family(written.get("model_type"))
        if is_config or random_weights:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(config, **settings)
        else:
            lm = AutoModelForCausalLM.from_pretrained(source, **settings)
        return lm.to(place).eval()
    except Exception as error:  # a missing file, no network, a bad value, code of the model's own: no common type
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = "it comes with Python code of its own: give --trust_remote_code to run it, if you trust it"
        elif "does not recognize this architecture" in reason:  # the library advises to upgrade it
            reason = "neither transformers nor flash-linear-attention has this model_type; --custom_model_path can bring one"
        raise UserError(f'MODEL = "{name}" cannot be loaded: {reason}') from error
