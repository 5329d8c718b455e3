"""Factor of the loss beside the next token's, step by step."""

from __future__ import annotations

from flame.config import JobConfig


def reaches_loss_weight(config: JobConfig) -> bool:
    """Whether the factor of the future loss is `loss_weight` at some step: its warm-up ends before its decay, or the run."""
    future = config.future_encoder
    return max(future.start_step, 1) + max(future.warmup_steps, 1) - 1 <= config.training.steps - future.decay_steps


def find_aux_weight(config: JobConfig, step: int) -> float:
    """The factor at a step, counted from 1.

    Of the future loss: 0 before `start_step`, then linear warm-up to `loss_weight`, and over the last `decay_steps` of the run
    down to 0, which would be reached one step after the last. Of a rival: always `objective.loss_weight`.
    """
    if config.objective_name == "next_token":
        return 0.0
    if not config.uses_future:
        return config.objective.loss_weight
    future = config.future_encoder
    if step < future.start_step:
        return 0.0
    steps_in = step - max(future.start_step, 1) + 1
    steps_left = config.training.steps - step + 1
    rise = min(1.0, steps_in / max(future.warmup_steps, 1))
    fall = min(1.0, steps_left / (future.decay_steps + 1)) if future.decay_steps else 1.0
    return future.loss_weight * rise * fall
