"""Options that all objectives share. Imports no torch: options are checked before anything slow is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flame.config.types import NonNegativeFloat, PositiveInt, Section, Share, When, option

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

_SKIPS = When("every", above=1)


@dataclass(kw_only=True)
class ObjectiveOptions(Section):
    """Options of an objective. `section` names their table in the TOML file."""

    companions: ClassVar[tuple[type[Section], ...]] = ()
    """Further sections that the objective reads."""
    trains_without_lm: ClassVar[bool] = False
    """Whether the objective's modules can train while the language model is frozen."""

    loss_weight: NonNegativeFloat = 1.0
    """Factor of the objective's loss, which is added to the cross entropy. 0 is the same as objective.name = "next_token"."""
    every: PositiveInt = 1
    """Compute the loss in one step of this many, and skip its passes in the others."""
    draw_step: bool = option(False, applies=_SKIPS)
    """Draw by training.seed which of the `every` steps has the loss. False takes the last of them."""
    keep_mean_weight: bool = option(False, applies=_SKIPS)
    """Multiply loss_weight by `every`, so that its mean over all steps stays. False: a step with the loss has loss_weight, and
    the mean is that divided by `every`."""
    sequence_share: Share = 1.0
    """Share of a step's packed sequences, over all ranks and micro-steps, that have the loss. It is averaged over them, so its
    weight stays. Each step with the loss takes the next ones. They must be a multiple of the ranks."""

    def list_cadence(self) -> dict[str, Any]:
        """Options of which steps and packed sequences have the loss, where they are not all."""
        names = ("every", "draw_step", "keep_mean_weight") if self.every > 1 else ()
        return {name: getattr(self, name) for name in (*names, *(["sequence_share"] if self.sequence_share < 1 else []))}

    def count_sequences(self, job: JobConfig) -> tuple[int, float]:
        """Packed sequences of a step, and how many of them `sequence_share` asks for."""
        total = job.training.gradient_accumulation_steps * job.world_size
        return total, self.sequence_share * total


def find_cadence_conflicts(job: JobConfig, options: ObjectiveOptions) -> Iterator[str]:
    """Yield one line for each reason why the steps and packed sequences with the objective's loss cannot be chosen so."""
    name, ranks = options.section, job.world_size
    total, chosen = options.count_sequences(job)
    if abs(chosen / ranks - round(chosen / ranks)) > ROUNDING or round(chosen) < ranks:
        shares = ", ".join(f"{count * ranks / total:.4g}" for count in range(1, total // ranks + 1))
        micro_steps = f"training.gradient_accumulation_steps = {job.training.gradient_accumulation_steps}"
        yield (
            f"{name}.sequence_share = {options.sequence_share:g} of {total} packed sequences a step is no multiple of the ranks, "
            f"{ranks}: with {micro_steps} allowed is {shares}; to skip whole steps set {name}.every"
        )
    if job.experimental.freeze_lm_for_infonce:
        for key, default in (("every", 1), ("sequence_share", 1.0)):
            if getattr(options, key) != default:
                yield (
                    f"{name}.{key} = {getattr(options, key):g} beside experimental.freeze_lm_for_infonce = true leaves nothing "
                    f"to train where the loss is skipped: set it to {default:g}"
                )


ROUNDING = 0.01
"""Of a count, for a share that is written with four decimals, such as 0.3333."""
