"""Documents made of given tokens, and packing by its plain definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from flame.config.schema import Corpus
from flame.data.documents import TokenizedShards, TokenizedSource
from flame.data.order import shuffled_index
from flame.data.packing import Chunk
from flame.data.sources.base import SourceKind, TextRows, TextShards

Documents = list[list[int] | None]


@dataclass
class ListSource:
    rows: list[str | None]
    name: str = "list"
    option: str = 'training.dataset = "list"'

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> str | None:
        return self.rows[index]


class ListKind(SourceKind):
    """A source whose rows are given."""

    name = "list"

    def open(self) -> NoReturn:
        raise NotImplementedError


def tokenize_rows(rows: TextRows, encode: Callable[[str], np.ndarray], name: str = "list") -> TokenizedSource:
    section = "training" if name == ListKind.name else f"sources.{name}"
    return TokenizedSource(ListKind(Corpus(dataset=ListKind.name), section), rows, encode)


def tokenize_shards(shards: TextShards, encode: Callable[[str], np.ndarray]) -> TokenizedShards:
    return TokenizedShards(ListKind(Corpus(dataset=ListKind.name), "training"), shards, encode)


def encode_numbers(text: str) -> np.ndarray:
    return np.asarray([int(word) for word in text.split()], dtype=np.int32)


def pack_plainly(
    documents: Documents, stream: int, num_streams: int, seq_len: int, context_len: int, seed: int, epochs: int
) -> list[tuple[list[int], list[Chunk]]]:
    """Rows (tokens, pieces) of a stream over `epochs` epochs, token by token; the last row may be short."""
    tokens = []
    for ordinal in range(stream, epochs * len(documents), num_streams):
        epoch, position = divmod(ordinal, len(documents))
        document = shuffled_index(position, len(documents), seed, epoch)
        for offset, token in enumerate(documents[document] or []):
            tokens.append((ordinal, epoch, document, offset, token))
    rows = []
    for start in range(0, len(tokens), seq_len):
        row = tokens[start : start + seq_len]
        chunks: list[Chunk] = []
        previous = None
        for ordinal, epoch, document, offset, _ in row:
            if ordinal != previous or chunks[-1].end - chunks[-1].start == context_len:
                chunks.append(Chunk(document, offset, offset, epoch, False))
            is_last = offset + 1 == len(documents[document] or [])
            chunks[-1] = chunks[-1]._replace(end=offset + 1, is_last=is_last)
            previous = ordinal
        rows.append(([token for *_, token in row], chunks))
    return rows
