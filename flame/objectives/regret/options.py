"""Options of regret pre-training: the section [regret]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flame.config.types import NonNegativeFloat, option
from flame.objectives.options import ObjectiveOptions


@dataclass(kw_only=True)
class RegretOptions(ObjectiveOptions):
    """Regret pre-training (arXiv:2606.03080)."""

    section: ClassVar[str] = "regret"

    teacher: Literal["global", "local"] = option("global", fixed=True)
    """What the teacher's tokens attend to in each layer: all of their document but the token that they predict ("global"), or
    their past and that token ("local")."""
    loss_weight: NonNegativeFloat = 0.1
    """Factor of the divergence, which is added to the cross entropy. 0 is the same as objective.name = "next_token"."""
