"""Set-up of a run: its inputs, its folder, its model and its optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from flame.attention.backends import build_backend, check_attention, choose_attention
from flame.config.check import call_rules
from flame.config.schema import JobConfig
from flame.data.mixture import Mixture, open_held_out, open_mixture
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from flame.evaluation.evaluator import Evaluator
from flame.kernels.float8_head import find_float8_head_conflicts
from flame.models.causal_lm import (
    build_on_meta,
    find_decoder_layers,
    find_model_conflicts,
    initialize,
    load_model_config,
)
from flame.models.custom_model import import_custom_model
from flame.models.head_check import check_head, needs_head_check
from flame.models.leak_check import check_no_leak, needs_leak_check
from flame.models.memory import Share, check_memory, find_moment_bytes
from flame.models.parallelize import parallelize, place_buffers
from flame.models.wrapper import TrainingModel
from flame.objectives.base import FuturePass, Objective, Setup
from flame.objectives.cadence import Cadence
from flame.objectives.registry import choose_objective
from flame.objectives.schedule import WeightSchedule
from flame.objectives.step import get_objective
from flame.optimizers.build import Group, WarmUp, build_optimizer, build_schedule
from flame.runtime.lock import lock_run
from flame.runtime.torchtitan import LRSchedulersContainer, OptimizersContainer
from flame.trainer.run_folder import check_places
from flame.trainer.validation import Validator
from flame.weights.load import resize_vocabulary
from flame.weights.source import fetch_assets


class RunInputs(NamedTuple):
    """Tokenizer, model configuration and data, opened and checked against each other."""

    tokenizer: PreTrainedTokenizerFast
    model_config: PretrainedConfig
    mixture: Mixture


def open_inputs(config: JobConfig) -> RunInputs:
    """Open tokenizer, model configuration and data. It needs no process group, so mistakes are reported early.

    Raises:
        UserError: one of them is missing or wrong, or they do not fit together.
    """
    model, start = config.model, config.start.path
    if start and not (model.config and model.tokenizer_path):
        fetch_assets(start)
    tokenizer = load_tokenizer(config.tokenizer_source, model.trust_remote_code, config.get)
    import_custom_model(config.experimental.custom_model_path)
    model_config = load_model_config(config.model_source, model.trust_remote_code, config.model_key)
    resize_vocabulary(model_config, len(tokenizer), is_wanted=model.resize_embeddings and bool(start))
    exports = config.checkpoint.enable_checkpoint and config.checkpoint.export_hf
    faults = list(find_model_conflicts(model_config, len(tokenizer), config.training.context_len, exports=exports))
    if config.training.float8_head:
        faults += find_float8_head_conflicts(model_config.vocab_size, model_config.hidden_size)
    kind = choose_objective(config)
    if kind is not None:
        faults += call_rules(kind.load().find_model_conflicts, config.get(kind.options), model_config)
        for companion in kind.options.companions:
            faults += call_rules(config.get(companion).find_model_conflicts, model_config)
    if faults:
        raise UserError(*faults)
    return RunInputs(tokenizer, model_config, open_mixture(config, tokenizer))


def claim_folder(folder: Path) -> IO[str] | None:
    """Create the run's folder if necessary, and lock it. All ranks call it.

    Returns:
        the lock on rank 0, else None.

    Raises:
        UserError: the folder cannot be created or written to, something else is where the run writes, or another run uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'job.dump_folder = "{folder}" cannot be made ({error.strerror}): choose another') from error
    lock = None
    if dist.get_rank() == 0:
        check_places(folder)
        lock = lock_run(folder)
    dist.barrier()
    return lock


def build_modules(config: JobConfig, model_config: PretrainedConfig, device_type: str) -> TrainingModel:
    """Build the modules of a run on the meta device.

    Args:
        device_type: "cuda" or "cpu". Together with the dtype it decides the attention backend.

    Raises:
        UserError: the model cannot be built, or packed sequences are too short for its attention.
    """
    training = config.training
    attention = choose_attention(model_config, device_type, getattr(torch, training.mixed_precision_param))
    check_attention(attention, training.seq_len)
    lm = build_on_meta(model_config, device_type, attention)
    if config.experimental.freeze_lm_for_infonce:
        lm.requires_grad_(False)
    backend = build_backend(attention, model_config, training.context_len, training.compile)
    kind = choose_objective(config)
    objective: Objective | None = None
    if kind is not None:
        setup = Setup(
            options=config.get(kind.options),
            companions={each: config.get(each) for each in kind.options.companions},
            lm=lm,
            attention=attention,
            device_type=device_type,
            seed=training.seed,
            seq_len=training.seq_len,
            context_len=training.context_len,
            sequences_per_step=build_cadence(config).num_chosen,
        )
        with torch.device("meta"):
            objective = kind.load()(setup)
    return TrainingModel(lm, backend, objective)


