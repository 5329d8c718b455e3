"""Loads a causal language model for a command: from a folder, a configuration or the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flame.attention.fla_families import register_fla_family
from flame.config.locations import find_checkpoint_in, is_checkpoint, looks_like_path
from flame.data.tokenizer import MODEL_FILE
from flame.errors import UserError, give_reason
from flame.models.custom_model import import_custom_model
from flame.runtime.hub import find_folder

WEIGHTS = ("*.safetensors", "*.bin")


def check_model(name: str, wanted: str = "a folder, a JSON configuration or a Hub name") -> None:
    """Check what a command names as its model, as far as that needs neither the Hub nor the weights.

    Args:
        wanted: what the command takes.

    Raises:
        UserError: it can only be a path, and there is nothing; or it is a run's folder or a checkpoint.
    """
    path, label = Path(name).expanduser(), f'MODEL = "{name}"'
    if not path.exists():
        if looks_like_path(name):
            raise UserError(f"{label}: no such file or folder here: give {wanted}")
        return
    export = "give what flame-convert-dcp-to-hf --checkpoint {} --out FOLDER writes"
    if is_checkpoint(path):
        raise UserError(f"{label} is a checkpoint: {export.format(name)}")
    if (path / "hf" / "config.json").is_file() and not (path / "config.json").exists():
        raise UserError(f'{label} is a run\'s folder: give "{path / "hf"}"')
    if checkpoint := find_checkpoint_in(name):
        raise UserError(f"{label} is a run's folder without an export: {export.format(checkpoint)}")


def check_export(name: str) -> None:
    """As `check_model`, for a command that reads a trained model.

    Raises:
        UserError: as `check_model`; or it is a file, or a folder without weights.
    """
    wanted = "the folder of an exported model, or a Hub name"
    check_model(name, wanted)
    path, label = Path(name).expanduser(), f'MODEL = "{name}"'
    if path.is_file():
        raise UserError(f"{label} is a file: give {wanted}")
    if path.is_dir() and not _has_weights(path):
        raise UserError(f"{label} holds no weights: give {wanted}")


def _has_weights(folder: Path) -> bool:
    return any(file for kind in WEIGHTS for file in folder.glob(kind))


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
    is_config = path.is_file() or (path.is_dir() and not _has_weights(path))
    source = _find_source(name)
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attention:
        settings["attn_implementation"] = attention
    with _explaining(name, trust_remote_code):
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        _register(source)
        if is_config or random_weights:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(config, **settings)
        else:
            lm = AutoModelForCausalLM.from_pretrained(source, **settings)
        return lm.to(place).eval()


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a model that `load_model` can load.

    Raises:
        UserError: it cannot be loaded.
    """
    check_model(name)
    source = _find_source(name)
    with _explaining(name, trust_remote_code):
        _register(source)
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def _find_source(name: str) -> str:
    """What transformers is to load.

    Raises:
        UserError: there is nothing of that name.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    find_folder(f'MODEL = "{name}"', name, [MODEL_FILE])  # fails at once, where transformers asks the Hub again and again
    return name


def _register(source: str) -> None:
    """Make transformers know the family of a configuration."""
    written, _ = PretrainedConfig.get_config_dict(source)
    if "auto_map" not in written:
        register_fla_family(written.get("model_type"))


@contextmanager
def _explaining(name: str, trust_remote_code: bool) -> Iterator[None]:
    """Raise UserError, one line on the model, for any error inside the block."""
    try:
        yield
    except Exception as error:  # a missing file, no network, a bad value, code of the model's own: no common type
        reason = give_reason(error)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = "it comes with Python code of its own: give --trust_remote_code to run it, if you trust it"
        elif "does not recognize this architecture" in reason:  # the library advises to upgrade it
            reason = "neither transformers nor flash-linear-attention has this model_type; --custom_model_path can bring one"
        raise UserError(f'MODEL = "{name}" cannot be loaded: {reason}') from error
