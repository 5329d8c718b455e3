"""The command of docs/continue.md is the run behind its table."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from flame.compare.runs import spell
from flame.trainer.options import read_options
from research import continued
from tests.support.paths import REPO

DECIDE_NOTHING = ("job", "checkpoint", "metrics")
"""Sections of where a run is kept and what is logged."""


@pytest.fixture
def folder(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's first commands leave, as far as options are checked against it."""
    (tmp_path / "smollm2").symlink_to(workspace / "model")
    (tmp_path / "configs").symlink_to(REPO / "configs")
    (tmp_path / "corpora").mkdir()
    for name in ("python", "python_held_out"):
        (tmp_path / "corpora" / f"{name}.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_on_a_gpu_is_the_run_of_the_table(folder: Path):
    page = (REPO / "docs" / "continue.md").read_text()
    block = page.partition("## On a GPU")[2].split("```")[1].removeprefix("sh\n")
    written = read_options([*shlex.split(block.replace("\\\n", " "))[2:], "--model.tokenizer_path", "bytes"], 1)
    variants = argparse.Namespace(
        seeds=[1], variants=["future, shift 0"], out=folder, model=Path("smollm2"), text=Path("corpora"), steps=320, lr=3e-4
    )
    (planned,) = continued.list_runs(variants)
    made = read_options(spell({**planned.options, "model.tokenizer_path": "bytes"}), 1)
    assert written.training.tokens == made.training.steps * made.training.seq_len
    expected = dict(made.list_sections())
    differ = {
        f"{name}.{key}"
        for name, options in written.list_sections()
        for key, value in vars(options).items()
        if name not in DECIDE_NOTHING and getattr(expected[name], key) != value
    }
    lengths = {"training.tokens", "training.steps", "validation.interval", "validation.num_sequences"}
    assert differ <= {"training.data_files", "validation.data_files"} | lengths
