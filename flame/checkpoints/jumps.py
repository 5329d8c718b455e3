"""Says when learning rate or loss weight jump at a resume, because what they are scheduled by has changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

from flame.config.run import ObjectiveChoice
from flame.config.schema import JobConfig
from flame.config.training import LRScheduler
from flame.config.types import Section
from flame.objectives.registry import choose_objective
from flame.objectives.schedule import WeightSchedule
from flame.optimizers.build import WarmUp, find_rate_factor

S = TypeVar("S", bound=Section)

WARMUP = "warmup_steps"
"""Option of a section whose modules warm up by themselves."""
TOLERANCE = 0.01
"""Relative change up to which nothing is said."""


def describe_jump(saved: Mapping[str, Any], config: JobConfig, step: int) -> str | None:
    """A line with the values of the last step and of the next one; None if the next one is as it would have been.

    Args:
        saved: the options of the checkpoint, by section.
        step: of the checkpoint.
    """
    if not 0 < step < config.training.steps:
        return None
    before, now = _Schedules(saved, config), _Schedules(config.to_dict(), config)
    curves = [
        ("learning rate", before.find_rate, now.find_rate),
        ("loss weight", before.find_weight, now.find_weight),
    ]
    curves += [
        (f"learning rate of {section}", partial(before.find_own_rate, section), partial(now.find_own_rate, section))
        for section in now.warm_ups
        if not math.isclose(before.find_share(section, step + 1), now.find_share(section, step + 1), rel_tol=TOLERANCE)
    ]
    jumps = [
        f"{name} {old(step):.3g} at step {step} -> {new(step + 1):.3g} at step {step + 1}"
        for name, old, new in curves
        if not math.isclose(old(step + 1), new(step + 1), rel_tol=TOLERANCE)
    ]
    if not jumps:
        return None
    ends = f" (scheduled over {now.steps} steps instead of {before.steps})" if now.steps != before.steps else ""
    return f"{', '.join(jumps)}{ends}"


class _Schedules:
    """Learning rate and loss weight by the options of a run. An option that a checkpoint lacks counts as its default.

    Args:
        config: says which objective there is.
    """

    def __init__(self, options: Mapping[str, Any], config: JobConfig):
        scheduler = _read(LRScheduler, options["lr_scheduler"])
        self.steps = scheduler.total_steps or options["training"]["steps"]
        self._factor, self._lr = find_rate_factor(scheduler, self.steps), options["optimizer"]["lr"]
        kind, choice = choose_objective(config), _read(ObjectiveChoice, options.get("objective", {}))
        weight = options.get(kind.options.section, {}).get("loss_weight", kind.options().loss_weight) if kind is not None else 0.0
        own = [each for each in (kind.options.companions if kind is not None else ()) if hasattr(each, WARMUP)]
        values = {each.section: vars(each()) | options.get(each.section, {}) for each in own}
        self.warm_ups = {name: WarmUp(choice.start_step, each[WARMUP]) for name, each in values.items()}
        """Those of modules that have one beside that of the run, by section."""
        self._scales = {name: each.get("lr_scale", 1.0) for name, each in values.items()}
        self._weight = WeightSchedule(weight, choice.start_step, choice.warmup_steps, choice.decay_steps, self.steps)

    def find_rate(self, step: int) -> float:
        """Learning rate at a step, counted from 1."""
        return self._lr * self._factor(step - 1)

    def find_share(self, section: str, step: int) -> float:
        """What the learning rate of a section's modules is multiplied by."""
        return self._scales[section] * self.warm_ups[section].find_share(step)

    def find_own_rate(self, section: str, step: int) -> float:
        """Learning rate of a section's modules at a step."""
        return self.find_rate(step) * self.find_share(section, step)

    def find_weight(self, step: int) -> float:
        """Loss weight at a step."""
        return self._weight.find_weight(step)


def _read(kind: type[S], options: Mapping[str, Any]) -> S:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # every section is a dataclass
    return kind(**{name: value for name, value in options.items() if name in known})
