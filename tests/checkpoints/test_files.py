"""Which checkpoint folders count, and which are purged."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame.checkpoints.manager import TRAINER_FILE, list_checkpoints
from flame.errors import UserError
from flame.weights.export import convert
from tests.support.runs import run_here


def make_folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("{}")
    return path


def test_only_complete_folders_count_in_the_order_of_steps(tmp_path):
    complete = (".metadata", TRAINER_FILE)
    for step in (9, 10, 100):
        make_folder(tmp_path / f"step-{step}", *complete)
    make_folder(tmp_path / "step-200.partial", *complete)
    make_folder(tmp_path / "step-300", TRAINER_FILE)
    make_folder(tmp_path / "step-400", ".metadata")
    make_folder(tmp_path / "step-x", *complete)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_old_checkpoints_are_purged(workspace, tmp_path, keep, kept):
    torn = make_folder(tmp_path / "run" / "checkpoint" / "step-1.partial", "half")
    run_here(workspace, tmp_path / "run", checkpoint__keep_latest_k=keep, checkpoint__interval=2)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoint")] == [f"step-{step}" for step in kept]
    assert not torn.exists()


def test_exporting_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="is not a complete checkpoint folder"):
        convert(make_folder(tmp_path / "step-3"), tmp_path / "out")
