"""Fixtures of the tests of options."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model configuration, m.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text('{"model_type": "llama"}')
    return tmp_path
