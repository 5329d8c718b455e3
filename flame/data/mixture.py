"""Chooses the source of each packed sequence. Step 5 in the life of a batch (`flame.data.loader`)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from flame.config.schema import JobConfig, Training
from flame.data.document_streams import open_document_stream
from flame.data.documents import WHOLE, Subset, TokenizedShards, open_documents
from flame.data.encoding import find_separator
from flame.data.packing import Packer
from flame.data.sources.base import Documents, WithUserCode
from flame.data.sources.registry import build_kind
from flame.errors import UserError

# Weyl's sequence of the golden ratio and van der Corput's in base 2, both as 64-bit fractions.
GOLDEN_RATIO = 0x9E3779B97F4A7C15
ONE = 1 << 64


@dataclass(frozen=True)
class Mixture(WithUserCode):
    """Sources drawn in proportion to their weights. A single source is a mixture of one.

    Each source is packed separately, stream by stream. A weight decides how often a source is drawn, not which of its documents
    come next. All packed sequences have the same length, so a share of sequences is the same share of tokens.
    """

    sources: tuple[Documents | TokenizedShards, ...]
    weights: tuple[float, ...]
    subset: Subset = WHOLE
    separator: int | None = None
    """Token that ends the prompt, if only answers count."""
    user_files: tuple[str, ...] = ()
    """The user's files that define a source."""

    def choose(self, sequence_index: int, num_streams: int) -> int:
        """Index of the source of a global sequence, in constant time and memory.

        Within one round of all streams, the golden ratio spreads the sources over neighbouring sequences. From round to round,
        van der Corput's sequence spreads them over each stream. In any range of sequences, the number of each source is right to
        within a few.
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

    def open_packer(self, source: int, stream: int, num_streams: int, training: Training) -> Packer:
        """Open the packer of one stream of one source."""
        documents = self.sources[source]
        of_stream = open_document_stream(documents, self.subset, stream, num_streams, training.seed)
        return Packer(of_stream, documents.name, stream, training.seq_len, training.context_len, self.separator)

    def count_units(self) -> dict[str, int]:
        """Number of documents of this subset, or of shards, in each source by name."""
        return {source.name: self._count(source) for source in self.sources}

    def _count(self, source: Documents | TokenizedShards) -> int:
        return source.num_shards if isinstance(source, TokenizedShards) else self.subset.count(len(source))

    def describe(self) -> list[str]:
        """A line for each source: its size, its share of the tokens and, if streamed, what resuming costs."""
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
                    "; its position is kept exactly, as shard and row: resuming rereads the rows before it in each open shard"
                )
            else:
                size = f"{len(source)} documents"
            lines.append(f"{source.name}: {size}{share}")
        return lines

    def list_shared(self, num_streams: int) -> list[str]:
        """A line for each source with fewer documents than streams. Stream s begins with the document at ordinal s, so streams
        read the same documents, in different epochs."""
        return [
            f"{source.name}: {count} documents are fewer than training.num_streams = {num_streams}, so up to "
            f"{-(-num_streams // count)} streams read the same document at once, each from its first token: the run sees the "
            "beginnings of documents that often before it sees their ends; give more documents, or lower num_streams in a new run"
            for source, weight in zip(self.sources, self.weights, strict=True)
            if weight and 0 < (count := self._count(source)) < num_streams
        ]


def _reverse_bits(number: int) -> int:
    """The 64 bits of a number in reverse order. As a fraction of 2^64, this is van der Corput's sequence."""
    return int(f"{number:064b}"[::-1], 2)


def open_mixture(job: JobConfig, tokenizer: PreTrainedTokenizerFast) -> Mixture:
    """Open the sources of training.

    Raises:
        UserError: a source cannot be opened, or is too small for the run's streams or for holding out documents.
    """
    kinds = [build_kind(corpus, section, job.get) for section, corpus in job.corpora.items()]
    training = job.training
    sources = tuple(open_documents(kind, tokenizer, training.loss_on) for kind in kinds)
    separator = find_separator(tokenizer, training.answer_separator) if training.loss_on == "answer" else None
    weights = tuple(corpus.weight for corpus in job.corpora.values())
    user_files = tuple(dict.fromkeys(kind.user_file for kind in kinds if kind.user_file))
    mixture = Mixture(sources, weights, Subset(job.validation.holdout_every), separator, user_files)
    for source in sources:
        _check_size(source, mixture.subset, training.num_streams)
    return mixture


def open_held_out(job: JobConfig, tokenizer: PreTrainedTokenizerFast, trained: Mixture) -> Mixture:
    """Open the sources of validation: its own dataset, or the documents held out from each source of training."""
    if not job.validation.dataset:
        return replace(trained, subset=Subset(job.validation.holdout_every, is_held_out=True))
    source = open_documents(build_kind(job.validation, "validation", job.get), tokenizer, job.training.loss_on)
    return replace(trained, sources=(source,), weights=(1.0,), subset=WHOLE)


def _check_size(source: Documents | TokenizedShards, subset: Subset, num_streams: int) -> None:
    if isinstance(source, TokenizedShards):
        if source.num_shards < num_streams:
            raise UserError(
                f"{source.option} has {source.num_shards} shards, fewer than training.num_streams = {num_streams}, and while "
                "streaming each stream reads its own: lower num_streams (in a new run), or set streaming = false"
            )
    elif subset.count(len(source)) == 0:
        # The first document is always held out, so no other number helps.
        raise UserError(
            f"{source.option} has 1 document, which validation.holdout_every = {subset.every} holds out: give more documents, or "
            "set validation.holdout_every = 0 and, to validate, validation.dataset"
        )
