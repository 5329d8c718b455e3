"""Options of next implicit token prediction: the section [nitp]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flame.config.types import NonNegativeInt, option
from flame.objectives.options import ObjectiveOptions


@dataclass(kw_only=True)
class ImplicitTokenOptions(ObjectiveOptions):
    """Next implicit token prediction (arXiv:2605.24956)."""

    section: ClassVar[str] = "nitp"

    layer: NonNegativeInt = option(0, fixed=True)
    """Decoder layer, from 1, whose states of the next token are the target. 0 takes the one nearest to a fifth of the depth."""
