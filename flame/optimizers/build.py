"""Optimizer groups and the learning-rate schedule."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from flame.config.training import LRScheduler, Training
from flame.config.training import Optimizer as OptimizerOptions
from flame.errors import UserError
from flame.optimizers.muon import Muon, select_matrices
from flame.optimizers.rounded_adamw import RoundedAdamW
from flame.runtime.torchtitan import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig, init_optim_state

EPSILON = 1e-8
"""Added to the root of AdamW's second moment."""


VECTORS = frozenset({"A_log", "lower_bounds", "r_k"})
"""Parameters with two dimensions that are no matrices: decay rates (Mamba), lower bounds of gates by layer (HGRN-2), the bonus of
the current token by head (RWKV-7)."""


class _Optimizers(OptimizersContainer):
    """torchtitan's container, with the optimizers that are used here."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return {"AdamW": AdamW, "RoundedAdamW": RoundedAdamW, "Muon": Muon}[name]


class Group(NamedTuple):
    """Options of the parameters whose names start with a prefix."""

    prefix: str
    lr_scale: float
    """Factor of `optimizer.lr`."""
    weight_decay: float
    """Weight decay of matrices; norms, biases, embeddings and other vectors have none."""


def build_optimizer(
    optimizer: OptimizerOptions, training: Training, model: nn.Module, layers: nn.ModuleList, groups: Sequence[Group]
) -> OptimizersContainer:
    """Build the optimizers of all trainable parameters and allocate their state.

    "Muon" trains the matrices of the language model's decoder layers. AdamW trains all other parameters.

    Args:
        layers: the decoder layers.
        groups: the first that fits a parameter wins.

    Raises:
        UserError: the decoder layers have no matrix for Muon.
    """
    matrices = _select_for_muon(model, layers) if optimizer.name == "Muon" else set()
    configs = [
        config
        for earlier, group in enumerate(groups)
        for names, decay in (
            (_select(model, group.prefix, groups[:earlier], decayed=True), group.weight_decay),
            (_select(model, group.prefix, groups[:earlier], decayed=False), 0.0),
        )
        for config in (
            _configure([name for name in names if name in matrices], "Muon", optimizer, group.lr_scale, decay),
            _configure([name for name in names if name not in matrices], "AdamW", optimizer, group.lr_scale, decay),
        )
        if config is not None
    ]
    is_fused = training.cpu_offload or next(model.parameters()).is_cuda
    rounding = {"seed": training.seed}
    container = _Optimizers(
        OptimizersContainer.Config(
            param_groups=configs,
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


def _select_for_muon(model: nn.Module, layers: nn.ModuleList) -> set[str]:
    """Names of the parameters that Muon trains; none if the decoder layers are frozen."""
    matrices = {id(parameter) for parameter in select_matrices(layers)}
    if not matrices:
        raise UserError('optimizer.name = "Muon", but the decoder layers have no matrices to train: set it to "AdamW"')
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) in matrices}


def _select(model: nn.Module, prefix: str, earlier: Sequence[Group], decayed: bool) -> list[str]:
    """Names of the trainable parameters with a prefix, and of no earlier group, that have (or do not have) weight decay."""
    taken = tuple(group.prefix for group in earlier)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and name.startswith(prefix)
        and not name.startswith(taken)
        and (_is_matrix(name, parameter) and id(parameter) not in embeddings) == decayed
    ]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: more than one dimension is larger than 1, as in weights of linear maps and convolutions.

    Biases have none, also where those of all experts are one tensor.
    """
    leaf = name.rpartition(".")[2]
    return sum(size > 1 for size in parameter.shape) > 1 and leaf not in VECTORS and not leaf.endswith("bias")


