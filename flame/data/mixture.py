"""Which source each packed sequence comes from."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from flame.config import JobConfig, Training
from flame.data.documents import WHOLE, Documents, Part, TokenizedShards, open_documents
from flame.data.lines import open_line
from flame.data.streams import Stream
from flame.data.tokenizer import find_separator
from flame.errors import UserError

# Weyl's sequence of the golden ratio and van der Corput's in base 2, both as 64-bit fractions.
GOLDEN_RATIO = 0x9E3779B97F4A7C15
ONE = 1 << 64


@dataclass(frozen=True)
class Mixture:
    """Sources drawn in proportion to their weights. A single source is a mixture of one.

    Every source is packed by itself, stream by stream: a weight decides how often a source is drawn, never what is drawn from it.
    All packed sequences are equally long, so shares of sequences are shares of tokens.
    """

    sources: tuple[Documents | TokenizedShards, ...]
    weights: tuple[float, ...]
    part: Part = WHOLE
    separator: int | None = None
    """Token that ends the prompt, where only answers count."""

    def choose(self, sequence_index: int, num_streams: int) -> int:
        """Index of the source that a global sequence comes from, in constant time and without memory.

        Within a round of all streams the golden ratio spreads the sources over neighbouring sequences; from round to round van
        der Corput's sequence spreads them over each stream. Any run of sequences has each source's share to within a few.
        """
        turn, stream = divmod(sequence_index, num_streams)
        point = (stream * GOLDEN_RATIO + _reverse_bits(turn)) % ONE
        return bisect_right(self._limits, point)

    @cached_property
    def _limits(self) -> list[int]:
        scaled = [weight / max(self.weights) for weight in self.weights]
        last = max(index for index, weight in enumerate(scaled) if weight)
        limits = [int(sum(scaled[: index + 1]) / sum(scaled) * ONE) for index in range(len(scaled))]
        return [*limits[:last], *[ONE] * (len(scaled) - last)]

    def open_stream(self, source: int, stream: int, num_streams: int, training: Training) -> Stream:
        """One logical stream of one source."""
        documents = self.sources[source]
        line = open_line(documents, self.part, stream, num_streams, training.seed)
        return Stream(line, documents.name, stream, training.seq_len, training.context_len, self.separator)

    def count_units(self) -> dict[str, int]:
        """Documents of this part, or shards, in each source, by name."""
        return {source.name: self._count(source) for source in self.sources}

    def _count(self, source: Documents | TokenizedShards) -> int:
        return source.num_shards if isinstance(source, TokenizedShards) else self.part.count(len(source))

    def describe(self) -> list[str]:
        """A line for each source: its size, its share, and what a resumed run finds again."""
        lines = []
        for source, weight in zip(self.sources, self.weights, strict=True):
            share = (
                f", {weight / max(self.weights) / sum(w / max(self.weights) for w in self.weights):.1%} of the tokens"
                if len(self.sources) > 1
                else ""
            )
            if isinstance(source, TokenizedShards):
                size = f"{source.num_shards} shards, streamed"
                share += (
                    "; its position is kept exactly, as shard and row: resuming reads again the rows before it in each open shard"
                )
            else:
                size = f"{len(source)} documents"
            lines.append(f"{source.name}: {size}{share}")
        return lines


def _reverse_bits(number: int) -> int:
    """The 64 bits of a number in reverse, as a fraction of 2^64: van der Corput's sequence."""
    return int(f"{number:064b}"[::-1], 2)


def open_mixture(config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> Mixture:
    """Open everything that is trained on.

    Raises:
        UserError: a source cannot be opened, or is too small for the run's streams or for holding documents out.
    """
    corpora = config.corpora
    sources = tuple(open_documents(corpus, section, tokenizer, config.generators) for section, corpus in corpora.items())
    training = config.training
    separator = find_separator(tokenizer, training.answer_separator) if training.loss_on == "answer" else None
    weights = tuple(corpus.weight for corpus in corpora.values())
    mixture = Mixture(sources, weights, Part(config.validation.holdout_every), separator)
    for source in sources:
        _check_size(source, mixture.part, config)
    return mixture


def open_held_out(config: JobConfig, tokenizer: PreTrainedTokenizerFast, trained: Mixture) -> Mixture:
    """Open what the run is validated on: a corpus of its own, or the documents held out from each source of training."""
    if not config.validation.dataset:
        return replace(trained, part=Part(config.validation.holdout_every, is_held_out=True))
    source = open_documents(config.validation, "validation", tokenizer, config.generators)
    return replace(trained, sources=(source,), weights=(1.0,), part=WHOLE)


def _check_size(source: Documents | TokenizedShards, part: Part, config: JobConfig) -> None:
    if isinstance(source, TokenizedShards):
        if source.num_shards < config.training.num_streams:
            raise UserError(
                f"{source.option} has {source.num_shards} shards, fewer than training.num_streams = "
                f"{config.training.num_streams}, and while streaming each stream reads its own: lower num_streams "
                "(in a new run), or set streaming = false"
            )
    elif part.count(len(source)) == 0:
        raise UserError(
            f"{source.option} has {len(source)} documents, and validation.holdout_every = {part.every} leaves none to train on: "
            "raise it, or set validation.dataset"
        )
