"""Documents of a corpus as packed sequences of bounded length, for commands that read an export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flame.config.data import Corpus
from flame.data.encoding import encode_document
from flame.data.sources.registry import open_text_source
from flame.errors import UserError

SECTION = "--"  # errors of the shared code say `{section}.{option}`


class Documents(NamedTuple):
    """Documents of a corpus, and where they stand in it."""

    tokens: list[Tensor]
    """int64 [n] each, n > 1."""
    rows: list[int]
    """Their rows, counted from 0."""
    num_read: int
    """Rows that were read: those from the first on that are not among `rows` have no text of two tokens."""
    num_rows: int
    """Of the corpus."""

    def list_skipped(self) -> list[int]:
        """Rows without a text of two tokens."""
        return sorted(set(range(self.num_read)).difference(self.rows))


def read_documents(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, num_tokens: int, longest: int) -> Documents:
    """Documents until they hold `num_tokens`; fewer if the corpus ends. Only the first `longest` tokens of a document are taken.

    Raises:
        UserError: the corpus cannot be read, or has no document of 2 tokens.
    """
    try:
        return _read(corpus, tokenizer, num_tokens, longest)
    except UserError as error:
        raise UserError(*(line.replace(f"{SECTION}.", SECTION) for line in error.lines)) from error


def _read(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, num_tokens: int, longest: int) -> Documents:
    source, rows = open_text_source(corpus, SECTION)
    documents: list[Tensor] = []
    places: list[int] = []
    held = num_read = 0
    for index in range(len(rows)):
        if held >= num_tokens:
            break
        num_read = index + 1
        row = rows.read(index)
        if row is None:
            continue
        if not isinstance(row, str):
            raise UserError(f"{source.option}: row {index} is no text: give a column of texts")
        tokens = torch.from_numpy(encode_document(tokenizer, row)[:longest]).long()
        if len(tokens) > 1:
            documents.append(tokens)
            places.append(index)
            held += len(tokens)
    if not documents:
        raise UserError(f"{source.option}: no document has two tokens or more")
    return Documents(documents, places, num_read, len(rows))


def pack(documents: Sequence[Tensor], most_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed sequences of whole documents, in order: int64 [T] and cu_seqlens int32 [S+1].

    Args:
        most_tokens: T is at most this, but for a single longer document.
    """
    held: list[Tensor] = []
    for document in documents:
        if held and sum(map(len, held)) + len(document) > most_tokens:
            yield _join(held)
            held = []
        held.append(document)
    if held:
        yield _join(held)


def _join(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, documents)])
    return torch.cat(documents), lengths.cumsum(0).int()
