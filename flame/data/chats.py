"""Prepares the rows of a source for the tokenizer: checks token ids, and renders chats by the tokenizer's chat template.

Step 2 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from flame.data.encoding import Rendered
from flame.data.sources.base import SourceKind, TextRows, TextShards
from flame.data.sources.cells import CellRows
from flame.data.sources.contents import Conversation
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("flame")

ASSISTANT = "assistant"
USUAL_ROLES = frozenset({"system", "developer", "user", ASSISTANT, "tool", "function", "ipython", "environment", "observation"})
ASKED = 64
"""First chats whose roles are looked at."""
STARTED = datetime.now()
"""What templates take for the time: one that went on would make two renderings of a chat differ."""
GENERATION_MARK = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
"""In a chat template, it begins what the assistant writes."""


def prepare_rows(kind: SourceKind, rows: Any, tokenizer: PreTrainedTokenizerFast, loss_on: str = "all") -> Any:
    """The rows of a source as what the tokenizer takes: texts as they are, ids checked, chats rendered.

    Args:
        rows: `TextRows` or `TextShards`.
        loss_on: as `training.loss_on`. With "assistant", rendered chats say what the assistant wrote.

    Raises:
        UserError: the tokenizer has no chat template, or the rows are no chats where the loss is to be on the assistant's turns.
    """
    content = rows.content if isinstance(rows, CellRows) else "text"  # what users' sources call so is their own
    if loss_on == ASSISTANT and content != "chat":
        raise UserError(explain_no_chats(kind.option, f"holds {'token ids' if content == 'ids' else 'texts'}"))
    if content == "text":
        return rows
    prepare: IdChecker | ChatRenderer
    if content == "ids":
        prepare = IdChecker(kind.option, tokenizer)
    else:
        prepare = ChatRenderer(kind.option, tokenizer, loss_on == ASSISTANT)
        if loss_on == ASSISTANT and is_first_rank() and (unknown := find_unknown_roles(rows)):
            logger.warning(explain_unknown_roles(kind.option, unknown))
    return PreparedShards(rows, prepare) if hasattr(rows, "num_shards") else PreparedRows(rows, prepare)


def explain_no_chats(option: str, found: str) -> str:
    """The error line for a source without chats where the loss is to be on the assistant's turns."""
    return (
        f'training.loss_on = "{ASSISTANT}" needs chats, but {option} {found}: read files or a Hub dataset and name the column '
        f"of messages in its text_column, give a folder that flame-preprocess --loss_on {ASSISTANT} made of them, or set "
        'loss_on = "all"'
    )


def is_first_rank() -> bool:
    """Whether this process is to tell what all ranks find."""
    return os.environ.get("RANK", "0") == "0"


def find_unknown_roles(rows: Any) -> list[str]:
    """Roles that are no usual ones, of those of the first chats in which the assistant says nothing."""
    documents = rows.read_shard(0, 0) if hasattr(rows, "num_shards") else map(rows.read, range(len(rows)))
    try:
        chats = [chat.messages for chat in islice(documents, ASKED) if isinstance(chat, Conversation)]
    except UserError:  # reading them for training reports it
        return []
    silent = [messages for messages in chats if all(message["role"] != ASSISTANT for message in messages)]
    return sorted({message["role"] for messages in silent for message in messages} - USUAL_ROLES)


def explain_unknown_roles(option: str, roles: list[str]) -> str:
    """The warning for them."""
    shown = ", ".join(json.dumps(role, ensure_ascii=False) for role in roles[:5])
    return (
        f'training.loss_on = "{ASSISTANT}": nothing counts in chats of {option} without the role "{ASSISTANT}", and some '
        f'have the roles {shown}: if that is who is to be learned from, name it "{ASSISTANT}" in the data'
    )


class IdChecker:
    """Checks that token ids are in the vocabulary."""

    def __init__(self, option: str, tokenizer: PreTrainedTokenizerFast):
        self._option, self._tokenizer = option, tokenizer.name_or_path
        self._size = max(tokenizer.get_vocab().values()) + 1

    def __call__(self, ids: Any, row: str) -> np.ndarray:
        if ids.min() < 0 or ids.max() >= self._size:
            wrong = int(ids[(ids < 0) | (ids >= self._size)][0])
            raise UserError(
                f"{self._option}: row {row} holds the token id {wrong}, but model.tokenizer_path = "
                f'"{self._tokenizer}" has the ids 0 to {self._size - 1}: give the tokenizer that made the ids'
            )
        return ids


