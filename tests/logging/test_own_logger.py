"""A metric logger in one file of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame.errors import UserError
from flame.trainer.options import read_options
from tests.support.refusals import expect_one_line
from tests.support.runs import options, read_metrics, run_here

LOGGER = """
from flame.logging.writers.base import MetricWriter

class Lines(MetricWriter):
    name = "lines"

    def __init__(self, run):
        self.file = (run.folder / "lines.txt").open("a")
        self.write("open", run.start_step, run.description, run.options["training"]["seq_len"])

    def write(self, *words):
        self.file.write(" ".join(map(str, words)) + "\\n")

    def log(self, step, values):
        self.write("log", step, values["loss"])

    def close(self):
        self.write("close")
        self.file.close()
"""
FAILING = LOGGER.replace('self.write("log"', 'assert step != 2, "gone"; self.write("log"').replace('"lines"', '"failing lines"')
SHORT = {"training__gradient_accumulation_steps": 1, "lr_scheduler__warmup_steps": 0}


def write_file(folder: Path, name: str, text: str) -> Path:
    """Under a name of its own: a process imports a module once."""
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_it_gets_every_step_and_is_closed_also_after_a_resume(workspace, tmp_path):
    path, run = write_file(tmp_path, "own_logger_of_lines", LOGGER), tmp_path / "run"
    changes = SHORT | {"metrics__logger_path": path, "job__description": "told", "checkpoint__interval": 2}
    run_here(workspace, run, **changes, training__steps=2)
    rows = run_here(workspace, run, **changes, training__steps=3)
    losses = {row["step"]: row["loss"] for row in rows}
    assert (run / "lines.txt").read_text().splitlines() == [
        "open 0 told 64",
        f"log 1 {losses[1]}",
        f"log 2 {losses[2]}",
        "close",
        "open 2 told 64",
        f"log 3 {losses[3]}",
        "close",
    ]


def test_one_that_fails_is_switched_off_with_a_warning(workspace, tmp_path, caplog):
    path, run = write_file(tmp_path, "own_logger_that_fails", FAILING), tmp_path / "run"
    changes = SHORT | {"metrics__logger_path": path, "checkpoint__enable_checkpoint": False, "training__steps": 3}
    rows = run_here(workspace, run, **changes)
    warned = [record.getMessage() for record in caplog.records if "switched off" in record.getMessage()]
    assert len(warned) == 1 and warned[0].startswith("failing lines has failed") and "gone" in warned[0]
    assert [row["step"] for row in rows] == [1, 2, 3] == [row["step"] for row in read_metrics(run)]
    assert [line.split()[:2] for line in (run / "lines.txt").read_text().splitlines()] == [["open", "0"], ["log", "1"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "it has none"),
        (LOGGER + LOGGER.replace("Lines", "Others"), "it has Lines, Others"),
        ("import no_such_package", "no_such_package"),
        ("class Lines(", "line 1: SyntaxError"),
        (None, "does not exist"),
    ],
    ids=["no class", "two classes", "missing package", "no Python", "no file"],
)
def test_a_wrong_file_is_one_line_before_the_run_starts(workspace, tmp_path, request, text, expected):
    path = tmp_path / f"own_logger_wrong_{request.node.callspec.id.replace(' ', '_')}.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read_options(options(workspace, tmp_path / "run", metrics__logger_path=path), 1)
    expect_one_line(error.value, f'metrics.logger_path = "{path}"', expected)
    assert not (tmp_path / "run").exists()
