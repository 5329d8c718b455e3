"""Which checkpoint folders count, and which are purged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flame.checkpoints.checkpoint import TRAINER_FILE, list_checkpoints
from flame.checkpoints.checkpoint_files import list_run_checkpoints
from flame.errors import UserError
from flame.utils.convert_dcp_to_hf import convert
from tests.test_train import leave_no_trace, run_here, workspace  # noqa: F401 - fixtures


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
def test_old_checkpoints_are_purged(workspace, tmp_path, keep, kept):  # noqa: F811 - a fixture
    torn = make_folder(tmp_path / "run" / "checkpoint" / "step-1.partial", "half")
    run_here(workspace, tmp_path / "run", checkpoint__keep_latest_k=keep, checkpoint__interval=2, checkpoint__export_hf=False)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoint")] == [f"step-{step}" for step in kept]
    assert not torn.exists()


def make_checkpoint(path: Path, folder: str | None = "checkpoint") -> Path:
    """As a run leaves it whose `checkpoint.folder` this is, without tensors; None: as `flame.utils.convert_hf_to_dcp` does."""
    config = {} if folder is None else {"checkpoint": {"folder": folder}}
    make_folder(path, ".metadata")
    (path / TRAINER_FILE).write_text(json.dumps({"config": config, "world_size": 1, "files": {".metadata": 2}}))
    return path


def test_the_checkpoints_of_a_run_are_found_in_whatever_folder(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert list_run_checkpoints(run) == []
    for step in (9, 10, 100):
        make_checkpoint(run / "checkpoint" / f"step-{step}")
    expected = [run / "checkpoint" / f"step-{step}" for step in (9, 10, 100)]
    make_checkpoint(run / "checkpoint" / "step-200.partial")
    make_checkpoint(run / "checkpoint" / "step-300.damaged")
    (make_checkpoint(run / "checkpoint" / "step-400") / TRAINER_FILE).write_text('{"step": 4')
    make_checkpoint(run / "weights" / "step-500", None)
    make_checkpoint(run / "moved" / "step-500")
    make_checkpoint(run / "another" / "checkpoint" / "step-500")
    assert list_run_checkpoints(run) == expected

    for folder in ("deep/er", "./", "linked"):
        place = run / folder / "step-600"
        if folder == "linked":
            elsewhere.mkdir()
            (run / folder).symlink_to(elsewhere)
        make_checkpoint(place, folder)
        assert list_run_checkpoints(run) == [*expected, place]
        shutil.rmtree(place)


def test_exporting_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="is not a complete checkpoint folder"):
        convert(make_folder(tmp_path / "step-3"), tmp_path / "out")
