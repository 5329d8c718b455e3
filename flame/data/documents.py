"""Documents as token ids, whatever they are read from: text that is tokenized on the way, or a folder of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.config import TOKENS_FORMAT, Corpus, Generators
from flame.data.generated import ENDLESS, GeneratedSource
from flame.data.sources import Origin, Source, StreamingSource, open_source
from flame.data.token_folder import open_token_folder
from flame.data.tokenizer import build_generated_tokenizer, encode_document, fingerprint_tokenizer

Encode = Callable[[str], np.ndarray]


class Documents(Protocol):
    """Random access to documents. Instances are pickled into the loader's worker processes."""

    name: str
    """Short name in logs, metrics and the audit."""
    option: str
    """How error lines name it, such as `training.dataset = "json"`."""

    def __len__(self) -> int:
        """Documents, good and bad."""
        ...

    def read(self, index: int) -> np.ndarray | None:
        """Return the ids of a document, integer [n] with n >= 1, or None for a bad row."""
        ...


class Part(NamedTuple):
    """Which rows of a source, or of each of its shards, are read: all, all but each `every`-th, or only those."""

    every: int = 0
    is_held_out: bool = False

    def count(self, rows: int) -> int:
        """How many of so many rows belong to this part."""
        if not self.every:
            return rows
        held_out = -(-rows // self.every)
        return held_out if self.is_held_out else rows - held_out

    def locate(self, index: int) -> int:
        """Row number of the part's row with this index."""
        if not self.every:
            return index
        return index * self.every if self.is_held_out else index + index // (self.every - 1) + 1

    def includes(self, row: int) -> bool:
        """Whether a row belongs to this part."""
        return not self.every or (row % self.every == 0) == self.is_held_out


WHOLE = Part()


class TokenizedSource:
    """`Documents` of a text source."""

    def __init__(self, source: Source, encode: Encode):
        self.name, self.option = source.name, source.option
        self.source, self._encode = source, encode

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> np.ndarray | None:
        text = self.source.read(index)
        return None if text is None else self._encode(text)


class Block(NamedTuple):
    """Documents of a generated source, end to end."""

    tokens: np.ndarray
    """integer [N]"""
    bounds: list[int]
    """B+1 of them, from 0 to N."""

    def read(self, place: int) -> np.ndarray:
        """Return a document, [n], by its place in the block."""
        return self.tokens[self.bounds[place] : self.bounds[place + 1]]


class GeneratedDocuments:
    """`Documents` of a generated source, which is read a block at a time.

    A training set of fixed size is kept once it has been generated; of an endless source the last block is.

    Args:
        encode: tokenizer of the run, or None where it is the source's own: ids are then generated without text.
    """

    def __init__(self, source: GeneratedSource, encode: Encode | None):
        self.name, self.option, self.block_size = source.name, source.option, source.block_size
        self._source, self._encode = source, encode
        self._blocks: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}}  # generated again elsewhere, faster than sent

    @property
    def is_endless(self) -> bool:
        """Whether no document comes a second time."""
        return len(self) == ENDLESS

    def read(self, index: int) -> np.ndarray:
        block, place = divmod(index, self.block_size)
        return self.read_block(block).read(place)

    def read_block(self, block: int) -> Block:
        """Return documents block * block_size, block * block_size + 1, ..., block_size of them or up to the last one."""
        if block not in self._blocks:
            if self.is_endless:
                self._blocks.clear()
            self._blocks[block] = self._make_block(block)
        return self._blocks[block]

    def _make_block(self, block: int) -> Block:
        if self._encode is None:
            tokens, lengths = self._source.read_block_ids(block)
        else:
            documents = [self._encode(text) for text in self._source.read_block_texts(block)]
            tokens, lengths = np.concatenate(documents), np.asarray([len(ids) for ids in documents])
        return Block(tokens, [0, *lengths.cumsum().tolist()])


class TokenizedShards:
    """Documents of a streaming source, which can only be read in order, shard by shard."""

    def __init__(self, source: StreamingSource, encode: Encode):
        self.name, self.option, self.num_shards = source.name, source.option, source.num_shards
        self.source, self._encode = source, encode

    def read_shard(self, shard: int, row: int, part: Part = WHOLE) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield row and document, as `Documents.read` returns it, of the rows in a part of a shard, from a row on.

        Raises:
            UserError: the shard cannot be read.
        """
        for place, text in enumerate(self.source.read_shard(shard, row), start=row):
            if part.includes(place):
                yield place, None if text is None else self._encode(text)


def open_documents(
    corpus: Corpus, section: str, tokenizer: PreTrainedTokenizerFast, generators: Generators | None = None
) -> Documents | TokenizedShards:
    """Open the corpus that `{section}.dataset` names, as token ids.

    Args:
        generators: options of generated datasets, where they may be asked for.

    Raises:
        UserError: it cannot be read, holds nothing, or was tokenized by another tokenizer.
    """
    if corpus.dataset == TOKENS_FORMAT:
        origin = Origin(corpus, section)
        option = f"{origin.option} ({section}.data_files = {corpus.data_files})"
        return open_token_folder(corpus.data_files, option, origin.name, tokenizer)
    source, encode = open_source(corpus, section, generators), partial(encode_document, tokenizer)
    if isinstance(source, GeneratedSource):
        assert generators is not None
        own = build_generated_tokenizer(corpus.dataset, generators)
        is_own = fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(own)  # also where it comes with exported weights
        return GeneratedDocuments(source, None if is_own else encode)
    return TokenizedShards(source, encode) if isinstance(source, StreamingSource) else TokenizedSource(source, encode)
