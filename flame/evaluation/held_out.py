"""Reads the documents of a held-out set, from any source that a run can train on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.config.evaluation import HeldOut
from flame.data.sources.base import SourceKind, open_texts
from flame.data.sources.contents import Conversation, Document
from flame.errors import UserError
from flame.evaluation.measured import decode


def read_held_out(kind: SourceKind, corpus: HeldOut, tokenizer: PreTrainedTokenizerFast) -> list[str | tuple[np.ndarray, int]]:
    """The first `num_documents` documents of a source: texts, or token ids with the bytes of their text.

    Raises:
        UserError: the source cannot be opened, holds chats, or has no document of two tokens.
    """
    found: list[str | tuple[np.ndarray, int]] = []
    for document in islice(_list_documents(kind, tokenizer), corpus.num_documents):
        if isinstance(document, Conversation):
            raise UserError(f"{kind.option} holds chats, which have no bytes of their own: give texts, or token ids")
        found.append(document if isinstance(document, str) else _describe_ids(document, tokenizer))
    if not found:
        raise UserError(f"{kind.option} has no usable text to evaluate: check the data, or leave [{kind.section}] out")
    return found


def _list_documents(kind: SourceKind, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """All documents but bad rows, in the order of the source."""
    tokens = kind.open_tokens(tokenizer)
    if tokens is not None:
        rows: Iterator = (tokens.read(index) for index in range(len(tokens)))
    else:
        texts: Any = open_texts(kind)
        if not hasattr(texts, "num_shards"):
            rows = (texts.read(index) for index in range(len(texts)))
        else:
            rows = (row for shard in range(texts.num_shards) for row in texts.read_shard(shard, 0))
    return (row for row in rows if row is not None)


def _describe_ids(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, int]:
    """Ids without the end of text, and the bytes of the text that they stand for."""
    ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_token_id else ids
    return ids, len(decode(tokenizer, ids.tolist()).encode())
