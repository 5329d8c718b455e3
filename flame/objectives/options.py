"""Options that all objectives share. Imports no torch: options are checked before anything slow is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flame.config.types import NonNegativeFloat, Section


@dataclass(kw_only=True)
class ObjectiveOptions(Section):
    """Options of an objective. `section` names their table in the TOML file."""

    companions: ClassVar[tuple[type[Section], ...]] = ()
    """Further sections that the objective reads."""
    trains_without_lm: ClassVar[bool] = False
    """Whether the objective's modules can train while the language model is frozen."""

    loss_weight: NonNegativeFloat = 1.0
    """Factor of the objective's loss, which is added to the cross entropy. 0 is the same as objective.name = "next_token"."""