def materialize(model: TrainingModel, device: torch.device, seed: int, *, cpu_offload: bool = False) -> None:
    """Give a parallelized model storage and initial weights that depend on the seed alone.

    The language model and the objective use different seeds, so the objective does not change the language model's weights.

    Args:
        cpu_offload: keep the parameters in host memory. Buffers go to the device, since FSDP does not move them for a pass.
    """
    home = torch.device("cpu") if cpu_offload else device
    initialize(model.lm, home, seed)
    objective = get_objective(model)
    if objective is not None:
        objective.initialize(lambda module, number: initialize(module, home, seed + number))
    if cpu_offload:
        place_buffers(model, device)


def build_model(config: JobConfig, model_config: PretrainedConfig, device: torch.device, mesh: DeviceMesh) -> TrainingModel:
    """Build the model, sharded over the mesh, with weights from `training.seed`. All ranks call it.

    Raises:
        UserError: the options do not suit the model, its logits are not those that the loss is taken from, or it belongs to an
            unknown family and the leak check fails.
    """
    model = build_modules(config, model_config, device.type)
    label = f'{config.model_key} = "{config.model_source}"'
    home = torch.device("cpu") if config.training.cpu_offload else device
    check_memory(model, model_config, label, home, find_share(config), find_moment_bytes(config.optimizer))
    objective = get_objective(model)
    parallelize(
        model,
        objective.list_layer_stacks() if objective is not None else [],
        objective.list_compiled() if objective is not None else [],
        config.training,
        config.activation_checkpoint.mode,
        mesh,
    )
    materialize(model, device, config.training.seed, cpu_offload=config.training.cpu_offload)
    if needs_head_check(model_config):
        check_head(model, device)
    if needs_leak_check(model_config):
        future = objective.find_future_pass() if objective is not None else None
        check_no_leak(model, device, future is not None, *(future or FuturePass()))
    return model


def find_share(config: JobConfig) -> Share:
    """How the weights are spread over the run's ranks."""
    return Share(
        shards=max(1, config.world_size // config.training.data_parallel_replicate_degree),
        neighbors=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def build_run_optimizer(config: JobConfig, model: TrainingModel) -> OptimizersContainer:
    """Optimizers of all trainable parameters: the language model's, then the objective's groups.

    Raises:
        UserError: there is no matrix for Muon.
    """
    decay, objective = config.optimizer.weight_decay, get_objective(model)
    groups = [Group("lm.", 1.0, decay)]
    for each in objective.list_parameter_groups() if objective is not None else ():
        own_decay = decay if each.weight_decay is None else each.weight_decay
        groups.append(Group(f"objective.{each.prefix}", each.lr_scale, own_decay))
    groups.append(Group("objective.", 1.0, decay))  # what no group of the objective names
    return build_optimizer(config.optimizer, config.training, model, find_decoder_layers(model.lm), groups)


def build_run_schedule(config: JobConfig, model: TrainingModel, optimizer: OptimizersContainer) -> LRSchedulersContainer:
    """Schedule of the learning rates, with the warm-ups of the objective's groups."""
    objective = get_objective(model)
    warm_ups: dict[str, WarmUp] = {}
    for group in objective.list_parameter_groups() if objective is not None else ():
        warm_ups.setdefault(f"objective.{group.prefix}", WarmUp(config.objective.start_step, group.warmup_steps))
    return build_schedule(config.lr_scheduler, config.schedule_steps, optimizer, warm_ups)


def build_weight_schedule(config: JobConfig) -> WeightSchedule:
    """Schedule of the objective's loss weight; always 0 without an objective."""
    kind, choice = choose_objective(config), config.objective
    weight = config.get(kind.options).loss_weight if kind is not None else 0.0
    return WeightSchedule(weight, choice.start_step, choice.warmup_steps, choice.decay_steps, config.schedule_steps)


def build_cadence(config: JobConfig) -> Cadence:
    """Which steps and packed sequences have the objective's loss."""
    kind = choose_objective(config)
    if kind is None:
        total = config.training.gradient_accumulation_steps * config.world_size
        return Cadence(num_sequences=total, num_chosen=total, ranks=config.world_size)
    options = config.get(kind.options)
    total, chosen = options.count_sequences(config)
    return Cadence(
        options.every,
        options.draw_step,
        config.training.seed,
        total,
        round(chosen),
        config.world_size,
        config.objective.start_step,
        options.keep_mean_weight,
    )


def open_validator(
    config: JobConfig, tokenizer: PreTrainedTokenizerFast, mixture: Mixture, device: torch.device
) -> Validator | None:
    """Open the held-out data, on all ranks; None if `validation.interval` is 0.

    Raises:
        UserError: the held-out documents are missing or too few.
    """
    if not config.validation.interval:
        return None
    weight = build_weight_schedule(config).loss_weight
    held_out = open_held_out(config, tokenizer, mixture)
    return Validator(config, held_out, weight, dist.get_rank(), dist.get_world_size(), device)


def open_evaluator(config: JobConfig, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Evaluator | None:
    """Open all that is evaluated, on all ranks; None if `evaluation.interval` is 0.

    Raises:
        UserError: a task or a held-out set cannot be read.
    """
    if not config.evaluation.interval:
        return None
    return Evaluator(config, tokenizer, dist.get_rank(), dist.get_world_size(), device)
