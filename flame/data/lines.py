"""The endless line of documents of one logical stream, epoch after epoch, from any cursor on.

Units, documents or shards of them, are lined up in a seeded order that is drawn anew in each epoch. The one with ordinal
k = epoch * n + position belongs to stream k % S of S, whoever computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from flame.data.documents import Block, Documents, GeneratedDocuments, Part, TokenizedShards, TokenizedSource
from flame.data.generated import ENDLESS
from flame.data.no_text import explain_no_text
from flame.data.order import shuffled_index
from flame.errors import UserError


class Cursor(NamedTuple):
    """The next token that a stream hands out. Later positions compare greater."""

    epoch: int
    position: int
    """Place of the document, or shard, in the order of the epoch. Not its number in the source."""
    row: int
    """Row inside the shard; 0 where units are documents."""
    offset: int
    """Tokens of the document already handed out."""


class Entry(NamedTuple):
    """One document of a line."""

    document: int | str
    """Row number in the source, or "shard/row"."""
    tokens: np.ndarray | None
    """None for a bad row."""
    epoch: int
    following: Cursor
    """Where the next document begins."""


class Line(Protocol):
    """The documents of one stream, in order."""

    option: str
    first: Cursor

    def read(self, cursor: Cursor) -> Entry:
        """Return the document at a cursor of this stream, wherever it is, or the first usable place behind it.

        Raises:
            UserError: no document of the source is usable.
        """
        ...


def open_line(documents: Documents | TokenizedShards, part: Part, stream: int, num_streams: int, seed: int) -> Line:
    """The line of stream `stream` of `num_streams`."""
    if isinstance(documents, TokenizedShards):
        return ShardLine(documents, part, stream, num_streams, seed)
    if isinstance(documents, GeneratedDocuments) and documents.is_endless:
        return BlockLine(documents, stream, num_streams, seed)
    return DocumentLine(documents, part, stream, num_streams, seed)


class DocumentLine:
    """Units are documents, read at random: any cursor costs the same."""

    def __init__(self, documents: Documents, part: Part, stream: int, num_streams: int, seed: int):
        self.option = documents.option
        self._documents, self._part = documents, part
        self._stream, self._num_streams, self._seed = stream, num_streams, seed
        self._count = part.count(len(documents))
        self.first = self._point_at(stream)
        self._misses = 0
        self._has_text = False

    def read(self, cursor: Cursor) -> Entry:
        ordinal = cursor.epoch * self._count + cursor.position
        assert ordinal % self._num_streams == self._stream, f"{cursor} is not of stream {self._stream}"
        document = self._part.locate(shuffled_index(cursor.position, self._count, self._seed, cursor.epoch))
        tokens = self._documents.read(document)
        self._misses = 0 if tokens is not None else self._misses + 1
        if self._misses == self._count:
            self._require_text()
            self._misses = 0
        return Entry(document, tokens, cursor.epoch, self._point_at(ordinal + self._num_streams))

    def _point_at(self, ordinal: int) -> Cursor:
        epoch, position = divmod(ordinal, self._count)
        return Cursor(epoch, position, 0, 0)

    def _require_text(self) -> None:
        """Look at every row. As many misses in a row as there are rows can be chance: each epoch deals the rows anew."""
        rows = map(self._part.locate, range(self._count))
        self._has_text = self._has_text or any(self._documents.read(row) is not None for row in rows)
        if not self._has_text:
            assert isinstance(self._documents, TokenizedSource), "others have no bad rows"
            raise UserError(explain_no_text(self._documents.source, f"{self._count} rows"))


class BlockLine:
    """Units are documents of an endless generated source. They never come again, so that one order is as good as another: the
    seeded one is of blocks, and each stream reads blocks of its own, document after document.

    The t-th document of stream s is in the block with ordinal (t // block_size) * S + s of S streams.
    """

    def __init__(self, documents: GeneratedDocuments, stream: int, num_streams: int, seed: int):
        self.option = documents.option
        self._documents = documents
        self._stream, self._num_streams, self._seed = stream, num_streams, seed
        self.first = Cursor(0, stream, 0, 0)
        self._ordinal = -1
        self._first_document = 0
        self._block: Block | None = None

    def read(self, cursor: Cursor) -> Entry:
        turn, stream = divmod(cursor.position, self._num_streams)
        assert stream == self._stream, f"{cursor} is not of stream {self._stream}"
        run, place = divmod(turn, self._documents.block_size)
        ordinal = run * self._num_streams + stream
        if self._block is None or ordinal != self._ordinal:
            number = shuffled_index(ordinal, ENDLESS // self._documents.block_size, self._seed, epoch=0)
            self._ordinal, self._first_document = ordinal, number * self._documents.block_size
            self._block = self._documents.read_block(number)
        following = Cursor(0, cursor.position + self._num_streams, 0, 0)
        return Entry(self._first_document + place, self._block.read(place), 0, following)


class ShardLine:
    """Units are shards, read in order: a cursor costs passing over the rows of its shard before it."""

    def __init__(self, shards: TokenizedShards, part: Part, stream: int, num_streams: int, seed: int):
        self.option = shards.option
        self._shards, self._part = shards, part
        self._stream, self._num_streams, self._seed = stream, num_streams, seed
        self.first = self._point_at(stream, 0)
        self._next: Cursor | None = None
        self._rows: Iterator[tuple[int, np.ndarray | None]] = iter(())
        self._dry_shards = -1  # ended in a row without any text in them; where reading starts in the middle, the first is not one
        self._has_text = False

    def read(self, cursor: Cursor) -> Entry:
        epoch, position, row, _ = cursor
        if self._next != cursor._replace(offset=0):
            self._open(epoch, position, row)
        ordinal = epoch * self._shards.num_shards + position
        while True:
            for row, tokens in self._rows:
                self._dry_shards = self._dry_shards if tokens is None else -1
                self._next = self._point_at(ordinal, row + 1)
                return Entry(f"{self._locate(epoch, position)}/{row}", tokens, epoch, self._next)
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
        """Look at all shards. That this stream has met only dry ones can be chance: each epoch deals the shards anew."""
        count = self._shards.num_shards
        if not self._has_text:
            self._has_text = any(
                tokens is not None for shard in range(count) for _, tokens in self._shards.read_shard(shard, 0, self._part)
            )
        if not self._has_text:
            raise UserError(explain_no_text(self._shards.source, f"{count} shards"))

    def _open(self, epoch: int, position: int, row: int) -> None:
        self._rows = self._shards.read_shard(self._locate(epoch, position), row, self._part)
