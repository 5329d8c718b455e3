"""Turns text into token ids.

Step 2 in the life of a batch (`flame.data.loader`). `flame.data.tokenizer` loads the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""End-of-text token of the tokenizers that this package builds."""


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides the ids of a document. It leaves out padding and truncation, which calls change."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {part: backend.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")}
    text = json.dumps([deciding, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Return a document's token ids, int32 [n], n >= 1, ending with eos.

    Names of special tokens inside the text are encoded as text: a document that contains "<|endoftext|>" does not end there.
    """
    return encode_documents(tokenizer, [text])[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Apply `encode_document` to each text, but faster. TOKENIZERS_PARALLELISM decides on threads."""
    backend = tokenizer.backend_tokenizer
    # Encode whole documents, and no part of them as a special token. Calls of `tokenizer` itself set all three again.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = True
    documents = []
    for encoding in backend.encode_batch_fast(texts):  # "fast" does not compute the offsets of tokens in the text
        ids = encoding.ids
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
