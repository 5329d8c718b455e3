"""Options of token-order prediction: the section [top]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flame.config.types import NonNegativeInt
from flame.objectives.options import ObjectiveOptions


@dataclass(kw_only=True)
class TokenOrderOptions(ObjectiveOptions):
    """Token-order prediction (arXiv:2508.19228)."""

    section: ClassVar[str] = "top"

    window: NonNegativeInt = 0
    """How many tokens ahead are ranked; 0 ranks all up to the end of the document."""
