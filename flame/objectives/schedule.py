"""Schedule of the weight of an objective's loss."""

from __future__ import annotations

from typing import NamedTuple


class WeightSchedule(NamedTuple):
    """The weight is 0 before `start_step`, then warms up linearly to `loss_weight`. Over the last `decay_steps` of the run it
    decays linearly towards 0, which it would reach one step after the last. Steps are counted from 1."""

    loss_weight: float
    start_step: int
    warmup_steps: int
    decay_steps: int
    total_steps: int

    def find_weight(self, step: int) -> float:
        """Weight at a step."""
        if step < self.start_step:
            return 0.0
        steps_in = step - max(self.start_step, 1) + 1
        steps_left = self.total_steps - step + 1
        rise = min(1.0, steps_in / max(self.warmup_steps, 1))
        fall = min(1.0, steps_left / (self.decay_steps + 1)) if self.decay_steps else 1.0
        return self.loss_weight * rise * fall

    def reaches_weight(self) -> bool:
        """Whether the weight equals `loss_weight` at some step: warm-up ends before the decay or the end of the run."""
        warm = max(self.start_step, 1) + max(self.warmup_steps, 1) - 1
        return warm <= self.total_steps - self.decay_steps
