"""Packing: joins the documents of one stream end to end and cuts them into sequences of equal length.

Step 4 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from flame.data.document_streams import Cursor, DocumentStream, StreamDocument
from flame.errors import UserError


class Chunk(NamedTuple):
    """The tokens [start, end) of one document."""

    document: int | str
    """Row number in the source, or "shard/row" of a streaming one."""
    start: int
    end: int
    epoch: int
    is_last: bool
    """Whether the document ends with this chunk."""


class ChunkTable(Sequence[Chunk]):
    """Chunks stored as columns, so that thousands of them are sent between processes as fast as one."""

    def __init__(self, chunks: Sequence[Chunk]):
        documents, starts, ends, epochs, are_last = zip(*chunks, strict=True) if chunks else ((),) * 5
        self._documents = np.asarray(documents, dtype=None if documents else np.int64)
        self._starts, self._ends, self._epochs = (np.asarray(column, dtype=np.int64) for column in (starts, ends, epochs))
        self._are_last = np.asarray(are_last, dtype=bool)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Chunk]:
        return map(Chunk._make, zip(*(column.tolist() for column in vars(self).values()), strict=True))

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if isinstance(index, slice):
            return list(map(Chunk._make, zip(*(column[index].tolist() for column in vars(self).values()), strict=True)))
        return Chunk._make(column[index].item() for column in vars(self).values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One row of T tokens, made of S chunks of documents."""

    input_ids: np.ndarray
    """int64 [T]"""
    cu_seqlens: np.ndarray
    """int32 [S+1], from 0 to T: boundaries of the chunks."""
    source: str
    """Name of the source. All documents of a sequence come from one source."""
    stream: int
    cursor: Cursor
    """Start of the next sequence of this stream."""
    documents: Sequence[Chunk]
    """The S chunks, in order."""
    bad_rows: int
    """Rows without usable text that were skipped."""
    label_spans: np.ndarray | None = None
    """int64 [k, 2]: the tokens [start, end) of the sequence that are labels, ascending and apart. None: all but the first of each
    chunk."""

    def has_labels(self) -> bool:
        """Whether any token counts as a label; always true if `label_spans` is None."""
        return self.label_spans is None or len(self.label_spans) > 0


class Packer:
    """Packs one stream of one source. It only caches its current document: a `Cursor` is its whole state."""

    def __init__(
        self, documents: DocumentStream, source: str, index: int, seq_len: int, context_len: int, separator: int | None = None
    ):
        """
        Args:
            documents: the stream to pack.
            source: name of its source.
            index: number of the stream.
            seq_len: tokens in a sequence, T.
            context_len: longest chunk, in tokens.
            separator: token that ends the prompt of a document, if only answers count. Documents that say themselves which
                tokens count need none.
        """
        self._documents, self._source, self._index = documents, source, index
        self._seq_len, self._context_len, self._separator = seq_len, context_len, separator
        self._opened_at: Cursor | None = None
        self._document: StreamDocument | None = None

    @property
    def first_cursor(self) -> Cursor:
        return self._documents.first

    def next_sequence(self, cursor: Cursor) -> PackedSequence:
        """Pack the sequence that begins at `cursor`, which may be any cursor of this stream.

        Raises:
            UserError: no row of the source is usable, or the document at the cursor is shorter than it was.
        """
        input_ids = np.empty(self._seq_len, dtype=np.int64)
        chunks: list[Chunk] = []
        boundaries = [0]
        spans: list[np.ndarray] | None = None
        filled = bad_rows = 0
        while filled < self._seq_len:
            document, tokens, epoch, following, counted = self._open(cursor)
            if tokens is None:
                bad_rows += 1
                cursor = following
                continue
            offset = cursor.offset
            if offset >= len(tokens):
                raise UserError(
                    f"{self._documents.option}: document {document} has {len(tokens)} tokens, but the checkpoint has used "
                    f"{offset} of it: the data or the tokenizer has changed; restore it, or start a new run"
                )
            end = min(offset + self._context_len, offset + self._seq_len - filled, len(tokens))
            input_ids[filled : filled + end - offset] = tokens[offset:end]
            filled += end - offset
            boundaries.append(filled)
            if counted is None and self._separator is not None:
                counted = find_answer(tokens[:end], self._separator)
            if counted is not None:
                spans = [*(spans or ()), clip_spans(counted, offset, end) + (filled - end)]
            chunks.append(Chunk(document, offset, end, epoch, end == len(tokens)))
            cursor = following if end == len(tokens) else cursor._replace(offset=end)
        cu_seqlens = np.asarray(boundaries, dtype=np.int32)
        labels = None if spans is None else np.concatenate(spans)
        return PackedSequence(input_ids, cu_seqlens, self._source, self._index, cursor, ChunkTable(chunks), bad_rows, labels)

    def _open(self, cursor: Cursor) -> StreamDocument:
        """The document at a cursor. It is cached, since several chunks may come from it."""
        start = cursor._replace(offset=0) if cursor.offset else cursor
        if self._document is None or self._opened_at != start:
            self._opened_at, self._document = start, self._documents.read(start)
        return self._document


def find_answer(tokens: np.ndarray, separator: int) -> np.ndarray:
    """The answer of a document: the tokens after its first separator, as int64 [k, 2] with k = 0 or 1."""
    is_separator = tokens == separator
    first = int(is_separator.argmax())
    return np.asarray([[first + 1, len(tokens)]] if is_separator[first] else [], dtype=np.int64).reshape(-1, 2)


def clip_spans(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """What of a document's spans is a label in its chunk [start, end): int64 [k, 2], in tokens of the document.

    The first token of a chunk is never predicted. A chunk that does not begin its document has no labels: its prompt is
    incomplete, so that what follows cannot be predicted.
    """
    clipped = np.clip(spans, 1, end)
    return clipped[(clipped[:, 0] < clipped[:, 1]) & (start == 0)]
