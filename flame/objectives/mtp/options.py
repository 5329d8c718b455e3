"""Options of multi-token prediction: the section [mtp]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flame.config.types import option
from flame.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    from flame.config.schema import JobConfig


Curriculum = Literal["none", "forward", "reverse"]


@dataclass(kw_only=True)
class MultiTokenOptions(ObjectiveOptions):
    """Multi-token prediction (arXiv:2404.19737)."""

    section: ClassVar[str] = "mtp"

    tokens: Annotated[int, Field(ge=2)] = option(4, fixed=True)
    """Tokens that each position predicts, including the next. Each token after the next has its own head of one layer."""
    curriculum: Curriculum = "none"
    """Predict fewer tokens in a part of the run (arXiv:2505.22757). "forward" begins with the next token and adds one after
    another in equal phases; "reverse" begins with all and takes one after another away. Heads that predict nothing are not
    computed."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.tokens >= job.training.context_len:
            yield (
                f"{name}.tokens = {self.tokens} leaves the last head no token to predict: it must be less than "
                f"training.context_len = {job.training.context_len}"
            )
