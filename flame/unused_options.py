"""Options that have been set and do nothing in this run, where they need not be a mistake: one file serves several objectives,
and what uses them may be switched off on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from flame.config import JobConfig, Metrics
from flame.objective_config import CONTRASTIVE, FutureEncoder


def list_unused(config: JobConfig) -> list[str]:
    """Their names, such as `future_encoder.temperature`."""
    training = config.training
    unused = list(_list_unused_of_future(config))
    if not config.validation.interval:
        unused += _list_set("validation", config.validation, "dataset", "holdout_every", "num_sequences")
    if not training.skip_nan_inf:
        unused += _list_set("training", training, "max_skipped_steps")
    if not training.num_workers:
        unused += _list_set("training", training, "prefetch_factor")
    if not config.checkpoint.enable_checkpoint:
        unused += _list_set("checkpoint", config.checkpoint, "interval", "keep_latest_k", "async_mode", "export_interval")
    return unused


def _list_unused_of_future(config: JobConfig) -> Iterator[str]:
    future = config.future_encoder
    if not config.uses_future:
        switches = ("enable", False), ("loss_weight", 0)  # are what has switched it off
        for section, options in (("future_encoder", future), ("future_predictor", config.future_predictor)):
            names = (option.name for option in fields(options) if (option.name, getattr(options, option.name)) not in switches)
            yield from _list_set(section, options, *names)
        if config.metrics.future_interval != Metrics().future_interval:
            yield "metrics.future_interval"
    elif future.estimator_type not in CONTRASTIVE and future.temperature != FutureEncoder().temperature:
        yield "future_encoder.temperature"


def _list_set(section: str, options: Any, *names: str) -> list[str]:
    """Those that are not at their default."""
    defaults = {option.name: option.default for option in fields(options)}
    return [f"{section}.{name}" for name in names if getattr(options, name) != defaults[name]]
