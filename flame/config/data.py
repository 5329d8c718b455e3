"""Options of what is trained and validated on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flame.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt, Section, When, option

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

STANDARD_LIBRARY = "stdlib"
SMALLEST_SHARE = 1e-6
"""Of the largest weight: a smaller one would hardly ever be drawn."""


@dataclass(kw_only=True)
class Corpus(Section):
    """Where documents come from: the options that training, validation and each source of a mixture share.

    A resumed run may name a corpus otherwise, as long as it holds the same documents (`flame.data.corpus_content`)."""

    dataset: str = STANDARD_LIBRARY
    """What to read: "stdlib" (the Python sources on this machine, one document a file), "text" (one document a file), "json"
    (JSON lines), "csv", "parquet", "arrow", "tokens" (token ids in files), "pathstar" or "siblings" (generated, see their
    sections), the name of a Hub dataset or a folder of one, or a Python file with a source of your own, such as
    "my_source.py"."""
    dataset_name: str = ""
    """Configuration of the Hub dataset, where it has several. For path-star graphs their size, arms x nodes of a path with the
    center, such as "5x5", or several sizes, equally often, such as "2x3,5x5"."""
    dataset_split: str = "train"
    """Split of the Hub dataset."""
    data_files: str = ""
    """Files: paths, folders, globs or remote addresses such as "s3://bucket/*.parquet", separated by commas."""
    text_column: str = "text"
    """Column or JSON key that holds the document: a text, a list of token ids, or the messages of a chat."""
    token_dtype: Literal["", "uint16", "uint32", "int32", "int64"] = ""
    """Type of the ids in token files that do not say it, such as nanoGPT's. Empty: "uint16" where the tokenizer's vocabulary fits
    it, else "uint32"."""
    end_of_text_id: Annotated[int, Field(ge=-1)] = -1
    """Id that ends each document in token files of other programs. -1 takes the tokenizer's."""
    streaming: bool = False
    """Read Hub datasets or local files shard by shard while they arrive, instead of fetching and indexing them first. In
    training each stream reads its own shards, so there must be at least training.num_streams of them."""


@dataclass(kw_only=True)
class Source(Corpus):
    """One source of a mixture, `[sources.NAME]`."""

    weight: NonNegativeFloat = 1.0
    """Share of the tokens, relative to the other sources. It decides how often the source is drawn and nothing else. A resumed
    run may change it. 0 pauses the source and keeps its position."""


def find_mixture_conflicts(job: JobConfig) -> Iterator[str]:
    """One line for each fault of the sources together."""
    if job.sources:
        for each in fields(Corpus):
            if (value := getattr(job.training, each.name)) != each.default:
                yield f"training.{each.name} = {json.dumps(value)} beside [sources.NAME]: move it into a source of its own"
    heaviest = max((source.weight for source in job.sources.values()), default=1.0)
    if heaviest == 0:
        yield "sources.NAME.weight = 0 for all sources leaves nothing to train on: raise one"
    for name, source in job.sources.items():
        if 0 < source.weight < SMALLEST_SHARE * heaviest:
            yield (
                f"sources.{name}.weight = {source.weight:g} is less than a millionth of the largest, {heaviest:g}: raise it, or "
                "set it to 0 to draw nothing"
            )


_MEASURED = When("interval")
_OWN_CORPUS = (_MEASURED, When("dataset"))


@dataclass(kw_only=True)
class Validation(Corpus):
    """A fixed set of held-out packed sequences, the same at each time and on any number of ranks."""

    interval: NonNegativeInt = 0
    """Steps between validations; 0 is never. Unless it is 0, the last step is validated too."""
    num_sequences: PositiveInt = option(64, applies=_MEASURED)
    """Packed sequences of training.seq_len tokens in the set; fewer if the held-out documents do not fill them."""
    holdout_every: NonNegativeInt = option(0, fixed=True)
    """Hold out every Nth document of the training data, from the first on, and validate on those."""
    dataset: str = option("", applies=_MEASURED)
    """Validate on this corpus instead: as training.dataset, with the options beside it."""
    dataset_name: str = option("", applies=_OWN_CORPUS)
    """As training.dataset_name."""
    dataset_split: str = option("train", applies=_OWN_CORPUS)
    """As training.dataset_split."""
    data_files: str = option("", applies=_OWN_CORPUS)
    """As training.data_files."""
    text_column: str = option("text", applies=_OWN_CORPUS)
    """As training.text_column."""
    token_dtype: Literal["", "uint16", "uint32", "int32", "int64"] = option("", applies=_OWN_CORPUS)
    """As training.token_dtype."""
    end_of_text_id: Annotated[int, Field(ge=-1)] = option(-1, applies=_OWN_CORPUS)
    """As training.end_of_text_id."""
    streaming: bool = option(False, applies=_OWN_CORPUS)
    """As training.streaming."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.dataset and self.holdout_every:
            yield (
                f'validation.dataset = "{self.dataset}" and validation.holdout_every = {self.holdout_every} both name a held-out '
                "set: leave one of them out"
            )
        if self.interval and not (self.dataset or self.holdout_every):
            yield (
                f"validation.interval = {self.interval} without held-out documents: set validation.dataset, or "
                "validation.holdout_every to keep some of the training data for it"
            )
        if self.holdout_every == 1:
            yield "validation.holdout_every = 1 leaves nothing to train on: allowed are 0 (off) and 2 or more"
