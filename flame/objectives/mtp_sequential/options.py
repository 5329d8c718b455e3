"""Options of multi-token prediction by sequential modules: the section [mtp_sequential]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from flame.config.types import NonNegativeFloat, option
from flame.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    from flame.config.schema import JobConfig


@dataclass(kw_only=True)
class SequentialTokenOptions(ObjectiveOptions):
    """Multi-token prediction by DeepSeek-V3's sequential modules (arXiv:2412.19437)."""

    section: ClassVar[str] = "mtp_sequential"

    tokens: Annotated[int, Field(ge=2)] = option(2, fixed=True)
    """Tokens that each position predicts, including the next. Each token after the next has its own module of one layer."""
    loss_weight: NonNegativeFloat = 0.3
    """Factor of the mean of the modules' cross entropies, which is added to the model's. 0 is the same as
    objective.name = "next_token"."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.tokens >= job.training.context_len:
            yield (
                f"{name}.tokens = {self.tokens} leaves the last module no token to predict: it must be less than "
                f"training.context_len = {job.training.context_len}"
            )
