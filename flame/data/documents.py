"""Documents as token ids, and the subset of them that is read (training or held out).

Step 2 in the life of a batch (`flame.data.loader`). Texts are tokenized one by one, when they are read. Folders of tokens and
generated tasks provide ids directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flame.data.chats import ASSISTANT, PreparedRows, PreparedShards, explain_no_chats, prepare_rows
from flame.data.encoding import Labelled, encode_chat, encode_document
from flame.data.sources.base import Documents, SourceKind, TextRows, TextShards, explain_no_text, open_texts
from flame.data.sources.contents import Document
from flame.data.sources.token_folder import LabelledFolder, TokenFolder
from flame.data.tasks.reasoning_gym import ProblemDocuments
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[Any], np.ndarray | Labelled]


class Subset(NamedTuple):
    """Which rows of a source, or of each of its shards, are read: all, all except every `every`-th, or only every `every`-th."""

    every: int = 0
    is_held_out: bool = False

    def count(self, rows: int) -> int:
        """How many of `rows` rows belong to this subset."""
        if not self.every:
            return rows
        held_out = -(-rows // self.every)
        return held_out if self.is_held_out else rows - held_out

    def locate(self, index: int) -> int:
        """Row number in the source of the subset's row `index`."""
        if not self.every:
            return index
        return index * self.every if self.is_held_out else index + index // (self.every - 1) + 1

    def includes(self, row: int) -> bool:
        """Whether a row belongs to this subset."""
        return not self.every or (row % self.every == 0) == self.is_held_out

    def select(self, values: np.ndarray) -> np.ndarray:
        """Of the values [n] of all rows, those of this subset."""
        if not self.every:
            return values
        return values[(np.arange(len(values)) % self.every == 0) == self.is_held_out]


WHOLE = Subset()


class _Tokenized:
    """A source of texts together with the tokenizer."""

    def __init__(self, kind: SourceKind, rows: Any, encode: Encode):
        self.name, self.option = kind.short_name, kind.option
        self._kind, self._rows, self._encode = kind, rows, encode

    @property
    def chat_template(self) -> str:
        """SHA-256 of what renders chats; empty for other documents."""
        return self._rows.chat_template if isinstance(self._rows, PreparedRows | PreparedShards) else ""

    @property
    def _stored(self) -> Any:
        """The rows as they are stored."""
        return self._rows.rows if isinstance(self._rows, PreparedRows | PreparedShards) else self._rows

    def explain_no_text(self, read: str) -> str:
        """The error line for a source without any text; `read` says how much was read, such as "3 rows"."""
        line = explain_no_text(self._kind, self._stored, read)
        return f"{line}; or the chat template of model.tokenizer_path refuses all chats" if self.chat_template else line


class TokenizedSource(_Tokenized):
    """`Documents` of texts."""

    _rows: TextRows

    def __len__(self) -> int:
        return len(self._rows)

    def read_untokenized(self, index: int) -> Document | None:
        """The document as it is stored, None for a bad row."""
        return self._stored.read(index)

    def read(self, index: int) -> np.ndarray | Labelled | None:
        text = self._rows.read(index)
        return None if text is None else self._encode(text)


class TokenizedShards(_Tokenized):
    """Documents of texts that can only be read in order, shard by shard."""

    _rows: TextShards

    @property
    def num_shards(self) -> int:
        return self._rows.num_shards

    def read_shard(self, shard: int, row: int, subset: Subset = WHOLE) -> Iterator[tuple[int, np.ndarray | Labelled | None]]:
        """Yield row number and document of each row of a shard, starting at `row`. Documents are as from `Documents.read`.

        Args:
            subset: other rows are skipped.

        Raises:
            UserError: the shard cannot be read.
        """
        for number, text in enumerate(self._rows.read_shard(shard, row), start=row):
            if subset.includes(number):
                yield number, None if text is None else self._encode(text)


def open_documents(kind: SourceKind, tokenizer: PreTrainedTokenizerFast, loss_on: str = "all") -> Documents | TokenizedShards:
    """Open a source as token ids.

    Args:
        loss_on: as `training.loss_on`. With "assistant", documents say which tokens count.

    Raises:
        UserError: it cannot be read, is empty, was tokenized by another tokenizer, or lacks what the loss is to be on.
    """
    tokens = kind.open_tokens(tokenizer)
    if isinstance(tokens, ProblemDocuments) and loss_on == "answer":
        return tokens.with_answers()
    if tokens is not None:
        if loss_on != ASSISTANT:
            return tokens
        if isinstance(tokens, TokenFolder) and tokens.has_labels:
            return LabelledFolder(tokens)
        raise UserError(explain_no_chats(kind.option, "holds tokens alone"))
    rows = prepare_rows(kind, open_texts(kind), tokenizer, loss_on)
    encode = partial(encode_chat if loss_on == ASSISTANT else encode_document, tokenizer)
    return TokenizedShards(kind, rows, encode) if hasattr(rows, "num_shards") else TokenizedSource(kind, rows, encode)
