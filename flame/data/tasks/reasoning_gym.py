"""Planning problems of the package reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760), `dataset = "reasoning_gym:maze"`.

A document is the question, a line that asks for the answer, and the package's own answer. It is a function of the task, its
settings, the seed and the number of the document. One question in `HELD_OUT_EVERY`, by its text, is never trained on.
Evaluation lets the model answer held-out questions, and the package's verifier judges: other right answers count too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import tomli

from flame.config.schema import JobConfig
from flame.config.types import NonNegativeInt, Section, Seed, option
from flame.data.encoding import Labelled, encode_continuations, encode_document
from flame.data.tasks.generated import ENDLESS, HELD_OUT_EVERY, MOST_ATTEMPTS, ContentHeldOutKind, draw_words
from flame.errors import UserError, give_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE, INSTALL = "reasoning_gym", "pip install reasoning-gym"
ASKING = "\nAnswer:"
INDEX_BITS = 31
"""Problems of the package are numbered by seeds of Python's and numpy's generators, of which the latter take 32 bits."""


@dataclass(kw_only=True)
class ReasoningGymOptions(Section):
    """Problems of the package reasoning-gym, which dataset = "reasoning_gym:TASK" generates. One question in 8 is held out for
    validation and evaluation."""

    section: ClassVar[str] = "reasoning_gym"

    problems: NonNegativeInt = option(0, fixed=True)
    """Problems in the training set. Each epoch shuffles them again. 0 generates new problems all the time."""
    seed: Seed = option(0, fixed=True)
    """Seed of the problems; training.seed decides their order."""


class Problem(NamedTuple):
    """A question with one right answer."""

    prompt: str
    """Up to where the answer begins."""
    answer: str
    """Begins with a space."""
    entry: dict[str, Any]
    """What the package knows of it."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class ReasoningGym(ContentHeldOutKind):
    """Problems of one task, with the settings that `dataset_name` gives, such as "min_numbers = 3, max_numbers = 4"."""

    name = "reasoning_gym"
    uses = frozenset({"dataset_name"})
    Options = ReasoningGymOptions

    options: ReasoningGymOptions

    @property
    def task(self) -> str:
        return self.corpus.dataset.partition(":")[2]

    @property
    def short_name(self) -> str:
        return self.section.partition(".")[2] or self.task

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        yield from super().find_conflicts(job)
        if not self.task:
            yield f'{self.option} names no task: write {self.section}.dataset = "{self.name}:countdown", or another one'
        elif find_spec(PACKAGE) is None:
            yield f"{self.option} needs the package reasoning-gym: {INSTALL}"
        try:
            parse_settings(self.corpus.dataset_name)
        except ValueError as error:
            yield (
                f'{self.section}.dataset_name = "{self.corpus.dataset_name}": {error}: give settings of the task as in TOML, '
                'such as "min_numbers = 3, max_numbers = 4"'
            )

    def open(self) -> Problems:
        problems = Problems(
            self.task, self.option, self.corpus.dataset_name, self.options.seed, self.options.problems, self.is_held_out
        )
        problems.make(0)  # reports what is wrong with the task
        return problems

    def open_tokens(self, tokenizer: PreTrainedTokenizerFast) -> ProblemDocuments:
        return ProblemDocuments(self.short_name, self.option, self.open(), tokenizer)

    def open_problems(self) -> Problems:
        return self.open()


def parse_settings(text: str) -> dict[str, Any]:
    """Read settings such as "min_numbers = 3, max_numbers = 4".

    Raises:
        ValueError: they are not written as in TOML.
    """
    return tomli.loads(f"settings = {{{text}}}")["settings"]


class Problems:
    """`TextRows` of a task's problems. They can also be read as question and answer, and answers can be verified.

    Args:
        count: problems of the training set; 0 is `ENDLESS`. Held-out problems are always `ENDLESS`.
    """

    def __init__(self, task: str, option: str, settings: str, seed: int, count: int, is_held_out: bool):
        self._task, self._option, self._settings = task, option, settings
        self._seed, self._is_held_out = seed, is_held_out
        self._count = count if count and not is_held_out else ENDLESS

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_dataset"}  # made again elsewhere

    def read(self, index: int) -> str:
        """The text of a document."""
        return self.make(index).text

    def make(self, number: int) -> Problem:
        """Generate a problem. It is drawn until its question is held out, or not, as required.

        Raises:
            UserError: the task fails, has no answers, or has no such question.
        """
        for attempt in range(MOST_ATTEMPTS):
            word = draw_words(2 * self._seed + self._is_held_out, np.asarray([number], dtype=np.uint64), attempt, 1)[0, 0]
            entry = self._generate(int(word) >> (64 - INDEX_BITS))
            question, answer = entry["question"], entry["answer"]
            if not isinstance(answer, str) or not answer.strip():
                raise UserError(f"{self._option} has problems without an answer to learn from: choose another task")
            if is_held_out(question) == self._is_held_out:
                return Problem(question.strip() + ASKING, f" {answer.strip()}", entry)
        kind = "held out" if self._is_held_out else "trained on"
        raise UserError(f"{self._option} has too few questions: none of {MOST_ATTEMPTS} is to be {kind}: make it harder")

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the package's verifier takes a text for a right answer to a problem."""
        try:
            return self._dataset.score_answer(answer=answer.strip(), entry=problem.entry) >= 1
        except Exception:  # a verifier meets texts that nobody has foreseen
            return False

    def _generate(self, index: int) -> dict[str, Any]:
        try:
            return self._dataset[index]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self._option}: the task fails ({type(error).__name__}: {error}): choose another") from error

    @cached_property
    def _dataset(self) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if self._task not in DATASETS:
            near = difflib.get_close_matches(self._task, DATASETS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(DATASETS))}"
            raise UserError(f"{self._option} is no task of reasoning-gym: {advice}")
        try:
            return reasoning_gym.create_dataset(self._task, seed=0, size=1 << INDEX_BITS, **parse_settings(self._settings))
        except Exception as error:  # each task checks its settings in its own way
            reason = give_reason(error)
            raise UserError(
                f'{self._option} with dataset_name = "{self._settings}": the task refuses its settings ({reason}): change them'
            ) from error


class ProblemDocuments:
    """`Documents` of problems, tokenized when they are read. Question and answer are tokenized apart."""

    def __init__(self, name: str, option: str, problems: Problems, tokenizer: PreTrainedTokenizerFast, has_labels: bool = False):
        self.name, self.option = name, option
        self._problems, self._tokenizer, self._has_labels = problems, tokenizer, has_labels

    def __len__(self) -> int:
        return len(self._problems)

    def with_answers(self) -> ProblemDocuments:
        """The same documents, which say that only their answers count."""
        return ProblemDocuments(self.name, self.option, self._problems, self._tokenizer, has_labels=True)

    def read_untokenized(self, index: int) -> str:
        """The text of a document."""
        return self._problems.read(index)

    def read(self, index: int) -> np.ndarray | Labelled:
        problem = self._problems.make(index)
        prompt, end = np.split(encode_document(self._tokenizer, problem.prompt), [-1])
        (answer,) = encode_continuations(self._tokenizer, [problem.answer])
        tokens = np.concatenate([prompt, answer, end])
        return Labelled(tokens, np.asarray([[len(prompt), len(tokens)]])) if self._has_labels else tokens


def is_held_out(question: str) -> bool:
    """Whether a question is never trained on."""
    return int.from_bytes(blake2b(question.encode(), digest_size=8).digest(), "little") % HELD_OUT_EVERY == 0
