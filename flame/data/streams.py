"""Packing: a logical stream lays its documents end to end and cuts them into sequences of equal length.

The corpus is an endless line of documents: the one with ordinal k = epoch * n + position is document
`shuffled_index(position, n, seed, epoch)`. Stream s of S owns the ordinals k with k % S == s, whoever computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flame.data.order import shuffled_index
from flame.data.sources import Source
from flame.errors import UserError


class Cursor(NamedTuple):
    """The next token that a stream hands out. Later positions compare greater."""

    epoch: int
    position: int
    """Place in the order of the epoch, not the document's index in the source."""
    offset: int
    """Tokens of the document already handed out."""


class Piece(NamedTuple):
    """A run of tokens [start, end) of one document."""

    document: int
    start: int
    end: int
    epoch: int


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One row of T tokens made of S pieces, and how it came about."""

    input_ids: np.ndarray
    """int64 [T]"""
    cu_seqlens: np.ndarray
    """int32 [S+1], from 0 to T: where pieces begin and end."""
    stream: int
    cursor: Cursor
    """Where the stream's next sequence begins."""
    documents: list[Piece]
    """The S pieces, in order."""
    bad_rows: int
    """Rows passed over on the way."""


class Stream:
    """One logical stream. It keeps the tokens of its current document and nothing else: a `Cursor` is its whole state."""

    def __init__(
        self,
        source: Source,
        encode: Callable[[str], np.ndarray],
        index: int,
        num_streams: int,
        seq_len: int,
        context_len: int,
        seed: int,
    ):
        """
        Args:
            encode: token ids, integer [n] with n >= 1, of a document's text.
            index: which of the `num_streams` streams this is.
            seq_len: tokens in a sequence, T.
            context_len: longest piece, in tokens.
        """
        self._source, self._encode = source, encode
        self._index, self._num_streams = index, num_streams
        self._seq_len, self._context_len, self._seed = seq_len, context_len, seed
        self._opened: tuple[int, int, np.ndarray | None] | None = None
        self._has_text = False

    @property
    def first_cursor(self) -> Cursor:
        return self._point_at(self._index, 0)

    def next_sequence(self, cursor: Cursor) -> PackedSequence:
        """Pack the sequence that begins at `cursor`. Any cursor of this stream will do, at the same cost.

        Raises:
            UserError: no row of the source is usable.
        """
        input_ids = np.empty(self._seq_len, dtype=np.int64)
        pieces: list[Piece] = []
        boundaries = [0]
        bad_rows = misses = 0
        ordinal, offset = cursor.epoch * len(self._source) + cursor.position, cursor.offset
        assert ordinal % self._num_streams == self._index, f"{cursor} is not of stream {self._index}"
        while boundaries[-1] < self._seq_len:
            document, tokens = self._open(ordinal)
            if tokens is None:
                bad_rows, misses = bad_rows + 1, misses + 1
                if misses == len(self._source):
                    self._require_text()
                    misses = 0
                ordinal, offset = ordinal + self._num_streams, 0
                continue
            misses = 0
            if offset >= len(tokens):
                raise UserError(
                    f'training.dataset = "{self._source.name}": document {document} has {len(tokens)} tokens, but the checkpoint '
                    f"has used {offset} of it: the data or the tokenizer has changed; restore it, or start a new run"
                )
            start = boundaries[-1]
            length = min(self._context_len, self._seq_len - start, len(tokens) - offset)
            input_ids[start : start + length] = tokens[offset : offset + length]
            boundaries.append(start + length)
            pieces.append(Piece(document, offset, offset + length, ordinal // len(self._source)))
            offset += length
            if offset == len(tokens):
                ordinal, offset = ordinal + self._num_streams, 0
        cu_seqlens = np.asarray(boundaries, dtype=np.int32)
        return PackedSequence(input_ids, cu_seqlens, self._index, self._point_at(ordinal, offset), pieces, bad_rows)

    def _point_at(self, ordinal: int, offset: int) -> Cursor:
        return Cursor(*divmod(ordinal, len(self._source)), offset)

    def _open(self, ordinal: int) -> tuple[int, np.ndarray | None]:
        """Return the document at an ordinal and its tokens, or None for a bad row."""
        if self._opened is None or self._opened[0] != ordinal:
            epoch, position = divmod(ordinal, len(self._source))
            document = shuffled_index(position, len(self._source), self._seed, epoch)
            text = self._source.read(document)
            self._opened = (ordinal, document, None if text is None else self._encode(text))
        return self._opened[1:]

    def _require_text(self) -> None:
        """Look at every row. As many misses in a row as there are rows can be chance: each epoch deals the rows anew."""
        rows = len(self._source)
        self._has_text = self._has_text or any(self._source.read(row) is not None for row in range(rows))
        if not self._has_text:
            raise UserError(
                f'training.dataset = "{self._source.name}" yields no usable text: {rows} rows read, all empty, not text or '
                "undecodable: check the data and training.text_column"
            )
