"""Turns text into token ids.

Step 2 in the life of a batch (`flame.data.loader`). `flame.data.tokenizer` loads the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flame.errors import UserError, give_reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""End-of-text token of the tokenizers that this package builds."""


class Rendered(NamedTuple):
    """A chat as a chat template writes it."""

    text: str
    spans: list[tuple[int, int]] | None
    """Characters [start, end) that the assistant wrote, ascending; None if that is not asked."""

    def __len__(self) -> int:
        return len(self.text)


class Labelled(NamedTuple):
    """A document of which some tokens count."""

    tokens: np.ndarray
    """int32 [n]"""
    spans: np.ndarray
    """int64 [k, 2]: tokens [start, end) that count, ascending and apart."""


Row = str | np.ndarray | Rendered
"""A document yet to be encoded: a text, token ids int64 [n], or a chat."""


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides the ids of a document. It leaves out padding and truncation, which calls change."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {part: backend.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")}
    text = json.dumps([deciding, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_document(tokenizer: PreTrainedTokenizerFast, text: Row) -> np.ndarray:
    """Return a document's token ids, int32 [n], n >= 1, ending with eos.

    Names of special tokens inside the text are encoded as text: a document that contains "<|endoftext|>" does not end there.
    """
    return encode_documents(tokenizer, [text])[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[np.ndarray]:
    """Apply `encode_document` to each row, but faster. TOKENIZERS_PARALLELISM decides on threads.

    Token ids stay as they are. In rendered chats, names of special tokens are special tokens: the template writes them.
    """
    texts = [row for row in rows if isinstance(row, str)]
    if len(texts) == len(rows):
        return _encode_texts(tokenizer, texts)
    encoded = iter(_encode_texts(tokenizer, texts))
    return [next(encoded) if isinstance(row, str) else _encode_other(tokenizer, row) for row in rows]


def _encode_other(tokenizer: PreTrainedTokenizerFast, row: np.ndarray | Rendered) -> np.ndarray:
    if isinstance(row, Rendered):
        return encode_chat(tokenizer, row).tokens
    return _end(tokenizer, row)


def encode_chat(tokenizer: PreTrainedTokenizerFast, chat: Rendered) -> Labelled:
    """Token ids of a rendered chat, ending with eos, and which of them the assistant wrote.

    A token counts if it holds a character of the assistant, as in transformers' own mask, or is between two that do. The eos that
    is added counts if the assistant's last turn ends the text: it ends that turn.
    """
    backend = tokenizer.backend_tokenizer
    _encode_whole(backend)
    backend.encode_special_tokens = False
    with _naming(tokenizer):
        encoding = backend.encode(chat.text, add_special_tokens=False)
    tokens = _end(tokenizer, np.asarray(encoding.ids, dtype=np.int64))
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    spans = []
    for start, end in chat.spans or ():
        held = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        if len(held):
            spans.append([held[0], held[-1] + 1])
    if spans and chat.spans and chat.spans[-1][1] == len(chat.text) and spans[-1][1] == len(encoding.ids):
        spans[-1][1] = len(tokens)
    return Labelled(tokens, _join_touching(spans))


def _join_touching(spans: list[list[int]]) -> np.ndarray:
    """int64 [k, 2]: the spans, those that share a token or touch as one."""
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return np.asarray(joined, dtype=np.int64).reshape(-1, 2)


@contextmanager
def _naming(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Name the tokenizer in errors of its library, which are bare exceptions."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f'model.tokenizer_path = "{tokenizer.name_or_path}" cannot encode a text ({give_reason(error)}): '
            "give a tokenizer that knows all text, or has a token for unknown text (unk_token)"
        ) from error


def _end(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> np.ndarray:
    """The ids, int32, ending with eos."""
    if len(ids) == 0 or ids[-1] != tokenizer.eos_token_id:
        ids = np.append(ids, tokenizer.eos_token_id)
    return ids.astype(np.int32)


def _encode_whole(backend: Tokenizer) -> None:
    """Encode whole documents. Calls of the tokenizer itself set both again."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()


def encode_continuations(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of texts that follow others, without tokens that begin or end a text: int32 [n], n >= 0 each.

    Raises:
        UserError: as `encode_documents`.
    """
    return [np.asarray(ids, dtype=np.int32) for ids in _encode_batch(tokenizer, texts, add_special_tokens=False)]


def _encode_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    _encode_whole(backend)
    # No part of a text is a special token. Calls of `tokenizer` itself set this again.
    backend.encode_special_tokens = True
    with _naming(tokenizer):
        # "fast" does not compute the offsets of tokens in the text
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def _encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    documents = []
    for ids in _encode_batch(tokenizer, texts, add_special_tokens=True):
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        documents.append(np.asarray(ids, dtype=np.int32))
    return documents


def find_separator(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Id of the token that `training.answer_separator` spells.

    Raises:
        UserError: the text is not exactly one token.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        ids = backend.encode(text, add_special_tokens=False).ids
    except Exception:  # a tokenizer without a token for unknown text
        ids = []
    if len(ids) != 1:
        raise UserError(
            f"training.answer_separator = {json.dumps(text)} is {len(ids)} tokens of model.tokenizer_path = "
            f'"{tokenizer.name_or_path}": give the text of exactly one'
        )
    return ids[0]