class ChatRenderer:
    """Renders chats.

    Args:
        with_spans: also find what the assistant wrote.
    """

    def __init__(self, option: str, tokenizer: PreTrainedTokenizerFast, with_spans: bool):
        self._option, self._tokenizer, self._with_spans = option, tokenizer, with_spans
        self._now = STARTED  # sent to workers
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f'{option} holds chats, but model.tokenizer_path = "{tokenizer.name_or_path}" has no chat template to render '
                "them: give a tokenizer with one (chat_template.jinja in its folder), or a column of texts"
            ) from error
        self.chat_template = hashlib.sha256(template.encode()).hexdigest()
        self._has_marks = GENERATION_MARK.search(template) is not None

    def __call__(self, chat: Conversation, row: str) -> Rendered | None:
        """Render a chat; None if the template refuses it.

        Raises:
            UserError: it cannot be told exactly what the assistant wrote.
        """
        if self._with_spans and self._has_marks:
            return self._render_with_marks(chat)
        text = self._render(chat.messages)
        if text is None or not text.strip():
            return None
        spans = self._find_turns(chat.messages, text, row) if self._with_spans else None
        return None if self._with_spans and spans is None else Rendered(text, spans)

    def _render(self, messages: list[dict[str, Any]], *, prompts: bool = False) -> str | None:
        try:
            return self._call_template(messages, add_generation_prompt=prompts)[0]
        except Exception:  # a template raises what it likes
            return None

    def _render_with_marks(self, chat: Conversation) -> Rendered | None:
        text = self._render(chat.messages)
        if text is None or not text.strip():
            return None
        again, spans = self._call_template(chat.messages, return_assistant_tokens_mask=True)
        assert again == text
        return Rendered(text, [(start, end) for start, end in spans if start < end])

    def _call_template(self, messages: list[dict[str, Any]], **settings: Any) -> tuple[str, list[tuple[int, int]]]:
        """Apply the chat template, with a clock that stands still.

        Returns:
            the text; with `return_assistant_tokens_mask`, characters [start, end) between the template's marks.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        template = self._tokenizer.get_chat_template()
        _compile_jinja_template(template).globals["strftime_now"] = self._now.strftime  # compiled once in each process
        if messages and "return_assistant_tokens_mask" not in settings:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **settings)
            assert isinstance(text, str)
            return text, []
        # The tokenizer's own method takes no empty chats, and gives no characters.
        given = self._tokenizer.special_tokens_map | settings
        rendered: Any = render_jinja_template([messages], chat_template=template, **given)
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _find_turns(self, messages: list[dict[str, Any]], text: str, row: str) -> list[tuple[int, int]] | None:
        """What the template writes for each message of the assistant behind its prompt. It is exact: the chat up to the message,
        with the prompt for an answer, and the chat up to the end of the message must be beginnings of the whole. None if the chat
        begins with the assistant and the template refuses to begin so."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:number], prompts=True)
            if before is None and number == 0:
                return None
            through = text if number + 1 == len(messages) else self._render(messages[: number + 1])
            if before is None or through is None or not (text.startswith(through) and through.startswith(before)):
                raise UserError(
                    f'training.loss_on = "{ASSISTANT}": the chat template of model.tokenizer_path = '
                    f'"{self._tokenizer.name_or_path}" renders message {number} of row {row} of {self._option} otherwise when it '
                    "is not the last or is yet to come, so that the assistant's tokens cannot be told exactly: put "
                    "{% generation %} and {% endgeneration %} around them in the template"
                )
            spans.append((len(before), len(through)))
        return spans


class PreparedRows:
    """`TextRows`, prepared."""

    def __init__(self, rows: TextRows, prepare: Any):
        self.rows, self._prepare = rows, prepare
        self.chat_template: str = getattr(prepare, "chat_template", "")
        """SHA-256 of what renders chats; empty for other documents."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Any:
        document = self.rows.read(index)
        return None if document is None else self._prepare(document, str(index))


class PreparedShards:
    """`TextShards`, prepared."""

    def __init__(self, rows: TextShards, prepare: Any):
        self.rows, self._prepare = rows, prepare
        self.num_shards = rows.num_shards
        self.chat_template: str = getattr(prepare, "chat_template", "")
        """As that of `PreparedRows`."""

    def read_shard(self, shard: int, row: int) -> Iterator[Any]:
        for number, document in enumerate(self.rows.read_shard(shard, row), start=row):
            yield None if document is None else self._prepare(document, f"{shard}/{number}")
