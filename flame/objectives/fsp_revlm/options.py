"""Options of future summary prediction by a reverse language model: the section [fsp_revlm]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flame.config.types import NonNegativeFloat, When, option
from flame.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    from flame.config.schema import JobConfig


@dataclass(kw_only=True)
class ReverseSummaryOptions(ObjectiveOptions):
    """Future summary prediction, learned summaries (arXiv:2510.14751). The loss is a sum over the channels of a state, which
    drowns the cross entropy (docs/experiments.md). Set loss_weight to about 1 / width, which makes it a mean."""

    section: ClassVar[str] = "fsp_revlm"

    train_reverse: bool = option(True, fixed=True)
    """Train the reverse language model in the same run. false freezes it, as the paper does: its weights then come from a run
    that trained it, by checkpoint.initial_load_path."""
    reverse_weight: NonNegativeFloat = option(1.0, applies=When("train_reverse"))
    """Factor of the reverse language model's cross entropy, beside the distance of the summaries. Both are multiplied by
    fsp_revlm.loss_weight."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        start = job.checkpoint
        if not self.train_reverse and not start.branch_from and not (start.initial_load_path and start.load_objective):
            yield (
                f"{name}.train_reverse = false, but nothing says where the reverse language model's weights are: set "
                "checkpoint.initial_load_path to the exported folder of a run that trained it, or train it"
            )
        if self.train_reverse and self.reverse_weight == 0:
            yield (
                f"{name}.reverse_weight = 0 with train_reverse = true trains the reverse language model on nothing: set it above "
                "0, or train_reverse = false with weights that a run has trained"
            )
        if job.training.context_len < 3:
            yield (
                f"training.context_len = {job.training.context_len} leaves no token two ahead, which {name} summarises: set it "
                "to 3 or more"
            )
