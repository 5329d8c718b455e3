"""Text to token ids: the tokenizer of a run, and the ids of one document."""

from __future__ import annotations

import os

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame.config import BYTES_TOKENIZER
from flame.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `model.tokenizer_path` names: "bytes", a folder or a Hub name.

    Raises:
        UserError: it cannot be loaded, or has no end-of-text token to end documents with.
    """
    if path == BYTES_TOKENIZER:
        return build_bytes_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path))
    except Exception as error:  # the Hub client, the JSON readers and the tokenizers each raise kinds of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f'model.tokenizer_path = "{path}" cannot be loaded as a tokenizer ({reason}): give a folder with tokenizer.json, '
            f'a Hub name that can be reached, or "{BYTES_TOKENIZER}"'
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f'model.tokenizer_path = "{path}" is a {type(tokenizer).__name__}: '
            "only tokenizers with a tokenizer.json are supported"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f'model.tokenizer_path = "{path}" has no eos token, which ends each document: '
            'set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def build_bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer whose id b is the byte b of the UTF-8 text, with 256 for the end of a text and 257 for padding."""
    backend = Tokenizer(models.BPE(vocab=_list_byte_symbols(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PADDING, clean_up_tokenization_spaces=False
    )


def _list_byte_symbols() -> dict[str, int]:
    """Map the printable character by which byte-level tokenizers write a byte to that byte."""
    written_as_itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in written_as_itself]
    return {chr(byte): byte for byte in written_as_itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Return a document's token ids, int32 [n], n >= 1: the tokenizer's own ids, ending with eos.

    Names of special tokens inside the text are text: a document that contains "<|endoftext|>" does not end there.
    """
    ids = tokenizer(
        text,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model's context are cut later, so no warning about them
    )["input_ids"]
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int32)
