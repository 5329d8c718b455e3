"""Export of a checkpoint as an ordinary Hugging Face folder.

    config.json, generation_config.json     with the tokenizer's special tokens; settings of the initial weights, if any
    model*.safetensors, and their index     the language model, as `save_pretrained` writes it
    tokenizer.json, ...
    NAME_modules.safetensors                the objective's modules, which Hugging Face does not know
    README.md                               the model card

It is written aside (`flame.weights.replacing`), checked, and renamed. Writing needs memory for one decoder layer, the check
for one model.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from flame.attention.fla_families import register_fla_family
from flame.checkpoints.manager import HF_FOLDER
from flame.checkpoints.resume import check_format
from flame.config.addresses import find_target_fault
from flame.data.tokenizer import TOKENIZER_FILE, find_misread
from flame.errors import UserError
from flame.weights.card import CARD_FILE, write_card
from flame.weights.check import check_export
from flame.weights.files import MAX_SHARD_BYTES, PRODUCER, plan_layout, stream_weights, write_weights
from flame.weights.older_names import adapt_tokenizer, write_config
from flame.weights.replacing import list_parts, written_aside
from flame.weights.source import MODULES_SUFFIX, TASK_KEY
from flame.weights.tensors import ModelTensors
from flame.weights.upload import check_place, upload

logger = logging.getLogger("flame")

LM_PREFIX = "lm."
OBJECTIVE_PREFIX = "objective."


def convert(
    checkpoint: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model of a checkpoint, its tokenizer, the objective's modules and its card.

    Args:
        checkpoint: a committed `step-N/` folder.
        out: folder to write. An earlier export in it is replaced when the new one is complete.
        dtype: of the language model's weights; "float32" keeps the trained weights bit by bit.
        check: before renaming, load the result and compare its logits with the checkpoint's.
        max_shard_bytes: largest size of one file of weights.

    Raises:
        UserError: `checkpoint` is not a complete checkpoint, `out` holds something else, or `out` cannot be written.
        ExportMismatch: the result differs from the checkpoint. `out` is unchanged.
    """
    tensors = ModelTensors(checkpoint)
    if tensors.state["config"]:  # a converted model has none, and no objective either
        check_format(tensors.state, checkpoint)
    target = getattr(torch, dtype)
    with written_aside(out) as folder:
        for name in list_parts(checkpoint / HF_FOLDER):  # tokenizer, generation; what else there is, the next export would reject
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / HF_FOLDER / name, folder / name)
        adapt_tokenizer(folder)
        config = _read_config(checkpoint, tensors)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=target)
        _check_names({name: tensor.shape for name, tensor in model.state_dict().items()}, tensors)
        layout = plan_layout(model, target)
        weights = stream_weights(model, layout, lambda names: _load(tensors, names), target)
        write_weights(folder, layout, weights, max_shard_bytes)
        model.config.dtype = dtype
        model.config.architectures = [type(model).__name__]
        if otherwise := write_config(model.config, folder):
            logger.warning(
                "export %s: transformers 4 does not compute the same: %s; load it with transformers 5", out, "; ".join(otherwise)
            )
        generation = getattr(model, "generation_config", None)  # None for models that cannot generate
        if generation is not None and not (folder / GENERATION_CONFIG_NAME).exists():  # keep that of the initial weights
            generation.save_pretrained(folder)
        _write_objective(tensors, folder)
        _check_tokenizer(out, folder)
        if tensors.state["config"]:  # a converted model has no run to describe
            write_card(folder / CARD_FILE, tensors.state, checkpoint, model.num_parameters(), dtype)
        if check:
            logger.info("export %s: %s", out, check_export(folder, config, tensors, _to_checkpoint, target))


def convert_and_upload(
    checkpoint: Path, address: str, dtype: Literal["float32", "bfloat16"] = "float32", *, check: bool = True
) -> None:
    """As `convert`, to an address. The folder is first written among the temporary files of this machine.

    Raises:
        UserError, ExportMismatch: as `convert`, or the upload fails.
    """
    if fault := find_target_fault(address):
        raise UserError(f'--out "{address}": {fault}')
    check_place(f'--out "{address}"', address)
    with tempfile.TemporaryDirectory(prefix="flame-export-") as place:
        convert(checkpoint, Path(place) / "hf", dtype, check=check)
        upload(f'--out "{address}"', Path(place) / "hf", address)


def _check_tokenizer(out: Path, folder: Path) -> None:
    """Warn if transformers reads another tokenizer from the export than the run had."""
    if not (folder / TOKENIZER_FILE).exists():
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers has no common error type
        logger.warning("export %s: AutoTokenizer cannot load its tokenizer (%s)", out, " ".join(str(error).split())[:300])
        return
    if fault := find_misread(str(folder), tokenizer):
        logger.warning("export %s: of its tokenizer, %s: load it with PreTrainedTokenizerFast.from_pretrained", out, fault)


def name_objective_file(objective: str) -> str:
    """Name of the file with an objective's modules, beside an exported model."""
    return objective + MODULES_SUFFIX


def _write_objective(tensors: ModelTensors, folder: Path) -> None:
    """Write the modules that the run's objective exports (`Objective.list_exported`)."""
    objective = tensors.state.get("objective")
    if not objective:
        return
    prefixes = tuple(OBJECTIVE_PREFIX + prefix for prefix in objective["exported"])
    kept = tensors.load(name for name in tensors.names if name.startswith(prefixes))
    if kept:
        named = {name.removeprefix(OBJECTIVE_PREFIX): tensor for name, tensor in kept.items()}
        about = {TASK_KEY: json.dumps(objective["task"])} if "task" in objective else {}
        save_file(named, folder / name_objective_file(objective["name"]), metadata={"format": "pt"} | PRODUCER | about)


def _to_checkpoint(name: str) -> str:
    return LM_PREFIX + name


def _load(tensors: ModelTensors, names: Iterable[str]) -> dict[str, torch.Tensor]:
    loaded = tensors.load(_to_checkpoint(name) for name in names)
    return {name.removeprefix(LM_PREFIX): tensor for name, tensor in loaded.items()}


def _read_config(checkpoint: Path, tensors: ModelTensors) -> PretrainedConfig:
    folder = checkpoint / HF_FOLDER
    try:
        settings, _ = PretrainedConfig.get_config_dict(folder)
        register_fla_family(settings.get("model_type"))
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a missing file, an unknown model_type: transformers has no common error type
        package = tensors.state["config"].get("experimental", {}).get("custom_model_path")
        reason = " ".join(str(error).split())[:300]
        if package:
            reason = f'its architecture comes from experimental.custom_model_path = "{package}": give --custom_model_path'
        raise UserError(
            f'checkpoint "{checkpoint}": {HF_FOLDER}/config.json cannot be loaded by transformers: {reason}'
        ) from error


def _check_names(shapes: dict[str, torch.Size], tensors: ModelTensors) -> None:
    """Check that the checkpoint has exactly the tensors that its model configuration defines."""
    stored = {name: tensors.shape(name) for name in tensors.names if name.startswith(LM_PREFIX)}
    wanted = {_to_checkpoint(name): shape for name, shape in shapes.items()}
    wrong = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if wrong:
        raise UserError(
            f'checkpoint "{tensors.checkpoint}": {HF_FOLDER}/config.json is of another model than the weights: {wrong[0]} is '
            f"{_show(stored.get(wrong[0]))} in the checkpoint and {_show(wanted.get(wrong[0]))} in the model"
        )


def _show(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
