"""Options of semantic tube prediction: the section [stp]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flame.config.types import NonNegativeFloat
from flame.objectives.options import ObjectiveOptions


@dataclass(kw_only=True)
class SemanticTubeOptions(ObjectiveOptions):
    """Semantic tube prediction (arXiv:2602.22617)."""

    section: ClassVar[str] = "stp"

    loss_weight: NonNegativeFloat = 0.02
    """Factor of the loss, which is added to the cross entropy. 0 is the same as objective.name = "next_token"."""
