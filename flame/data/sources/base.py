"""The base class of data sources. The value of `dataset` names a source.

A kind of source declares which options it reads, checks them, and opens its documents, either as texts or as token ids. Texts are
tokenized while they are packed. `flame.data.sources.registry` finds the kind by name. This module and the checks of all kinds
load no torch, transformers or datasets, so that mistakes in options are reported at once.

Step 1 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from flame.config.types import Section
from flame.data.sources.contents import Document, is_encodable, keep_text
from flame.errors import UserError, give_reason
from flame.runtime.user_code import import_user_code

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from flame.config.data import Corpus
    from flame.config.schema import JobConfig
    from flame.data.encoding import Labelled

USER_SUFFIX = ".py"


class TextRows(Protocol):
    """Random access to texts, or to ids or chats in their place. Instances are pickled into the loader's worker processes."""

    def __len__(self) -> int:
        """Number of rows, including bad rows."""
        ...

    def read(self, index: int) -> Document | None:
        """Return the text of a row. Return None for a bad row: empty, only white space, not text, or not UTF-8. Never raises."""
        ...


class TextShards(Protocol):
    """Texts that can only be read in order, shard by shard. Pickled like `TextRows`."""

    num_shards: int

    def read_shard(self, shard: int, row: int) -> Iterator[Document | None]:
        """Yield the rows of a shard, starting at `row`, as `TextRows.read` returns them.

        Raises:
            UserError: the shard cannot be read.
        """
        ...


class Documents(Protocol):
    """Random access to documents as token ids. Pickled like `TextRows`."""

    name: str
    """Short name in logs, metrics and the audit."""
    option: str
    """Its name in error lines, such as `training.dataset = "json"`."""

    def __len__(self) -> int:
        """Number of documents, including bad rows."""
        ...

    def read(self, index: int) -> np.ndarray | Labelled | None:
        """Return the ids of a document, integer [n] with n >= 1, with those that count if that is asked; None for a bad row."""
        ...


class VerifiedProblems(Protocol):
    """Problems whose answers are verified."""

    def make(self, number: int) -> Any:
        """The problem with this number: `prompt`, and one right answer, `answer`, which follows it."""
        ...

    def verify(self, problem: Any, answer: str) -> bool:
        """Whether a text is a right answer to a problem from `make`."""
        ...


class SourceKind(ABC):
    """A kind of source, with the options of one section.

    For your own source, derive from it in a file, define `name` and `open`, and set `dataset` to that file (docs/data.md).

    Args:
        corpus: the options that name the source.
        section: their section: "training", "validation", "sources.NAME" or "held_out.NAME".
        options: the kind's own section, an instance of `Options`, if it has one.
    """

    name: ClassVar[str] = ""
    """Value of `dataset`. For a user's source, whose `dataset` is a file, it is the name in logs and metrics."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """Which of `dataset_name`, `dataset_split`, `data_files`, `text_column` and `streaming` it reads."""
    Options: ClassVar[type[Section] | None] = None
    """Dataclass of its own options; `Options.section` names their table."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the files that it reads, to help users who give a file as `dataset`."""
    has_tokenizer: ClassVar[bool] = False
    """Whether it has its own tokenizer (`build_tokenizer`), which `model.tokenizer_path` can name like `dataset`."""
    second_token_metric: ClassVar[str | None] = None
    """Validation metric for how often the second token of an answer is right; None for no metric."""

    def __init__(self, corpus: Corpus, section: str, options: Any = None):
        self.corpus, self.section, self.options = corpus, section, options

    @property
    def short_name(self) -> str:
        """Name in logs, metrics and the audit."""
        return self.section.partition(".")[2] or self.name or self.corpus.dataset

    @property
    def option(self) -> str:
        """Its name in error lines, such as `training.dataset = "json"`."""
        return f'{self.section}.dataset = "{self.corpus.dataset}"'

    @property
    def files_option(self) -> str:
        """Name of its files in error lines."""
        return f"{self.section}.data_files = {self.corpus.data_files}"

    @property
    def user_file(self) -> str:
        """The user's file that defines this kind; empty for a built-in kind."""
        is_users = self.corpus.dataset.endswith(USER_SUFFIX)
        return os.path.abspath(os.path.expanduser(self.corpus.dataset)) if is_users else ""

    @property
    def identity(self) -> str:
        """What tells a streamed source from others, beside its local files."""
        options = ("dataset_name", "dataset_split", "text_column")
        read = [getattr(self.corpus, each) for each in options if each in self.uses]
        return " ".join(filter(None, [self._own_identity, *read]))

    @property
    def _own_identity(self) -> str:
        return self.name if self.user_file else self.corpus.dataset

    def list_content_files(self) -> list[str]:
        """Its files, in the order of the documents; empty if it has none."""
        return []

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        """Yield one line for each option that would make this source yield something wrong. Reads no data."""
        return iter(())

    @abstractmethod
    def open(self) -> TextRows | TextShards | Sequence[str | None]:
        """Open the texts.

        Raises:
            UserError: they cannot be found or read.
        """

    def open_tokens(self, tokenizer: PreTrainedTokenizerFast) -> Documents | None:
        """Open the documents as ids of this tokenizer, if they need no tokenizing; None if they do."""
        return None

    def open_problems(self) -> VerifiedProblems | None:
        """Open the documents as problems, if the source can tell whether an answer is right; None if it cannot."""
        return None

    def advise(self, rows: TextRows | TextShards) -> str:
        """Advice for the user if no row has a text."""
        return "check the data"

    @classmethod
    def build_tokenizer(cls, options: Any) -> PreTrainedTokenizerFast:
        """Build the source's own tokenizer. It need not encode other text."""
        raise NotImplementedError

    def name_answers(self) -> dict[int, str]:
        """Groups of answers that validation logs separately: names by number of tokens of the document. Only called if the run
        uses the source's own tokenizer."""
        return {}


