"""Sources in files of the user's: read by worker processes, resumed, with options and a tokenizer of their own; mistakes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from flame.config.schema import Corpus, JobConfig
from flame.data.batch import PackedBatch
from flame.data.corpus_content import describe_content
from flame.data.documents import open_documents
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture, open_held_out, open_mixture
from flame.data.sources.registry import find_kind
from flame.data.state import DataState
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.refusals import expect_one_line
from tests.support.sources import choose_kind, list_unused_data_options, open_source, read_faults, read_job

COUNTER = '''
from dataclasses import dataclass
from typing import ClassVar

from flame.config.types import PositiveInt, Section, option
from flame.data.sources.base import SourceKind


@dataclass(kw_only=True)
class CounterOptions(Section):
    """Numbers, again and again."""

    section: ClassVar[str] = "counter"

    rows: PositiveInt = option(40, fixed=True)
    """Documents."""

    def find_conflicts(self, job, name):
        if self.rows > job.training.steps:
            yield f"{name}.rows = {self.rows} is more than training.steps = {job.training.steps}: lower it"


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, index):
        return [" ", None, 7, chr(0xD800)][index % 4] if index % 7 == 3 else f"document {index} " * (1 + index % 5)


class Counter(SourceKind):
    name = "counter"
    uses = frozenset({"text_column"})
    Options = CounterOptions

    def open(self):
        return Rows(self.options.rows)
'''
COIN = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flame.config.types import NonNegativeInt, Section
from flame.data.tasks.generated import GeneratedKind, GeneratedSource, build_label_tokenizer, mix


@dataclass(kw_only=True)
class CoinOptions(Section):
    section: ClassVar[str] = "coin"

    seed: NonNegativeInt = 0


class Coin(GeneratedKind):
    """One of 90 numbers, and whether it is odd."""

    name = "coin"
    Options = CoinOptions

    def open(self):
        return Numbers(self.options.seed, 0, self.is_held_out, num_words=1)

    @classmethod
    def build_tokenizer(cls, options):
        return build_label_tokenizer(cls.name, 90, ["="], "[0-9]+|.")


class Numbers(GeneratedSource):
    def _hash_contents(self, words):
        return mix(words[:, 0] % np.uint64(90))

    def _write(self, words):
        return [f"{number}={number % 2}" for number in (words[:, 0] % np.uint64(90)).tolist()]

    def _encode(self, words):
        numbers = (words[:, 0] % np.uint64(90)).astype(np.int64)
        ids = np.stack([numbers, np.full_like(numbers, 90), numbers % 2, np.full_like(numbers, 91)], axis=1)
        return ids.astype(np.uint16).reshape(-1), np.full(len(numbers), 4)
'''
names = itertools.count()


def write_source(folder: Path, content: str) -> str:
    """A file whose name no other has had in this process: modules are imported once."""
    path = folder / f"own_source_{next(names)}.py"
    path.write_text(content)
    return str(path)


def configure(path: str, *changes: str, tokenizer: str = "bytes") -> list[str]:
    sizes = {"num_streams": 4, "num_workers": 0, "seq_len": 64, "context_len": 40}
    options = [part for name, value in sizes.items() for part in (f"--training.{name}", str(value))]
    return ["--model.config", "m.json", "--model.tokenizer_path", tokenizer, "--training.dataset", path, *options, *changes]


def open_run(job: JobConfig) -> Mixture:
    return open_mixture(job, load_tokenizer(job.model.tokenizer_path, find_options=job.get))


def take(job: JobConfig, count: int, state: DataState, num_workers: int) -> list[PackedBatch]:
    job.training.num_workers = num_workers
    loader = PackedLoader(job.training, open_run(job), 0, 1, state)
    batches = list(itertools.islice(loader, count))
    loader.close()
    state.advance(batches, 1)
    return batches


def describe(batches: list[PackedBatch]) -> list[tuple]:
    return [(batch.sequence_index, batch.source, batch.input_ids.tolist(), list(batch.documents)) for batch in batches]


@pytest.mark.parametrize("content, tokenizer", [(COUNTER, "bytes"), (COIN, "")])
def test_workers_read_it_and_a_resumed_run_goes_on(tmp_path: Path, content: str, tokenizer: str):
    """The file is not on the import path of the worker, which another process than this one imports it in."""
    path = write_source(tmp_path, content)
    job = read_job(configure(path, tokenizer=tokenizer or path))
    expected = take(job, 30, DataState(4, job.training.seed), num_workers=0)
    state = DataState(4, job.training.seed)
    found = take(job, 11, state, num_workers=1 if content == COUNTER else 0)  # each start of a worker takes seconds
    saved = json.loads(json.dumps(state.state_dict()))
    resumed = DataState(4, job.training.seed)
    resumed.load_state_dict(saved)
    found += take(job, 19, resumed, num_workers=1)
    assert describe(found) == describe(expected)
    assert {batch.source for batch in found} == {find_kind(path, "training").name}


def test_its_options_are_a_section_like_others(tmp_path: Path):
    path = write_source(tmp_path, COUNTER)
    job = read_job(configure(path, "--counter.rows", "9"))
    assert open_run(job).count_units() == {"counter": 9}
    assert read_faults(configure(path, "--counter.rows", "0")) == ["counter.rows = 0 (command line): allowed is an integer > 0"]
    assert "no such option, did you mean counter.rows?" in read_faults(configure(path, "--counter.row", "1"))[0]
    assert read_faults(configure(path, "--training.steps", "8")) == [
        "counter.rows = 40 is more than training.steps = 8: lower it"
    ]


def test_what_it_reads_and_what_it_does_not(tmp_path: Path):
    path = write_source(tmp_path, COUNTER)
    changes = ["--training.text_column", "a", "--training.dataset_name", "b"]
    assert list_unused_data_options(configure(path, *changes)) == ["training.dataset_name"]
    assert "training.data_files is set" in read_faults(configure(path, "--training.data_files", "x"))[0]
    off = ["--validation.dataset", path, "--counter.rows", "9", "--training.dataset", "stdlib"]
    assert list_unused_data_options([*configure(path), *off]) == ["validation.dataset", "counter.rows"]


def test_rows_that_are_no_text_are_bad_rows(tmp_path: Path):
    source = open_source(Corpus(dataset=write_source(tmp_path, COUNTER)))
    assert [source.read(index) for index in (3, 10, 17, 24)] == [None] * 4  # type: ignore[union-attr]


def test_a_list_is_enough_and_documents_are_held_out(tmp_path: Path):
    path = write_source(
        tmp_path,
        "from flame.data.sources.base import SourceKind\n\n\n"
        "class Letters(SourceKind):\n    name = 'letters'\n\n    def open(self):\n        return ['a', 'b', '', 'c']\n",
    )
    job = read_job(configure(path, "--validation.holdout_every", "2", "--validation.interval", "1"))
    mixture = open_run(job)
    assert mixture.count_units() == {"letters": 2}
    assert open_held_out(job, load_tokenizer("bytes"), mixture).count_units() == {"letters": 2}


def test_it_may_be_one_source_of_a_mixture_and_validate(tmp_path: Path):
    path = write_source(tmp_path, COUNTER)
    changes = ["--sources.a.dataset", path, "--sources.b.dataset", "stdlib", "--validation.dataset", path]
    argv = [part for part in configure(path, *changes, "--validation.interval", "1") if part not in ("--training.dataset",)]
    argv.remove(path)
    mixture = open_run(read_job(argv))
    assert [source.name for source in mixture.sources] == ["a", "b"]
    assert open_held_out(read_job(argv), load_tokenizer("bytes"), mixture).count_units() == {"counter": 40}


KIND = "from flame.data.sources.base import SourceKind\n\n\nclass Own(SourceKind):\n    name = 'own'\n"
OPEN = "\n    def open(self):\n        return ['a']\n"
SECTION = "from dataclasses import dataclass\nfrom flame.config.types import Section\n\n\n"


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["does not exist"]),
        ("x = 1\n", ["exactly one class derived from flame.data.sources.base.SourceKind: it has none"]),
        (KIND + OPEN + "\n\nclass Other(SourceKind):\n    name = 'other'\n" + OPEN, ["it has Other, Own"]),
        (KIND, ["Own does not define open()"]),
        (KIND.replace("'own'", "''") + OPEN, ['Own.name = ""', "identifier"]),
        (KIND.replace("'own'", "'json'") + OPEN, ['Own.name = "json"', "no built-in source has"]),
        (KIND + "    uses = {'files'}\n" + OPEN, ["Own.uses names files", "data_files"]),
        (KIND + "    Options = int\n" + OPEN, ["Own.Options", "Section"]),
        (SECTION + "@dataclass\nclass S(Section):\n    pass\n\n\n" + KIND + "    Options = S\n" + OPEN, ['Options.section = ""']),
        (
            SECTION + "@dataclass\nclass S(Section):\n    section = 'training'\n\n\n" + KIND + "    Options = S\n" + OPEN,
            ['.section = "training"', "no other table has"],
        ),
        ("import nothing_of_this_name\n", ["cannot be imported", "line 1", "ModuleNotFoundError"]),
        ("def broken(:\n", ["cannot be imported", "line 1", "SyntaxError"]),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, content: str | None, parts: list[str]):
    path = write_source(tmp_path, content or "")
    if content is None:
        Path(path).unlink()
    (line,) = read_faults(configure(path))
    assert line.startswith(f'training.dataset = "{path}"') and all(part in line for part in parts)


@pytest.mark.parametrize(
    "body, parts",
    [
        ("return 7", ["Own.open() returns int"]),
        ("return 'text'", ["Own.open() returns str"]),
        ("return []", ["has no rows"]),
        ("return open('/none')", ["Own.open() fails: FileNotFoundError", "/none"]),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, body: str, parts: list[str]):
    path = write_source(tmp_path, KIND + f"\n    def open(self):\n        {body}\n")
    job = read_job(configure(path))
    with pytest.raises(UserError) as caught:
        open_run(job)
    expect_one_line(caught.value, f'training.dataset = "{path}"', *parts)


def test_two_sources_with_one_table_are_refused(tmp_path: Path):
    first, second = (write_source(tmp_path, COUNTER) for _ in range(2))
    argv = configure(first, "--validation.dataset", second, "--validation.interval", "1")
    assert read_faults(argv) == [
        f'validation.dataset = "{second}": its section [counter] is already used by another source: rename it'
    ]
    assert choose_kind(read_job(configure(first)).training).short_name == "counter"


@pytest.mark.parametrize("content", ["chat", "ids"])
def test_a_users_rows_may_have_any_attributes(tmp_path: Path, content: str) -> None:
    (tmp_path / f"mine_{content}.py").write_text(
        "from flame.data.sources.base import SourceKind\n"
        "class Shards:\n"
        f"    num_shards, content, chat_template = 1, {content!r}, 'x'\n"
        "    def read_shard(self, shard, row):\n"
        "        return iter(['a', 'b'][row:])\n"
        "class Mine(SourceKind):\n"
        "    name = 'mine'\n"
        "    def open(self):\n"
        "        return Shards()\n"
    )
    kind = choose_kind(Corpus(dataset=str(tmp_path / f"mine_{content}.py")))
    documents = open_documents(kind, load_tokenizer("bytes"))
    assert [tokens.tolist() for _, tokens in documents.read_shard(0, 0)] == [[97, 256], [98, 256]]  # type: ignore
    assert "chat_template" not in describe_content(kind, documents)
