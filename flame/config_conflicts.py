"""What must hold between a run's options, and between them and the machine."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from flame.config import (
    BYTES_TOKENIZER,
    Checkpoint,
    JobConfig,
    Training,
)
from flame.data_conflicts import find_data_conflicts
from flame.model_source import find_model_source, find_tokenizer_source, is_checkpoint, looks_like_path, name_model_option
from flame.objective_conflicts import find_objective_conflicts

TOKENIZER_FILES = ("token*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
FLOAT8_SIZE_STEP = 16
"""What each size of an 8-bit matrix product must be a multiple of."""


def find_conflicts(config: JobConfig, world_size: int) -> Iterator[str]:
    """Yield one line for each combination of options, or option and machine, that cannot run.

    Args:
        config: options whose types and ranges are already checked.
        world_size: processes of the run over all nodes.
    """
    yield from _find_folder_conflicts(config)
    yield from _find_model_conflicts(config)
    yield from find_data_conflicts(config, world_size)
    yield from find_objective_conflicts(config)
    yield from _find_export_conflicts(config.checkpoint)
    yield from _find_float8_conflicts(config)
    yield from _find_parallel_conflicts(config.training, world_size)


def _find_folder_conflicts(config: JobConfig) -> Iterator[str]:
    folder, checkpoints = config.job.dump_folder, os.path.join(config.job.dump_folder, config.checkpoint.folder)
    first = os.path.normpath(config.checkpoint.folder).split(os.sep)[0]
    if os.path.isabs(config.checkpoint.folder) or first == os.pardir:
        yield (
            f'checkpoint.folder = "{config.checkpoint.folder}": allowed is a path relative to job.dump_folder and inside it, '
            'such as "checkpoint"; for another disk, make that a link to it'
        )
        return
    if first == "hf" or first.startswith("hf-step-"):
        yield (
            f'checkpoint.folder = "{config.checkpoint.folder}" is where the run exports its model, which replaces what is there: '
            "choose another name"
        )
        return
    for key, value, path in (("job.dump_folder", folder, folder), ("checkpoint.folder", config.checkpoint.folder, checkpoints)):
        if os.path.lexists(path) and not os.path.isdir(path):
            yield f'{key} = "{value}": "{path}" is not a folder; choose another name'
            return
        try:
            os.stat(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:  # too long, inside a file, not to be entered, with a null character
            yield f'{key} = "{value}" cannot be a folder ({getattr(error, "strerror", None) or error}); choose another name'
            return


def _find_export_conflicts(checkpoint: Checkpoint) -> Iterator[str]:
    interval = checkpoint.export_interval
    if checkpoint.export_dtype != "float32" and not (checkpoint.enable_checkpoint and checkpoint.export_hf):
        key = "export_hf" if checkpoint.enable_checkpoint else "enable_checkpoint"
        yield f'checkpoint.export_dtype = "{checkpoint.export_dtype}" has no effect with checkpoint.{key} = false: leave it out'
    if not interval:
        return
    for key in ("enable_checkpoint", "export_hf"):
        if not getattr(checkpoint, key):
            yield (
                f"checkpoint.export_interval = {interval} exports from checkpoints, but checkpoint.{key} = false: "
                "set that to true, or this to 0"
            )
    if interval % checkpoint.interval:
        yield (
            f"checkpoint.export_interval = {interval} is no multiple of checkpoint.interval = {checkpoint.interval}: models are "
            "exported from checkpoints"
        )


def _find_model_conflicts(config: JobConfig) -> Iterator[str]:
    model, weights = config.model, config.checkpoint.initial_load_path
    if looks_like_path(weights) and not os.path.isdir(os.path.expanduser(weights)):
        yield f'checkpoint.initial_load_path = "{weights}": no such folder'
        return
    if newest := _find_checkpoint_in(weights):
        yield f'checkpoint.initial_load_path = "{weights}" is a folder of checkpoints: name one of them, such as "{newest}"'
        return
    if model.resize_embeddings and not weights:
        yield "model.resize_embeddings = true without checkpoint.initial_load_path: name weights whose vocabulary is to grow"
    if not find_model_source(config):
        yield "model.config is not set: give a JSON file, a folder with config.json, or a Hub name (examples: configs/models/)"
    elif not model.config and _lacks(weights, find_model_source(config), ("config.json",)):
        yield f'checkpoint.initial_load_path = "{weights}" comes without a config.json: name the model\'s in model.config'
    elif os.path.exists(os.path.expanduser(find_model_source(config))):
        yield from _find_json_faults(find_model_source(config), name_model_option(config))
    elif looks_like_path(model.config):
        yield f'model.config = "{model.config}": no such file or folder'
    if not find_tokenizer_source(config):
        yield f'model.tokenizer_path is not set: give a folder, a Hub name, or "{BYTES_TOKENIZER}" for the built-in tokenizer'
    elif not model.tokenizer_path and _lacks(weights, find_tokenizer_source(config), TOKENIZER_FILES):
        yield f'checkpoint.initial_load_path = "{weights}" comes without a tokenizer: name the model\'s in model.tokenizer_path'
    elif looks_like_path(model.tokenizer_path) and not os.path.isdir(os.path.expanduser(model.tokenizer_path)):
        yield f'model.tokenizer_path = "{model.tokenizer_path}": no such folder'


def _find_checkpoint_in(weights: str) -> str:
    """The newest checkpoint in a folder that is none itself, but a run's or its checkpoints'."""
    folder = os.path.expanduser(weights)
    if not os.path.isdir(folder) or is_checkpoint(Path(folder)) or os.path.exists(os.path.join(folder, "config.json")):
        return ""
    marks = [
        mark for depth in ((), ("*",)) for mark in glob.glob(os.path.join(glob.escape(folder), *depth, "step-*", "trainer.json"))
    ]
    steps = (os.path.dirname(mark) for mark in marks)
    found = {int(match[1]): step for step in steps if (match := re.search(r"step-(\d+)$", step))}
    return found[max(found)] if found else ""


def _lacks(weights: str, beside: str, patterns: tuple[str, ...]) -> bool:
    """Whether the weights are a folder here, and what comes with them holds no file of these names."""
    is_local = os.path.isdir(os.path.expanduser(weights))
    return is_local and not any(glob.glob(os.path.join(glob.escape(os.path.expanduser(beside)), name)) for name in patterns)


def _find_json_faults(config: str, option: str) -> Iterator[str]:
    path = Path(os.path.expanduser(config))
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f'{option} = "{config}": {path.name} cannot be read as JSON ({error})'
        return
    if not isinstance(content, dict) or "model_type" not in content:
        yield f'{option} = "{config}": {path.name} has no "model_type"; it must be a Hugging Face model configuration'


def _find_float8_conflicts(config: JobConfig) -> Iterator[str]:
    training = config.training
    if not training.float8:
        return
    if config.future_encoder.precision == "fp8":
        yield (
            'future_encoder.precision = "fp8" beside training.float8 = true, which has both passes of the trained network (not '
            'one of another, with target = "random" or "ema") in 8-bit floats: set the one to "bf16" or the other to false'
        )
    if training.mixed_precision_param != "bfloat16":
        yield (
            f'training.float8 = true beside training.mixed_precision_param = "{training.mixed_precision_param}": set the one to '
            'false or the other to "bfloat16"'
        )
    if training.seq_len % FLOAT8_SIZE_STEP:
        yield (
            f"training.float8 = true: training.seq_len = {training.seq_len} is not a multiple of {FLOAT8_SIZE_STEP}, which the "
            "weights' gradients need: change it, or set float8 to false"
        )


def _find_parallel_conflicts(training: Training, world_size: int) -> Iterator[str]:
    replicate, shard = training.data_parallel_replicate_degree, training.data_parallel_shard_degree
    if shard == 0:
        yield "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more"
    elif shard > 0 and replicate * shard != world_size:
        yield (
            f"training.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard} is not the number of "
            f"ranks, {world_size}: set shard to -1 to take all remaining ranks"
        )
    elif shard < 0 and world_size % replicate:
        yield f"training.data_parallel_replicate_degree = {replicate} does not divide the number of ranks, {world_size}"