class WithUserCode:
    """Base class of objects that are pickled with instances of a user's classes. Unpickling first imports the user's files."""

    user_files: tuple[str, ...] = ()
    """Absolute paths."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.user_files, pickle.dumps(self.__dict__))


def _rebuild(kind: type[WithUserCode], user_files: tuple[str, ...], state: bytes) -> WithUserCode:
    for path in user_files:
        import_user_code(path, f'dataset = "{path}"')
    rebuilt = kind.__new__(kind)
    rebuilt.__dict__.update(pickle.loads(state))
    return rebuilt


class UserRows:
    """`TextRows` of a user's source, which is a list or an object with `read`. Anything but a usable text is a bad row."""

    def __init__(self, rows: Any):
        self._rows, self._read = rows, "read" if hasattr(rows, "read") else "__getitem__"

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> str | None:
        text = keep_text(getattr(self._rows, self._read)(index))
        return text if text is None or is_encodable(text) else None


def open_texts(kind: SourceKind) -> TextRows | TextShards:
    """Open a source whose documents are texts.

    Raises:
        UserError: it cannot be opened, or is empty.
    """
    rows: Any = _open_user_texts(kind) if kind.user_file else kind.open()
    if not hasattr(rows, "num_shards") and len(rows) == 0:
        raise UserError(explain_emptiness(kind))
    return rows


def _open_user_texts(kind: SourceKind) -> Any:
    try:
        rows: Any = kind.open()
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        reason = give_reason(error)
        raise UserError(f"{kind.option}: {type(kind).__name__}.open() fails: {type(error).__name__}: {reason}") from error
    if hasattr(rows, "num_shards") and hasattr(rows, "read_shard"):
        return rows
    is_readable = hasattr(rows, "read") or (hasattr(rows, "__getitem__") and not isinstance(rows, str | bytes | dict))
    if not (hasattr(rows, "__len__") and is_readable):
        raise UserError(
            f"{kind.option}: {type(kind).__name__}.open() returns {type(rows).__name__}: it must be a list of texts, or have "
            "__len__() and read(index) -> str | None"
        )
    return UserRows(rows)


def explain_emptiness(kind: SourceKind) -> str:
    """The error line for a source without rows."""
    files = f" ({kind.files_option})" if kind.corpus.data_files else ""
    return f"{kind.option}{files} has no rows: give it data with at least one document"


def explain_no_text(kind: SourceKind, rows: TextRows | TextShards, read: str) -> str:
    """The error line for a source that yields no text at all.

    Args:
        read: how much was read, such as "3 rows".
    """
    return f"{kind.option} yields no usable text: {read} read, all empty, not text or undecodable: {kind.advise(rows)}"
