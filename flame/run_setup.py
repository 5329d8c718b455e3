"""What a run is set up from: what it reads before there are processes, its folder, and its model on them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from flame.components.distributed import check_same_on_all_ranks
from flame.components.run_lock import lock_run
from flame.config import JobConfig
from flame.data.mixture import Mixture, open_held_out, open_mixture
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from flame.model_source import find_model_source, find_tokenizer_source, name_model_option, needs_assets
from flame.models.causal_lm import check_fits_run, load_model_config
from flame.models.custom_model import import_custom_model
from flame.models.future_lm import FutureLM, build_future_lm
from flame.models.leak_check import check_no_leak, needs_leak_check
from flame.models.parallelize import materialize, parallelize
from flame.validation import Validator
from flame.weights.hf_weights import resize_vocabulary
from flame.weights.weight_source import fetch_assets


class RunInputs(NamedTuple):
    """What the options name, opened and found to fit together."""

    tokenizer: PreTrainedTokenizerFast
    model_config: PretrainedConfig
    mixture: Mixture


def open_inputs(config: JobConfig) -> RunInputs:
    """Open tokenizer, model configuration and data. Needs no other process, so mistakes in them show early.

    Raises:
        UserError: one of them is missing or wrong, or they do not fit together.
    """
    if needs_assets(config):
        fetch_assets(config.checkpoint.initial_load_path)
    tokenizer = load_tokenizer(find_tokenizer_source(config), config.model.trust_remote_code, config.generators)
    import_custom_model(config.experimental.custom_model_path)
    model_config = load_model_config(find_model_source(config), config.model.trust_remote_code, name_model_option(config))
    resize_vocabulary(model_config, len(tokenizer), config)
    check_fits_run(model_config, len(tokenizer), config)
    return RunInputs(tokenizer, model_config, open_mixture(config, tokenizer))


def claim_folder(folder: Path) -> IO[str] | None:
    """Make the run's folder, if it is not there, and take it for this run. All ranks call it; rank 0 gets the lock.

    Raises:
        UserError: it cannot be made, or another run is in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'job.dump_folder = "{folder}" cannot be made ({error.strerror}): choose another') from error
    lock = lock_run(folder) if dist.get_rank() == 0 else None
    dist.barrier()
    return lock


def check_same_data(mixture: Mixture) -> None:
    """Make sure that all ranks have the same documents before them. All ranks call it.

    Raises:
        UserError: the number of documents in a source differs.
    """
    for source, count in mixture.count_units().items():
        check_same_on_all_ranks(f'number of documents in source "{source}"', count)


def build_model(config: JobConfig, model_config: PretrainedConfig, device: torch.device, mesh: DeviceMesh) -> FutureLM:
    """Build the model, sharded over the mesh, with weights from `training.seed`. All ranks call it.

    Raises:
        UserError: the options do not suit the model, or it is of an unknown family and leaks.
    """
    model = build_future_lm(config, model_config, device.type)
    parallelize(model, config, mesh)
    materialize(model, device, config.training.seed, cpu_offload=config.training.cpu_offload)
    if needs_leak_check(model_config):
        check_no_leak(model, device, config.uses_future, config.future_encoder.future_k)
    return model


def open_validator(
    config: JobConfig, tokenizer: PreTrainedTokenizerFast, mixture: Mixture, device: torch.device
) -> Validator | None:
    """What the run is validated with, on all ranks; None if it is not.

    Raises:
        UserError: the held-out documents are missing or too few.
    """
    if not config.validation.interval:
        return None
    return Validator(config, open_held_out(config, tokenizer, mixture), dist.get_rank(), dist.get_world_size(), device)
