"""Options of future summary prediction by a bag of words: the section [fsp_bow]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flame.config.types import NonNegativeInt
from flame.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    from flame.config.schema import JobConfig


@dataclass(kw_only=True)
class BagOfWordsOptions(ObjectiveOptions):
    """Future summary prediction, bag of words (arXiv:2510.14751). The loss is a sum over the vocabulary. With a large one, set
    loss_weight to about 1 / vocabulary size, which makes it a mean."""

    section: ClassVar[str] = "fsp_bow"

    window: NonNegativeInt = 0
    """How many tokens ahead the bag reaches; it leaves out the next token. 0 reaches to the end of the document."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.window == 1:
            yield (
                f"{name}.window = 1: the bag holds the tokens after the next one, up to that many ahead: set it to 2 or more, or "
                "to 0 for all up to the end of the document"
            )
