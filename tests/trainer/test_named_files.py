"""Hashes of the files that options name, and of flame's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame.trainer import run_record
from flame.trainer.named_files import hash_named_files


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("objective.path", ""),
        ("experimental.custom_model_path", "models/own.py"),
        ("metrics.logger_path", ""),
        ("sources.web.dataset", ""),
        ("model.config", ""),
        ("model.config", "config.json"),
        ("model.tokenizer_path", "tokenizer.json"),
        ("model.tokenizer_path", "chat_template.jinja"),
    ],
)
def test_another_content_has_another_hash(tmp_path: Path, key: str, file: str):
    named = tmp_path / "named.py"
    path = named / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("one")
    before = hash_named_files({key: str(named)})
    (tmp_path / "beside").write_text("another file")
    assert before == hash_named_files({key: str(named)})
    path.write_text("two")
    after = hash_named_files({key: str(named)})
    assert list(before) == list(after) == [key] and before != after


def test_what_is_not_here_is_left_out(tmp_path: Path):
    names = {"model.config": "owner/model", "model.tokenizer_path": "bytes", "objective.path": "", "training.dataset": "json"}
    assert hash_named_files(names | {"model.config": str(tmp_path / "none.json")}) == hash_named_files(names) == {}


def test_two_states_of_the_code_are_not_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    code = tmp_path / "flame"
    code.mkdir()
    monkeypatch.setattr(run_record.flame, "__file__", str(code / "__init__.py"))
    monkeypatch.setattr(run_record, "read_git_revision", lambda: "abc-dirty")
    found = []
    for content in ("one", "two", "one"):
        (code / "__init__.py").write_text(content)
        found.append(run_record.describe_code())
    assert found[0] == found[2] != found[1] and str(found[0]).startswith("abc-dirty-")
    for revision in ("abc", None):
        monkeypatch.setattr(run_record, "read_git_revision", lambda revision=revision: revision)
        assert run_record.describe_code() == revision
