"""Which steps have an objective's loss, and which packed sequences of such a step."""

from __future__ import annotations

from typing import NamedTuple

from flame.objectives.schedule import WeightSchedule
from flame.runtime.seeds import derive_seed

STEP_DRAW = 1 << 33
"""Added to the run's seed, so that steps are drawn independently of anchors and shifts."""


class Cadence(NamedTuple):
    """One step in `every`, and a share of its packed sequences. Both depend on the step's number alone: a resumed run and a run
    on other ranks choose the same. Steps are counted from 1.

    The sequences of a step are numbered from 0. Those with the loss are `num_chosen` neighbours, and the next step with a loss
    takes the next ones, so that all document streams get their turn.
    """

    every: int = 1
    is_drawn: bool = False
    """Draw the step within each `every` by the seed; otherwise it is the last."""
    seed: int = 0
    num_sequences: int = 1
    """Packed sequences of a step, over all ranks and micro-steps."""
    num_chosen: int = 1
    """Those that have the loss."""
    ranks: int = 1
    """They divide both."""
    start_step: int = 0
    """First step that may have the loss."""
    keeps_mean_weight: bool = False
    """Multiply the weight of the loss by `every`."""

    def has_loss(self, step: int) -> bool:
        """Whether a step has the loss."""
        return step >= self.start_step and step == self._find_step((step - 1) // self.every)

    def mark_micro_steps(self, step: int) -> list[bool]:
        """For each micro-step of a step with a loss, whether its packed sequences have it: the same on all ranks.

        Micro-step i of the W ranks has the sequences i W .. (i + 1) W - 1.
        """
        micro_steps, chosen = self.num_sequences // self.ranks, self.num_chosen // self.ranks
        first = (step - 1) // self.every * self.num_chosen % self.num_sequences // self.ranks
        marked = {(first + offset) % micro_steps for offset in range(chosen)}
        return [micro_step in marked for micro_step in range(micro_steps)]

    def find_previous(self, step: int) -> int | None:
        """The last step with a loss before a step; None if there is none."""
        block = (step - 1) // self.every
        for each in (block, block - 1):
            if each >= 0 and (found := self._find_step(each)) < step:
                return found if found >= self.start_step else None
        return None

    def find_first(self) -> int:
        """The first step with a loss."""
        block = max(self.start_step - 1, 0) // self.every
        return next(step for each in (block, block + 1) if (step := self._find_step(each)) >= self.start_step)

    @property
    def share(self) -> float:
        """Share of all packed sequences of a run that have the loss."""
        return self.num_chosen / self.num_sequences / self.every

    def describe(self) -> str:
        """Such as " in one step of 10, on 2 of 8 packed sequences"; empty if all have the loss."""
        text = f" in one step of {self.every}" if self.every > 1 else ""
        if self.num_chosen < self.num_sequences:
            text += f"{',' if text else ''} on {self.num_chosen} of a step's {self.num_sequences} packed sequences"
        return text

    def _find_step(self, block: int) -> int:
        """The step with a loss among steps block * every + 1 .. (block + 1) * every."""
        place = derive_seed(self.seed + STEP_DRAW, block) % self.every if self.is_drawn else self.every - 1
        return block * self.every + place + 1


class LossPlan(NamedTuple):
    """Where a run has its objective's loss, and with which weight."""

    schedule: WeightSchedule
    cadence: Cadence

    def decide(self, step: int) -> tuple[float, list[bool]]:
        """The weight of the loss in a step, and for each micro-step whether its packed sequences have the loss."""
        weight = self.schedule.find_weight(step)
        if weight == 0 or not self.cadence.has_loss(step):
            return 0.0, [False] * (self.cadence.num_sequences // self.cadence.ranks)
        factor = self.cadence.every if self.cadence.keeps_mean_weight else 1
        return weight * factor, self.cadence.mark_micro_steps(step)