def _configure(
    names: list[str], name: str, optimizer: OptimizerOptions, lr_scale: float, weight_decay: float
) -> ParamGroupConfig | None:
    """Group of the parameters with these names, for the optimizer with that name. None if there are no names."""
    if not names:
        return None
    settings: dict[str, Any] = {"lr": optimizer.lr * lr_scale, "weight_decay": weight_decay}
    if name == "AdamW":
        settings |= {"betas": (optimizer.beta1, optimizer.beta2), "eps": EPSILON}
        name = "AdamW" if optimizer.state_dtype == "float32" else "RoundedAdamW"
    return ParamGroupConfig(pattern="^(" + "|".join(map(re.escape, names)) + ")$", optimizer_name=name, optimizer_kwargs=settings)


def _allocate_state(container: OptimizersContainer) -> None:
    """Create all moments now, so that checkpoints also have those of parameters without a gradient so far.

    An example is the predictor before `start_step`. torchtitan allocates by a step with zero gradient and zero learning rate.
    That step is counted, so the counters are set back.
    """
    for optimizer in container:
        init_optim_state(optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()


class WarmUp(NamedTuple):
    """A warm-up of some parameters, beside that of the run."""

    first_step: int
    """Counted from 1."""
    steps: int
    """0 is none."""

    def find_share(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 1."""
        return min(1.0, max(step + 1 - max(self.first_step, 1), 0) / self.steps) if self.steps else 1.0

    def scale(self, factor: Callable[[int], float], done: int) -> float:
        """The run's factor after `done` steps, times that of this warm-up."""
        return factor(done) * self.find_share(done + 1)


def build_schedule(
    schedule: LRScheduler,
    steps: int,
    optimizer: OptimizersContainer | list[torch.optim.Optimizer],
    warm_ups: Mapping[str, WarmUp] | None = None,
) -> LRSchedulersContainer:
    """Warm-up, plateau and decay over this many steps.

    Args:
        warm_ups: further ones, by prefix of the parameters' names. The first that fits wins, as for groups.
    """
    built = LRSchedulersContainer.Config(
        warmup_steps=schedule.warmup_steps,
        decay_ratio=schedule.decay_ratio,
        decay_type=schedule.decay_type,
        min_lr_factor=schedule.lr_min,
    ).build(optimizers=optimizer, training_steps=steps)
    for scheduler in built if warm_ups else ():
        for index, group in enumerate(scheduler.optimizer.param_groups):
            fitting = (warm_up for prefix, warm_up in (warm_ups or {}).items() if group["param_names"][0].startswith(prefix))
            if (first := next(fitting, None)) is not None:
                scheduler.lr_lambdas[index] = partial(first.scale, scheduler.lr_lambdas[index])
    if warm_ups:
        seek_schedule(built, 0)
    return built


def read_rates(optimizer: OptimizersContainer) -> dict[str, float]:
    """Current learning rates: "lr" of the first group, and "lr/NAME" of each module of the objective."""
    groups = [group for each in optimizer for group in each.param_groups]
    rates = {"lr": groups[0]["lr"]}
    for group in groups:
        owner, module, *_ = group["param_names"][0].split(".")
        if owner == "objective":
            rates.setdefault(f"lr/{module}", group["lr"])
    return rates


def find_rate_factor(schedule: LRScheduler, steps: int) -> Callable[[int], float]:
    """The factor of `optimizer.lr` by the number of steps done, from 0 to `steps`. Logs nothing: the run has another schedule."""
    with _silence_root():
        (scheduler,) = build_schedule(schedule, steps, [torch.optim.SGD([torch.zeros(1)])])
    return scheduler.lr_lambdas[0]


@contextmanager
def _silence_root() -> Iterator[None]:
    """Drop what torchtitan logs, which goes to the root logger."""
    root, silent = logging.getLogger(), logging.Filter("nothing has this name")
    root.addFilter(silent)
    try:
        yield
    finally:
        root.removeFilter(silent)


def seek_schedule(schedule: LRSchedulersContainer, step: int) -> None:
    """Set the schedule, and the optimizer's learning rates, to their state after `step` optimizer steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To get the last learning rate")  # caused by torch's own code
        schedule.load_state_dict({"last_epoch": step})
    for scheduler in schedule:
        for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
