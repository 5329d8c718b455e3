"""Text to token ids: the tokenizer of a run, and the ids of one document."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame.config import BYTES_TOKENIZER, GENERATED, PATHSTAR, Generators
from flame.data.pathstar import MARKS
from flame.data.siblings import SEPARATOR
from flame.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def load_tokenizer(path: str, trust_remote_code: bool = False, generators: Generators | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `model.tokenizer_path` names: "bytes", "pathstar", "siblings", a folder or a Hub name.

    Args:
        generators: options of generated datasets, which their tokenizers need.

    Raises:
        UserError: it cannot be loaded, or has no end-of-text token to end documents with.
    """
    if path == BYTES_TOKENIZER:
        return build_bytes_tokenizer()
    if path in GENERATED:
        if generators is None:
            raise UserError(f'tokenizer "{path}" depends on [{path}], so it exists in training runs only: give another')
        return build_generated_tokenizer(path, generators)
    option = f'model.tokenizer_path = "{path}"'
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # the Hub client, the JSON readers and the tokenizers each raise kinds of their own
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
    """Build the tokenizer whose id b is the byte b of the UTF-8 text, with 256 for the end of a text and 257 for padding."""
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


def build_generated_tokenizer(dataset: str, generators: Generators) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a generated dataset: id i is the label i; then come the marks, and the end of a text.

    The marks are `| / =` of "pathstar", and of "siblings" the parents, `/0`, `/1` and so on, then `=`. Commas have no tokens:
    they part labels that follow on each other, and decoding puts them there. Other text raises.
    """
    if dataset == PATHSTAR:
        labels, marks, pattern = generators.pathstar.labels, [*MARKS], "[0-9]+|."
    else:
        options = generators.siblings
        labels, pattern = options.parents * options.children, "/?[0-9]+|."
        marks = [*(f"/{parent}" for parent in range(options.parents)), SEPARATOR]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*map(str, range(labels)), *marks])}))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", "removed"), pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    comma = decoders.Replace(Regex("(?<=[0-9]) (?=[0-9])"), ",")
    # WordPiece's decoder is the one that puts a space between tokens; no token here begins with "##"
    parted = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), comma, decoders.Replace(" ", "")]
    backend.decoder = decoders.Sequence(parted)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False, name_or_path=dataset
    )


def find_separator(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Id of the token that `training.answer_separator` spells.

    Raises:
        UserError: the tokenizer makes another number of tokens of it.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        ids = backend.encode(text, add_special_tokens=False).ids
    except Exception:  # what a tokenizer without a token for unknown text raises
        ids = []
    if len(ids) != 1:
        raise UserError(
            f"training.answer_separator = {json.dumps(text)} is {len(ids)} tokens of model.tokenizer_path = "
            f'"{tokenizer.name_or_path}": give the text of exactly one'
        )
    return ids[0]


def _list_byte_symbols() -> dict[str, int]:
    """Map the printable character by which byte-level tokenizers write a byte to that byte."""
    written_as_itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in written_as_itself]
    return {chr(byte): byte for byte in written_as_itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Sha-256 of all that decides the ids of a document. Padding and truncation, which calls change, are not part of it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {part: backend.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")}
    text = json.dumps([deciding, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Return a document's token ids, int32 [n], n >= 1: the tokenizer's own ids, ending with eos.

    Names of special tokens inside the text are text: a document that contains "<|endoftext|>" does not end there.
    """
    return encode_documents(tokenizer, [text])[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Return what `encode_document` returns for each text, faster than one by one. Threads are up to TOKENIZERS_PARALLELISM."""
    backend = tokenizer.backend_tokenizer
    # Documents are encoded whole, and the text never means a special token. Calls of `tokenizer` set all three for themselves.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = True
    documents = []
    for encoding in backend.encode_batch_fast(texts):  # "fast" leaves out where in the text each token is
        ids = encoding.ids
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        documents.append(np.asarray(ids, dtype=np.int32))
    return documents
