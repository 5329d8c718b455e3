"""Optimizer groups and the learning-rate schedule."""

from __future__ import annotations

import re
import warnings

from torch import nn

from flame.components.titan import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig, init_optim_state
from flame.config import JobConfig
from flame.models.future_lm import FutureLM


def build_optimizer(config: JobConfig, model: FutureLM) -> OptimizersContainer:
    """AdamW over all trainable parameters, its state already allocated.

    Groups: matrices of the language model decay; its norms, biases and embeddings do not; predictor and estimator have their own
    learning rate (`future_predictor.lr_scale`) and decay.
    """
    optimizer = config.optimizer
    predictor = config.future_predictor
    groups = [
        _group(names, lr=optimizer.lr * scale, weight_decay=decay, config=config)
        for names, scale, decay in (
            (_select(model, "lm.", decayed=True), 1.0, optimizer.weight_decay),
            (_select(model, "lm.", decayed=False), 1.0, 0.0),
            (_select(model, "predictor.", decayed=True), predictor.lr_scale, predictor.weight_decay),
            (_select(model, "predictor.", decayed=False), predictor.lr_scale, 0.0),
            (_select(model, "estimator.", decayed=False), predictor.lr_scale, 0.0),
        )
        if names
    ]
    on_gpu = next(model.parameters()).is_cuda
    container = OptimizersContainer(
        OptimizersContainer.Config(param_groups=groups, implementation="fused" if on_gpu else "foreach"), model_parts=[model]
    )
    _allocate_state(container)
    return container


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


def _group(names: list[str], lr: float, weight_decay: float, config: JobConfig) -> ParamGroupConfig:
    return ParamGroupConfig(
        pattern="^(" + "|".join(map(re.escape, names)) + ")$",
        optimizer_name="AdamW",
        optimizer_kwargs={
            "lr": lr,
            "betas": (config.optimizer.beta1, config.optimizer.beta2),
            "eps": config.optimizer.eps,
            "weight_decay": weight_decay,
        },
    )


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
