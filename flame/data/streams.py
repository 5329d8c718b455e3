"""Packing: a logical stream lays the documents of its line end to end and cuts them into sequences of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from flame.data.lines import Cursor, Entry, Line
from flame.errors import UserError


class Piece(NamedTuple):
    """A run of tokens [start, end) of one document."""

    document: int | str
    """Row number in the source, or "shard/row" of a streaming one."""
    start: int
    end: int
    epoch: int
    is_last: bool
    """Whether the document ends with it."""


class Pieces(Sequence[Piece]):
    """Pieces as columns: between processes thousands of them travel as quickly as one."""

    def __init__(self, pieces: Sequence[Piece]):
        documents, starts, ends, epochs, are_last = zip(*pieces, strict=True) if pieces else ((),) * 5
        self._documents = np.asarray(documents, dtype=None if documents else np.int64)
        self._starts, self._ends, self._epochs = (np.asarray(column, dtype=np.int64) for column in (starts, ends, epochs))
        self._are_last = np.asarray(are_last, dtype=bool)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Piece]:
        return map(Piece._make, zip(*(column.tolist() for column in vars(self).values()), strict=True))

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> list[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | list[Piece]:
        if isinstance(index, slice):
            return list(map(Piece._make, zip(*(column[index].tolist() for column in vars(self).values()), strict=True)))
        return Piece._make(column[index].item() for column in vars(self).values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One row of T tokens made of S pieces, and how it came about."""

    input_ids: np.ndarray
    """int64 [T]"""
    cu_seqlens: np.ndarray
    """int32 [S+1], from 0 to T: where pieces begin and end."""
    source: str
    """Name of the source; a sequence holds documents of one source only."""
    stream: int
    cursor: Cursor
    """Where the next sequence of this stream of the source begins."""
    documents: Sequence[Piece]
    """The S pieces, in order."""
    bad_rows: int
    """Rows passed over on the way."""
    num_labels: np.ndarray | None = None
    """int64 [S]: how many tokens, the last ones of each piece, are labels. None: all that have a token before them."""

    def has_labels(self) -> bool:
        """Whether any token counts; not asked where all do."""
        return self.num_labels is None or bool(self.num_labels.any())


class Stream:
    """One logical stream of one source. It keeps its current document and nothing else: a `Cursor` is its whole state."""

    def __init__(self, line: Line, source: str, index: int, seq_len: int, context_len: int, separator: int | None = None):
        """
        Args:
            line: the stream's documents.
            source: name of their source.
            index: which stream this is.
            seq_len: tokens in a sequence, T.
            context_len: longest piece, in tokens.
            separator: token that ends the prompt of a document, where only answers count.
        """
        self._line, self._source, self._index = line, source, index
        self._seq_len, self._context_len, self._separator = seq_len, context_len, separator
        self._place: Cursor | None = None
        self._entry: Entry | None = None

    @property
    def first_cursor(self) -> Cursor:
        return self._line.first

    def next_sequence(self, cursor: Cursor) -> PackedSequence:
        """Pack the sequence that begins at `cursor`, any one of this stream.

        Raises:
            UserError: no row of the source is usable, or the document at the cursor is shorter than it was.
        """
        input_ids = np.empty(self._seq_len, dtype=np.int64)
        pieces: list[Piece] = []
        boundaries = [0]
        num_labels: list[int] = []
        filled = bad_rows = 0
        while filled < self._seq_len:
            document, tokens, epoch, following = self._open(cursor)
            if tokens is None:
                bad_rows += 1
                cursor = following
                continue
            offset = cursor.offset
            if offset >= len(tokens):
                raise UserError(
                    f"{self._line.option}: document {document} has {len(tokens)} tokens, but the checkpoint has used {offset} of "
                    "it: the data or the tokenizer has changed; restore it, or start a new run"
                )
            end = min(offset + self._context_len, offset + self._seq_len - filled, len(tokens))
            input_ids[filled : filled + end - offset] = tokens[offset:end]
            filled += end - offset
            boundaries.append(filled)
            if self._separator is not None:
                num_labels.append(_count_answer(tokens, self._separator, offset, end))
            pieces.append(Piece(document, offset, end, epoch, end == len(tokens)))
            cursor = following if end == len(tokens) else cursor._replace(offset=end)
        cu_seqlens = np.asarray(boundaries, dtype=np.int32)
        if self._separator is None:
            return PackedSequence(input_ids, cu_seqlens, self._source, self._index, cursor, Pieces(pieces), bad_rows)
        counts = np.asarray(num_labels, dtype=np.int64)
        return PackedSequence(input_ids, cu_seqlens, self._source, self._index, cursor, Pieces(pieces), bad_rows, counts)

    def _open(self, cursor: Cursor) -> Entry:
        """The document at a cursor, kept while it lasts."""
        place = cursor._replace(offset=0) if cursor.offset else cursor
        if self._entry is None or self._place != place:
            self._place, self._entry = place, self._line.read(place)
        return self._entry


def _count_answer(tokens: np.ndarray, separator: int, start: int, end: int) -> int:
    """Tokens of the piece [start, end) behind the first separator of the document, if the piece holds it from its beginning on.

    Without the whole prompt nobody could tell the answer, so pieces that begin later have none.
    """
    if start:
        return 0
    is_separator = tokens[:end] == separator
    place = int(is_separator.argmax())
    return end - 1 - place if is_separator[place] else 0
