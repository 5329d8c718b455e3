"""What a cell of a column can hold: a text, token ids, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Content = Literal["text", "ids", "chat"]

ROLE_KEYS = (("role", "content"), ("from", "value"))
"""Who speaks and what is said: of `messages`, and of ShareGPT's `conversations`."""
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names."""


class Conversation(NamedTuple):
    """The messages of a chat, as a chat template takes them: dicts with "role" and "content"."""

    messages: list[dict[str, Any]]

    def __len__(self) -> int:
        """Characters of what is said, for sharing out work."""
        return sum(len(str(message.get("content"))) for message in self.messages)


Document = str | np.ndarray | Conversation
"""A text, token ids int64 [n], n >= 1, or a chat."""
Decode = Callable[[Any], Document | None]
"""Returns what a cell holds, or None for a bad one. May raise UnicodeDecodeError."""


def classify_type(cell_type: pa.DataType) -> Content | None:
    """What a column of this Arrow type holds; None if it is no document."""
    import pyarrow.types as types

    if types.is_string(cell_type) or types.is_large_string(cell_type) or types.is_string_view(cell_type):
        return "text"
    if is_list(cell_type):
        value = cell_type.value_type
        if types.is_integer(value):
            return "ids"
        if types.is_struct(value) and any(set(keys) <= {field.name for field in value} for keys in ROLE_KEYS):
            return "chat"
    return None


def decode_dictionary(cell_type: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary column; any other type as it is."""
    import pyarrow.types as types

    return cell_type.value_type if types.is_dictionary(cell_type) else cell_type


def is_list(cell_type: pa.DataType) -> bool:
    """Whether this is an Arrow type of lists."""
    import pyarrow.types as types

    return types.is_list(cell_type) or types.is_large_list(cell_type) or types.is_fixed_size_list(cell_type)


def classify_values(values: Iterable[Any]) -> Content:
    """What a column of JSON values holds: text if any is one, which ends the search."""
    found: set[Content] = set()
    for value in values:
        kind = _classify_value(value)
        if kind == "text":
            return kind
        found |= {kind} if kind else set()
    return "ids" if "ids" in found else "chat" if "chat" in found else "text"


def _classify_value(value: Any) -> Content | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    if all(type(each) is int for each in value):
        return "ids"
    return "chat" if all(isinstance(each, dict) for each in value) else None


def decode_text_cell(value: Any) -> str | None:
    """A text that can be encoded, or None."""
    text = keep_text(value)
    return text if text is None or is_encodable(text) else None


def decode_ids(value: Any) -> np.ndarray | None:
    """Token ids, int64 [n], n >= 1, or None."""
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        return None
    try:
        return np.asarray(value, dtype=np.int64)
    except OverflowError:
        return None


def decode_chat(value: Any) -> Conversation | None:
    """The messages of a chat, or None. Keys without a value are left out."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    messages = [_read_message({key: each for key, each in message.items() if each is not None}) for message in value]
    return Conversation([message for message in messages if message]) if all(messages) else None


def _read_message(message: dict[str, Any]) -> dict[str, Any] | None:
    for role_key, content_key in ROLE_KEYS:
        if isinstance(role := message.get(role_key), str):
            rest = {key: value for key, value in message.items() if key not in (role_key, content_key)}
            said = {"content": message[content_key]} if content_key in message else {}
            return {"role": ROLES.get(role, role) if role_key == "from" else role, **said, **rest}
    return None


def keep_text(value: object) -> str | None:
    """Return the value if it is a usable text, else None."""
    return value if isinstance(value, str) and not value.isspace() and value else None


def is_encodable(text: str) -> bool:
    """Whether the text can be encoded as UTF-8. "\\ud800" is a JSON string but half a character, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


DECODERS: dict[Content, Decode] = {"text": keep_text, "ids": decode_ids, "chat": decode_chat}
"""For cells of Arrow tables."""
