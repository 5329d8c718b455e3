"""The endless documents of one stream, epoch after epoch, starting at any cursor.

A source has n units: documents, or shards of documents. Each epoch has a new seeded order of the units. The unit with ordinal
k = epoch * n + position belongs to stream k % S of S. Step 3 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from flame.data.documents import Subset, TokenizedShards, TokenizedSource
from flame.data.encoding import Labelled
from flame.data.order import shuffled_index
from flame.data.sources.base import Documents
from flame.data.tasks.generated import ENDLESS, Block, GeneratedDocuments
from flame.errors import UserError


class Cursor(NamedTuple):
    """Position of the next token of a stream. Later positions compare greater."""

    epoch: int
    position: int
    """Position of the document, or shard, in the order of the epoch. This is not its number in the source."""
    row: int
    """Row inside the shard; 0 if units are documents."""
    offset: int
    """Tokens of the document that are already used."""


class StreamDocument(NamedTuple):
    """One document of a stream."""

    document: int | str
    """Row number in the source, or "shard/row"."""
    tokens: np.ndarray | None
    """None for a bad row."""
    epoch: int
    following: Cursor
    """Start of the next document."""
    spans: np.ndarray | None = None
    """int64 [k, 2]: tokens [start, end) that count, if the source says so."""


def make_document(document: int | str, content: np.ndarray | Labelled | None, epoch: int, following: Cursor) -> StreamDocument:
    """A document as its source has read it."""
    if isinstance(content, Labelled):
        return StreamDocument(document, content.tokens, epoch, following, content.spans)
    return StreamDocument(document, content, epoch, following)


class DocumentStream(Protocol):
    """The documents of one stream, in order."""

    option: str
    first: Cursor

    def read(self, cursor: Cursor) -> StreamDocument:
        """Return the document at any cursor of this stream, or the first one after it if the cursor is at the end of a shard.

        Raises:
            UserError: no document of the source is usable.
        """
        ...


def open_document_stream(
    documents: Documents | TokenizedShards, subset: Subset, stream: int, num_streams: int, seed: int
) -> DocumentStream:
    """Open stream `stream` of `num_streams`."""
    if isinstance(documents, TokenizedShards):
        return ShardStream(documents, subset, stream, num_streams, seed)
    if isinstance(documents, GeneratedDocuments) and documents.is_endless:
        return BlockStream(documents, stream, num_streams, seed)
    return IndexedStream(documents, subset, stream, num_streams, seed)


class IndexedStream:
    """Units are documents with random access: all cursors cost the same."""

    def __init__(self, documents: Documents, subset: Subset, stream: int, num_streams: int, seed: int):
        self.option = documents.option
        self._documents, self._subset = documents, subset
        self._stream, self._num_streams, self._seed = stream, num_streams, seed
        self._count = subset.count(len(documents))
        self.first = self._point_at(stream)
        self._misses = 0
        self._has_text = False

    def read(self, cursor: Cursor) -> StreamDocument:
        ordinal = cursor.epoch * self._count + cursor.position
        assert ordinal % self._num_streams == self._stream, f"{cursor} is not of stream {self._stream}"
        document = self._subset.locate(shuffled_index(cursor.position, self._count, self._seed, cursor.epoch))
        tokens = self._documents.read(document)
        self._misses = 0 if tokens is not None else self._misses + 1
        if self._misses == self._count:
            self._require_text()
            self._misses = 0
        return make_document(document, tokens, cursor.epoch, self._point_at(ordinal + self._num_streams))

    def _point_at(self, ordinal: int) -> Cursor:
        epoch, position = divmod(ordinal, self._count)
        return Cursor(epoch, position, 0, 0)

    def _require_text(self) -> None:
        """Read every row. As many misses in a row as there are rows can be chance, since each epoch shuffles the rows again."""
        rows = map(self._subset.locate, range(self._count))
        self._has_text = self._has_text or any(self._documents.read(row) is not None for row in rows)
        if not self._has_text:
            assert isinstance(self._documents, TokenizedSource), "others have no bad rows"
            raise UserError(self._documents.explain_no_text(f"{self._count} rows"))


class BlockStream:
    """Units are documents of an endless generated source. No document repeats, so only the blocks are in a seeded order. Each
    stream reads its own blocks, document after document.

    With S streams, the t-th document of stream s is in the block with ordinal (t // block_size) * S + s.
    """

    def __init__(self, documents: GeneratedDocuments, stream: int, num_streams: int, seed: int):
        self.option = documents.option
        self._documents = documents
        self._stream, self._num_streams, self._seed = stream, num_streams, seed
        self.first = Cursor(0, stream, 0, 0)
        self._ordinal = -1
        self._first_document = 0
        self._block: Block | None = None

    def read(self, cursor: Cursor) -> StreamDocument:
        turn, stream = divmod(cursor.position, self._num_streams)
        assert stream == self._stream, f"{cursor} is not of stream {self._stream}"
        blocks_before, index = divmod(turn, self._documents.block_size)
        ordinal = blocks_before * self._num_streams + stream
        if self._block is None or ordinal != self._ordinal:
            number = shuffled_index(ordinal, ENDLESS // self._documents.block_size, self._seed, epoch=0)
            self._ordinal, self._first_document = ordinal, number * self._documents.block_size
            self._block = self._documents.read_block(number)
        following = Cursor(0, cursor.position + self._num_streams, 0, 0)
        return StreamDocument(self._first_document + index, self._block.read(index), 0, following)


class ShardStream:
    """Units are shards, which are read in order. Opening a cursor skips the rows of its shard before it."""

    def __init__(self, shards: TokenizedShards, subset: Subset, stream: int, num_streams: int, seed: int):
        self.option = shards.option
        self._shards, self._subset = shards, subset
        self._stream, self._num_streams, self._seed = stream, num_streams, seed
        self.first = self._point_at(stream, 0)
        self._next: Cursor | None = None
        self._rows: Iterator[tuple[int, np.ndarray | Labelled | None]] = iter(())
        self._dry_shards = -1  # shards in a row without text; the first one does not count, as it may be entered in the middle
        self._has_text = False

    def read(self, cursor: Cursor) -> StreamDocument:
        epoch, position, row, _ = cursor
        if self._next != cursor._replace(offset=0):
            self._open(epoch, position, row)
        ordinal = epoch * self._shards.num_shards + position
        while True:
            for row, tokens in self._rows:
                self._dry_shards = self._dry_shards if tokens is None else -1
                self._next = self._point_at(ordinal, row + 1)
                return make_document(f"{self._locate(epoch, position)}/{row}", tokens, epoch, self._next)
            self._dry_shards += 1
            if self._dry_shards > self._shards.num_shards:
                self._require_text()
                self._dry_shards = 0
            ordinal, row = ordinal + self._num_streams, 0
            epoch, position = divmod(ordinal, self._shards.num_shards)
            self._open(epoch, position, row)

    def _point_at(self, ordinal: int, row: int) -> Cursor:
        epoch, position = divmod(ordinal, self._shards.num_shards)
        return Cursor(epoch, position, row, 0)

    def _locate(self, epoch: int, position: int) -> int:
        return shuffled_index(position, self._shards.num_shards, self._seed, epoch)

    def _require_text(self) -> None:
        """Read all shards. That this stream found no text can be chance, since each epoch shuffles the shards again."""
        count = self._shards.num_shards
        if not self._has_text:
            self._has_text = any(
                tokens is not None for shard in range(count) for _, tokens in self._shards.read_shard(shard, 0, self._subset)
            )
        if not self._has_text:
            raise UserError(self._shards.explain_no_text(f"{count} shards"))

    def _open(self, epoch: int, position: int, row: int) -> None:
        self._rows = self._shards.read_shard(self._locate(epoch, position), row, self._subset)
