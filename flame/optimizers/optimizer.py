"""Optimizer groups and the learning-rate schedule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from flame.components.titan import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig, init_optim_state
from flame.config import JobConfig
from flame.errors import UserError
from flame.models.causal_lm import find_decoder_layers
from flame.models.future_lm import FutureLM
from flame.optimizers.muon import Muon, select_matrices
from flame.optimizers.rounded_adamw import RoundedAdamW


class _Optimizers(OptimizersContainer):
    """The library's container, with the optimizers in use here."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return {"AdamW": AdamW, "RoundedAdamW": RoundedAdamW, "Muon": Muon}[name]


def build_optimizer(config: JobConfig, model: FutureLM) -> OptimizersContainer:
    """Optimizers of all trainable parameters, their state already allocated.

    Groups: matrices of the language model decay; its norms, biases and embeddings do not; predictor and estimator have their own
    learning rate (`future_predictor.lr_scale`) and decay; heads of another objective are trained as the language model is. With
    "Muon" the matrices of the decoder layers are its, and all else AdamW's.

    Raises:
        UserError: there is no matrix for Muon.
    """
    optimizer, predictor = config.optimizer, config.future_predictor
    matrices = _select_for_muon(config, model)
    groups = [
        group
        for names, scale, decay in (
            (_select(model, "lm.", decayed=True), 1.0, optimizer.weight_decay),
            (_select(model, "lm.", decayed=False), 1.0, 0.0),
            (_select(model, "predictor.", decayed=True), predictor.lr_scale, predictor.weight_decay),
            (_select(model, "predictor.", decayed=False), predictor.lr_scale, 0.0),
            (_select(model, "estimator.", decayed=True), predictor.lr_scale, predictor.weight_decay),
            (_select(model, "estimator.", decayed=False), predictor.lr_scale, 0.0),
            (_select(model, "rival.", decayed=True), 1.0, optimizer.weight_decay),
            (_select(model, "rival.", decayed=False), 1.0, 0.0),
        )
        for group in (
            _group([name for name in names if name in matrices], "Muon", config, optimizer.lr * scale, decay),
            _group([name for name in names if name not in matrices], "AdamW", config, optimizer.lr * scale, decay),
        )
        if group is not None
    ]
    is_fused = config.training.cpu_offload or next(model.parameters()).is_cuda
    rounding = {"seed": config.training.seed}
    container = _Optimizers(
        OptimizersContainer.Config(
            param_groups=groups,
            implementation="fused" if is_fused else "foreach",
            optimizer_factory_kwargs_by_name={
                "RoundedAdamW": rounding,
                "Muon": rounding | {"state_dtype": getattr(torch, optimizer.state_dtype)},
            },
        ),
        model_parts=[model],
    )
    _allocate_state(container)
    return container


def _select_for_muon(config: JobConfig, model: FutureLM) -> set[str]:
    """Names of the parameters that Muon trains."""
    if config.optimizer.name != "Muon":
        return set()
    matrices = {id(parameter) for parameter in select_matrices(find_decoder_layers(model.lm))}
    chosen = {name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) in matrices}
    if not chosen:
        raise UserError('optimizer.name = "Muon", but the decoder layers have no matrices to train: set it to "AdamW"')
    return chosen


def _select(model: FutureLM, prefix: str, decayed: bool) -> list[str]:
    """Names of the trainable parameters below a prefix that do, or do not, decay."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and name.startswith(prefix)
        and (parameter.ndim > 1 and id(parameter) not in embeddings) == decayed
    ]


def _group(names: list[str], name: str, config: JobConfig, lr: float, weight_decay: float) -> ParamGroupConfig | None:
    """The parameters of these names, under the optimizer of that name; None for none."""
    if not names:
        return None
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "AdamW":
        settings |= {"betas": (config.optimizer.beta1, config.optimizer.beta2), "eps": config.optimizer.eps}
        name = "AdamW" if config.optimizer.state_dtype == "float32" else "RoundedAdamW"
    return ParamGroupConfig(pattern="^(" + "|".join(map(re.escape, names)) + ")$", optimizer_name=name, optimizer_kwargs=settings)


def _allocate_state(container: OptimizersContainer) -> None:
    """Create every moment now, so that a parameter without gradient so far (the predictor before `start_step`) is saved too.

    The library allocates with a step of zero gradient and zero rate, which counts as a step; the counter is set back.
    """
    for optimizer in container:
        init_optim_state(optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()


def build_schedule(config: JobConfig, optimizer: OptimizersContainer) -> LRSchedulersContainer:
    """Warm-up, plateau and decay over `training.steps`."""
    schedule = config.lr_scheduler
    return LRSchedulersContainer.Config(
        warmup_steps=schedule.warmup_steps,
        decay_ratio=schedule.decay_ratio,
        decay_type=schedule.decay_type,
        min_lr_factor=schedule.lr_min,
    ).build(optimizers=optimizer, training_steps=config.training.steps)


def seek_schedule(schedule: LRSchedulersContainer, step: int) -> None:
    """Put the schedule, and the rates of the optimizer, where they are after `step` optimizer steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To get the last learning rate")  # the library's own call
        schedule.load_state_dict({"last_epoch": step})
    for scheduler in schedule:
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
