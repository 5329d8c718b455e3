"""Loads the tokenizer of a run: a built-in one, one that a data source builds, or one from a folder or the Hub.

Used in step 2 of the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame.config.run import BYTES_TOKENIZER
from flame.config.types import Section
from flame.data.encoding import END_OF_TEXT
from flame.data.sources.registry import find_tokenizer_kind
from flame.errors import UserError

PADDING = "<|pad|>"


def load_tokenizer(
    path: str, trust_remote_code: bool = False, find_options: Callable[[type[Section]], Section] | None = None
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of `model.tokenizer_path`: "bytes", a data source with its own tokenizer, a folder or a Hub name.

    Args:
        find_options: returns the options of a data source (`JobConfig.get`). Without it, tokenizers that need some are refused.

    Raises:
        UserError: it cannot be loaded, or has no end-of-text token.
    """
    if path == BYTES_TOKENIZER:
        return build_bytes_tokenizer()
    kind = find_tokenizer_kind(path)
    if kind is None:
        return _load_pretrained(path, trust_remote_code)
    if kind.Options is None:
        return kind.build_tokenizer(None)
    if find_options is None:
        raise UserError(
            f'model.tokenizer_path = "{path}": this tokenizer depends on [{kind.Options.section}], so it exists in training runs '
            "only: give another"
        )
    return kind.build_tokenizer(find_options(kind.Options))


def _load_pretrained(path: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    option = f'model.tokenizer_path = "{path}"'
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # the Hub client, the JSON readers and the tokenizers raise many types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own: set model.trust_remote_code = true to run it, if you trust it"
        raise UserError(
            f"{option} cannot be loaded as a tokenizer ({reason}): give a folder with tokenizer.json, "
            f'a Hub name that can be reached, or "{BYTES_TOKENIZER}"'
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{option} is a {type(tokenizer).__name__}: only tokenizers with a tokenizer.json are supported")
    if tokenizer.eos_token_id is None:
        raise UserError(f'{option} has no eos token, which ends each document: set "eos_token" in its tokenizer_config.json')
    return tokenizer


def build_bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte tokenizer: id b is byte b of the UTF-8 text, 256 is end of text, 257 is padding."""
    backend = Tokenizer(models.BPE(vocab=_list_byte_symbols(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        name_or_path=BYTES_TOKENIZER,
    )


def _list_byte_symbols() -> dict[str, int]:
    """Bytes by the printable character that byte-level tokenizers write for them."""
    written_as_itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in written_as_itself]
    return {chr(byte): byte for byte in written_as_itself} | {chr(256 + i): byte for i, byte in enumerate(others)}
