"""Converts a Hugging Face model to a checkpoint that a run can start from, with one tensor in memory at a time."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from flame.checkpoints.files import commit
from flame.checkpoints.manager import HF_FOLDER
from flame.checkpoints.storage import TensorWriter, is_disk_full
from flame.errors import UserError
from flame.models.causal_lm import load_model_config
from flame.weights.assets import read_generation_settings
from flame.weights.load import check_config
from flame.weights.plan import Plan, Reading, plan_weights
from flame.weights.source import ASSETS, CONFIG_FILE, MODEL_PREFIX, WeightSource, find_weights


def convert_to_checkpoint(model: str, out: Path) -> None:
    """Write the weights, configuration and tokenizer of a Hugging Face model as a committed checkpoint.

    Args:
        model: folder or Hub name.
        out: the `step-N/` folder to create; it must not exist.

    Raises:
        UserError: the model cannot be read or is not supported, or `out` exists, is not named step-N, or cannot be written.
    """
    if out.exists() or not (out.name.startswith("step-") and out.name.removeprefix("step-").isdecimal()):
        raise UserError(f'--out "{out}" must be a new folder with the name step-N, such as step-0: choose another')
    source = find_weights(model, "--model")
    if source.is_native or not (source.assets / CONFIG_FILE).exists():
        raise UserError(f"{source.label} is not a Hugging Face model with a {CONFIG_FILE}: give one")
    config = load_model_config(str(source.assets), option="--model")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    check_config(source, lm.config)
    read_generation_settings(source.assets, source.label)
    readings = _list_readings(lm, plan_weights(lm, source, own_config=True))

    unfinished = out.with_name(f"{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    state = {"step": int(out.name.removeprefix("step-")), "config": {}, "model_config": lm.config.to_dict(), "world_size": 1}
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(unfinished, source, readings)
        _copy_assets(source.assets, unfinished / HF_FOLDER)
        commit(unfinished, out, state)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise _explain(error, out) from error


def _explain(error: OSError | CheckpointException, out: Path) -> BaseException:
    """The user's mistake that caused an error, or the error itself."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    if mistakes := [cause for cause in causes if isinstance(cause, UserError)]:
        return mistakes[0]
    if is_disk_full(error):
        return UserError(f'--out "{out}": its disk is full: free space and convert again')
    if faults := [cause for cause in causes if isinstance(cause, OSError)]:
        return UserError(f'--out "{out}" cannot be written ({faults[0]}): choose another folder')
    return error


def _list_readings(lm: PreTrainedModel, plan: Plan) -> dict[str, Reading]:
    """Readings by name in the model. A tied tensor has all of its names, as in the checkpoints of a run."""
    live = lm.state_dict(keep_vars=True)
    by_tensor = {id(live[name]): reading for name, reading in plan.readings.items()}
    return {name: by_tensor[id(tensor)] for name, tensor in live.items() if id(tensor) in by_tensor}


def _write_tensors(folder: Path, source: WeightSource, readings: dict[str, Reading]) -> None:
    stand_ins = {}
    for name, reading in readings.items():
        dtypes = [getattr(torch, source.entries[key].dtype) for key in reading.keys]
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        stand_ins[MODEL_PREFIX + name] = torch.empty(reading.shape, dtype=dtype, device="meta")
    with tqdm(total=len(readings), unit="tensor", desc=folder.stem) as progress, warnings.catch_warnings():

        def read(key: str) -> Tensor:
            progress.update()
            reading = readings[key.removeprefix(MODEL_PREFIX)]
            return reading.read(0, reading.shape[0] if reading.shape else 1).to(stand_ins[key].dtype)

        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        writer = TensorWriter(folder, per_thread_copy_ahead=0)  # copying ahead is for tensors on a GPU
        dcp.save(stand_ins, storage_writer=writer, planner=_LazyPlanner(read), no_dist=True)


class _LazyPlanner(DefaultSavePlanner):
    """Plans with meta tensors. Reads each value just before it is written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._read(index.fqn)


def _copy_assets(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in ASSETS):
            shutil.copyfile(path, folder / path.name)
