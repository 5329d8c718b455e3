"""What must hold between the options of what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields

from flame.config import JobConfig
from flame.objective_config import (
    CONTRASTIVE,
    HIGHEST_LEARNED_TEMPERATURE,
    LOWEST_LEARNED_TEMPERATURE,
    FutureEncoder,
    Objective,
)


def find_objective_conflicts(config: JobConfig) -> Iterator[str]:
    """One line for each option about the losses and their weights that does not suit another."""
    yield from _find_name_conflicts(config)
    yield from _find_schedule_conflicts(config)
    yield from _find_future_conflicts(config)


def _find_name_conflicts(config: JobConfig) -> Iterator[str]:
    objective, future = config.objective, config.future_encoder
    if None not in (objective.name, future.enable) and future.enable != (objective.name == "future"):
        yield (
            f'future_encoder.enable = {json.dumps(future.enable)} beside objective.name = "{objective.name}": leave it out, '
            "the name alone decides"
        )
    users = {"loss_weight": ("mtp", "top", "fsp_bow"), "mtp_tokens": ("mtp",), "window": ("top", "fsp_bow")}
    for option in fields(Objective):
        value, allowed = getattr(objective, option.name), users.get(option.name, (config.objective_name,))
        if value != option.default and config.objective_name not in allowed:
            names = " or ".join(f'"{name}"' for name in allowed)
            is_off = objective.name == "future" and not config.uses_future
            cause = "future_encoder.loss_weight = 0" if is_off else f'objective.name = "{config.objective_name}"'
            yield f"objective.{option.name} = {value} has no effect with {cause}: leave it out, or set the name to {names}"

    if config.objective_name == "mtp" and objective.mtp_tokens >= config.training.context_len:
        yield (
            f"objective.mtp_tokens = {objective.mtp_tokens} leaves the last head no token to predict: it must be less than "
            f"training.context_len = {config.training.context_len}"
        )
    if config.objective_name == "fsp_bow" and objective.window == 1:
        yield (
            'objective.window = 1 with objective.name = "fsp_bow": the bag holds the tokens after the next one, up to that many '
            "ahead: set it to 2 or more, or to 0 for all up to the end of the document"
        )


def _find_schedule_conflicts(config: JobConfig) -> Iterator[str]:
    steps = config.training.steps
    if config.uses_future and config.future_encoder.start_step > steps:
        yield (
            f"future_encoder.start_step = {config.future_encoder.start_step} is after the last step, training.steps = {steps}: "
            'start earlier or set objective.name = "next_token"'
        )
    if config.experimental.freeze_lm_for_infonce:
        if not config.uses_future:
            yield (
                "experimental.freeze_lm_for_infonce = true leaves nothing to train: "
                'it needs objective.name = "future" and future_encoder.loss_weight > 0'
            )
        elif config.future_encoder.start_step > 1:
            yield (
                f"experimental.freeze_lm_for_infonce = true leaves nothing to train before "
                f"future_encoder.start_step = {config.future_encoder.start_step}: set it to 0"
            )
        if config.optimizer.name == "Muon":
            yield (
                'optimizer.name = "Muon" beside experimental.freeze_lm_for_infonce = true: Muon trains the decoder layers alone, '
                'which are frozen; set it to "AdamW"'
            )


def _find_future_conflicts(config: JobConfig) -> Iterator[str]:
    future, training = config.future_encoder, config.training
    if future.target_shift >= training.context_len:
        yield (
            f"future_encoder.target_shift = {future.target_shift} leaves no position with a target: "
            f"it must be less than training.context_len = {training.context_len}"
        )
    if future.learnable_temperature and future.temperature < LOWEST_LEARNED_TEMPERATURE:
        yield (
            f"future_encoder.temperature = {future.temperature} is below {LOWEST_LEARNED_TEMPERATURE}, the "
            "lowest that future_encoder.learnable_temperature allows: raise it or do not learn it"
        )
    if future.learnable_temperature and future.temperature > HIGHEST_LEARNED_TEMPERATURE:
        yield (
            f"future_encoder.temperature = {future.temperature} is above {HIGHEST_LEARNED_TEMPERATURE}, the "
            "highest that future_encoder.learnable_temperature allows: lower it or do not learn it"
        )
    if future.learnable_temperature and future.estimator_type != "infonce":
        yield (
            f"future_encoder.learnable_temperature = true has no effect with future_encoder.estimator_type = "
            f'"{future.estimator_type}": leave it out'
        )
    if future.estimator_type not in CONTRASTIVE:
        for name in ("negatives", "exclude_neighbors", "exclude_duplicates"):
            if getattr(future, name) != getattr(FutureEncoder(), name):
                yield (
                    f"future_encoder.{name} is about negatives, and future_encoder.estimator_type = "
                    f'"{future.estimator_type}" has none: leave it out'
                )
    if future.target == "shuffled" and future.exclude_neighbors:
        yield (
            f'future_encoder.exclude_neighbors = {future.exclude_neighbors} with future_encoder.target = "shuffled": summaries '
            "are dealt to other places, and an anchor's neighbours are not near its own; leave it out"
        )
    if future.ema_decay != FutureEncoder().ema_decay and future.target != "ema":
        yield (
            f'future_encoder.ema_decay = {future.ema_decay} has no effect with future_encoder.target = "{future.target}": leave '
            "it out"
        )
    if future.target in ("mean_embedding", "causal") and future.precision == "fp8":
        yield (
            f'future_encoder.precision = "fp8" has no effect with future_encoder.target = "{future.target}", which has no '
            "anti-causal pass: leave it out"
        )
    if future.target == "ema" and config.experimental.freeze_lm_for_infonce:
        yield (
            'future_encoder.target = "ema" beside experimental.freeze_lm_for_infonce = true: the average of weights that do not '
            'change is the weights; set it to "self"'
        )
    if future.target == "causal" and future.future_k:
        yield (
            f'future_encoder.future_k = {future.future_k} has no effect with future_encoder.target = "causal", which looks at '
            "the past: leave it out"
        )
    if future.max_anchors == 1:
        yield "future_encoder.max_anchors = 1 leaves no negatives: allowed are 0 (all) and 2 or more"
    if future.max_anchors >= training.seq_len:
        yield (
            f"future_encoder.max_anchors = {future.max_anchors} is no less than training.seq_len = {training.seq_len}: "
            "set it to 0 to take all anchors"
        )
    if future.precision == "fp8" and training.mixed_precision_param != "bfloat16":
        yield (
            f'future_encoder.precision = "fp8" beside training.mixed_precision_param = "{training.mixed_precision_param}": '
            'set the one to "bf16" or the other to "bfloat16"'
        )
