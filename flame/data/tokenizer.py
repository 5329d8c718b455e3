"""Loads the tokenizer of a run: a built-in one, one that a data source builds, or one from a folder or the Hub.

Used in step 2 of the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flame.config.addresses import is_remote
from flame.config.run import BYTES_TOKENIZER
from flame.config.types import Section
from flame.data.encoding import END_OF_TEXT
from flame.data.sources.registry import find_tokenizer_kind
from flame.errors import UserError, give_reason
from flame.runtime.hub import find_folder

PADDING = "<|pad|>"
TOKENIZER_FILES = ["*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*", "config.json"]
"""Files of a Hub model that its tokenizer may need."""
TOKENIZER_FILE, SETTINGS_FILE, PIECES_FILE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
MODEL_FILE = "config.json"
GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of transformers' class for any tokenizer.json, of version 4 and 5."""
SAMPLE = ("Hello  world 12345, it's\n\n\tx: ABC's", " é e\u0301 漢字 ✓ <b>\r\n  y_z 1 22")
"""Texts that tokenizers split in different ways."""
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<｜end▁of▁sentence｜>")
"""What tokenizers call the end of a text."""
ONLY_PIECES = (
    f"it has a SentencePiece model ({PIECES_FILE}) and no {TOKENIZER_FILE}: pip install sentencepiece protobuf, which convert "
    f"it, or give a folder with a {TOKENIZER_FILE}"
)


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
    place = find_folder(option, path, [*TOKENIZER_FILES, "*.py"]) if is_remote(path) else os.path.expanduser(path)
    if os.path.isfile(place):
        folder = os.path.dirname(place)
        if os.path.basename(place) != TOKENIZER_FILE or not os.path.exists(os.path.join(folder, SETTINGS_FILE)):
            return _load_file(place, option)
        place = folder or "."
        path = path if is_remote(path) else place
    if os.path.isfile(os.path.join(place, TOKENIZER_FILE)) and not os.path.exists(os.path.join(place, SETTINGS_FILE)):
        return _load_file(os.path.join(place, TOKENIZER_FILE), option)
    if _has_only_pieces(place):
        raise UserError(f"{option} cannot be loaded: {ONLY_PIECES}")
    if not is_remote(path):
        found = find_folder(option, path, TOKENIZER_FILES)
        place = place if trust_remote_code else found  # code that comes along is looked up by the Hub name
    try:
        tokenizer = _choose_loader(place).from_pretrained(place, trust_remote_code=trust_remote_code)
        tokenizer.name_or_path = path
    except Exception as error:  # the Hub client, the JSON readers and the tokenizers raise many types
        reason = give_reason(error)
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own: set model.trust_remote_code = true to run it, if you trust it"
        raise UserError(
            f"{option} cannot be loaded as a tokenizer ({reason}): give a folder with tokenizer.json, "
            f'a Hub name that can be reached, or "{BYTES_TOKENIZER}"'
        ) from error
    if fault := find_misread(place, tokenizer):
        raise UserError(f"{option}: {fault}: copy {TOKENIZER_FILE} alone into another folder and give that")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{option} is a {type(tokenizer).__name__}: only tokenizers with a tokenizer.json are supported")
    if tokenizer.eos_token_id is None:
        raise UserError(f'{option} has no eos token, which ends each document: set "eos_token" in its tokenizer_config.json')
    return tokenizer


def find_misread(folder: str, tokenizer: Any) -> str | None:
    """Why a tokenizer of `AutoTokenizer` is another than the `tokenizer.json` that it was loaded from; None if it is the same.

    For some families, such as qwen2, `AutoTokenizer` takes the family's class and not the general one that the settings name.
    That class keeps the vocabulary alone, and splits a text in its own way.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or _read_class(folder) not in GENERAL_CLASSES:
        return None
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    if all(
        tokenizer(text, add_special_tokens=False)["input_ids"] == plain.encode(text, add_special_tokens=False) for text in SAMPLE
    ):
        return None
    return (
        f"transformers reads it as {type(tokenizer).__name__}, the class of the model beside it, which makes other ids of a text "
        f"than its {TOKENIZER_FILE}"
    )


def _read_class(folder: str) -> str | None:
    """The class that the settings in a folder name, without code of its own."""
    try:
        with open(os.path.join(folder, SETTINGS_FILE), encoding="utf-8") as file:
            settings = json.load(file)
        return None if "auto_map" in settings else settings.get("tokenizer_class")
    except (OSError, ValueError, AttributeError, TypeError):  # loading it reports what is wrong
        return None


def _choose_loader(folder: str) -> Any:
    """`AutoTokenizer`, or the class that it would choose where that is certain: importing `AutoTokenizer` also loads torch, which
    takes a second. It is certain where the settings name the general class and no model stands beside them."""
    if not os.path.exists(os.path.join(folder, MODEL_FILE)) and _read_class(folder) in GENERAL_CLASSES:
        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _load_file(path: str, option: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.json without the settings that name its end-of-text token, which is found by its name."""
    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"{option} cannot be loaded as a tokenizer ({give_reason(error)}): give a tokenizer.json") from error
    found = [name for name in END_NAMES if backend.token_to_id(name) is not None]
    if len(found) != 1:
        what = f"several tokens that may end a text ({', '.join(found)})" if found else "no end-of-text token of a known name"
        raise UserError(
            f'{option} has {what}: write {{"eos_token": "..."}} into a {SETTINGS_FILE} beside it, as {TOKENIZER_FILE}, and give '
            "the folder"
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=found[0], name_or_path=path)


def _has_only_pieces(folder: str) -> bool:
    """Whether this is a folder with a SentencePiece model and without what reads it."""
    if not os.path.isfile(os.path.join(folder, PIECES_FILE)) or os.path.exists(os.path.join(folder, TOKENIZER_FILE)):
        return False
    return find_spec("sentencepiece") is None


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
