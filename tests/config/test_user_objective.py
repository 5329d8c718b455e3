"""`objective.path`, a Python file with an objective of the user's own: its options join the others, each mistake is one line."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import pytest

from flame.objectives.options import ObjectiveOptions
from flame.objectives.registry import choose_objective
from flame.trainer.options import list_idle_options, read_options
from tests.support.options import MODEL, read_mistakes

pytestmark = pytest.mark.usefixtures("folder")
NUMBERS = itertools.count()

HEAD = """
from dataclasses import dataclass, field
from typing import ClassVar
import torch
from flame.config.types import Section
from flame.objectives.base import Objective, ObjectiveOptions
"""
LOSS = "    def loss(self, *arguments, **named): ...\n"
OWN = """
@dataclass(kw_only=True)
class Options(ObjectiveOptions):
    '''What it needs.'''
    width: int = 4
    '''How wide.'''
    def find_conflicts(self, job, name):
        if self.width == 13:
            yield f"{name}.width = 13 brings bad luck: choose another"

class Mine(Objective):
    name = "mine"
    Options = Options
    def loss(self, *arguments, **named): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file whose module no other test has imported."""
    return tmp_path / f"own_objective_{next(NUMBERS)}.py"


def write(file: Path, code: str) -> list[str]:
    """Returns: the command line that names it."""
    file.write_text(HEAD + code)
    return [*MODEL, f"--objective.path={file.name}"]


def declare(options: str) -> str:
    """An objective with the class Options."""
    return f"{options}\nclass Mine(Objective):\n    name = 'mine'\n    Options = Options\n{LOSS}"


def test_an_objective_of_ones_own_is_trained_with_its_options(file):
    job = read_options([*write(file, OWN), "--mine.width=5", "--mine.loss_weight=0.5"], 1)
    kind = choose_objective(job)
    assert kind is not None and kind.name == "mine" and kind.load().__name__ == "Mine"
    assert (job.get(kind.options).width, job.get(kind.options).loss_weight) == (5, 0.5)  # type: ignore[attr-defined]
    assert list_idle_options(job) == []


def test_its_options_may_stand_in_the_file_that_names_it(file, tmp_path):
    write(file, OWN)
    (tmp_path / "run.toml").write_text(f'[objective]\npath = "{file.name}"\n[mine]\nwidth = 5\n')
    job = read_options([*MODEL, "--job.config_file=run.toml"], 1)
    shared = {each.name: each.default for each in fields(ObjectiveOptions)}
    assert job.to_dict()["mine"] == shared | {"width": 5}


@pytest.mark.parametrize("name", ["next_token", "mtp"])
def test_another_name_on_the_command_line_turns_it_off(file, tmp_path, name):
    write(file, OWN)
    (tmp_path / "run.toml").write_text(f'[objective]\npath = "{file.name}"\n[mine]\nwidth = 5\n')
    job = read_options([*MODEL, "--job.config_file=run.toml", f"--objective.name={name}"], 1)
    kind = choose_objective(job)
    assert (kind.name if kind else "next_token") == name
    assert "mine.width" in list_idle_options(job)


@pytest.mark.parametrize("words", [["--help"], ["--help", "mine"]], ids=" ".join)
@pytest.mark.parametrize("is_in_file", [False, True], ids=["command line", "file"])
def test_help_shows_its_options(file, tmp_path, capsys, is_in_file, words):
    argv = write(file, OWN)
    (tmp_path / "run.toml").write_text(f'[objective]\npath = "{file.name}"\n')
    with pytest.raises(SystemExit) as caught:
        read_options([*(["--job.config_file", "run.toml"] if is_in_file else argv), *words], 1)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--mine.width (an integer)" in shown and "How wide." in shown


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("class Mine(Objective:\n", ["cannot be imported", "line 7", "SyntaxError"]),
        ("raise KeyError('a\\nb')\n", ["cannot be imported", "line 7", "KeyError"]),
        ("import sys\nsys.exit(3)\n", ["cannot be imported", "line 8", "SystemExit: 3"]),
        ("import no_such_package\n", ["cannot be imported", "no_such_package"]),
        ("", ["exactly one class", "it has none"]),
        ("class One(Objective):\n    name = 'one'\nclass Two(Objective):\n    name = 'two'\n", ["exactly one class", "One, Two"]),
        ("class Mine(Objective):\n    pass\n", ['Mine.name = ""']),
        ("class Mine(Objective):\n    name = 3\n", ['Mine.name = "3"']),
        ("class Mine(Objective):\n    name = 'a b'\n", ['Mine.name = "a b"']),
        ("class Mine(Objective):\n    name = 'mtp'\n", ['Mine.name = "mtp"', "no other objective"]),
        ("class Mine(Objective):\n    name = 'next_token'\n", ['Mine.name = "next_token"', "no other objective"]),
        ("class Mine(Objective):\n    name = 'training'\n" + LOSS, ['the section "training"', "taken"]),
        ("class Mine(Objective):\n    name = 'pathstar'\n" + LOSS, ['the section "pathstar"', "taken"]),
        ("class Mine(Objective):\n    name = 'sources'\n" + LOSS, ['the section "sources"', "taken"]),
        (
            declare("@dataclass(kw_only=True)\nclass Options(ObjectiveOptions):\n    section: ClassVar[str] = 'a.b'\n"),
            ['the section "a.b"', "identifier"],
        ),
        (declare("Options = 3"), ["Mine.Options", "no class derived from flame.objectives.options.ObjectiveOptions"]),
        (declare("class Options(Section):\n    pass"), ["Mine.Options", "no class derived from"]),
        (declare("class Options(ObjectiveOptions):\n    width: int = 3"), ["Mine.Options", "@dataclass"]),
        (declare("@dataclass(kw_only=True)\nclass Options(ObjectiveOptions):\n    width: int"), ["Mine.Options", "width"]),
        (declare("@dataclass(kw_only=True)\nclass Options(ObjectiveOptions):\n    width: int = 'x'"), ["Mine.Options", "width"]),
        (declare("@dataclass(kw_only=True)\nclass Options(ObjectiveOptions):\n    w: torch.Tensor = None"), ["torch.Tensor"]),
        (declare("@dataclass(kw_only=True)\nclass Options(ObjectiveOptions):\n    companions = (3,)"), ["companion"]),
    ],
)
def test_what_is_wrong_with_the_file_is_one_line(file, code, parts):
    (line,) = read_mistakes(write(file, code))
    assert line.startswith(f'objective.path = "{file.name}"')
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("path", ["nowhere.py", "m.json", ".", "json.py", "/", "a\0b.py", "~no_such_user/x.py", "x" * 300])
def test_a_path_without_an_objective_is_one_line(path):
    Path("json.py").touch()  # has the name of a module of Python's own
    (line,) = read_mistakes([*MODEL, f"--objective.path={path}"])
    assert line.startswith("objective.path = ")


@pytest.mark.parametrize(
    ("word", "start"),
    [
        ("--mine.width=wide", "mine.width = wide (command line): allowed is an integer"),
        ("--mine.loss_weight=-1", "mine.loss_weight = -1 (command line): allowed is a finite number >= 0"),
        ("--mine.widht=3", "mine.widht = 3 (command line): no such option, did you mean mine.width?"),
        ("--mine.width=13", "mine.width = 13 brings bad luck"),
        ("--objective.name=yours", 'objective.name = "yours": allowed is "next_token" or'),
    ],
)
def test_mistakes_in_its_options_are_one_line_each(file, word, start):
    (line,) = read_mistakes([*write(file, OWN), word])
    assert line.startswith(start)


def test_a_file_that_cannot_be_loaded_hides_no_other_mistake(file):
    lines = read_mistakes([*write(file, "class Mine(Objective:\n"), "--training.steps=0", "--training.context_len=9000", "stray"])
    assert [line.split(" ")[0] for line in lines] == ["objective.path", "stray", "training.steps", "training.context_len"]
