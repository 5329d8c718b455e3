"""Options of next-latent prediction: the section [nextlat]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flame.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt, option
from flame.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    from flame.config.schema import JobConfig


@dataclass(kw_only=True)
class NextLatentOptions(ObjectiveOptions):
    """Next-latent prediction (arXiv:2511.05963)."""

    section: ClassVar[str] = "nextlat"

    horizon: PositiveInt = 1
    """Steps that the dynamics model is rolled out. All of them are supervised."""
    kl_weight: NonNegativeFloat = 1.0
    """Factor of the divergence between the next tokens of the predicted and the true state, beside the regression. Both are
    multiplied by nextlat.loss_weight. 0 leaves it out."""
    hidden_dim: NonNegativeInt = option(0, fixed=True)
    """Inner width of the dynamics model, an MLP of three layers. 0 is the model's width."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.horizon >= job.training.context_len:
            yield (
                f"{name}.horizon = {self.horizon} leaves the last step no state to predict: it must be less than "
                f"training.context_len = {job.training.context_len}"
            )
