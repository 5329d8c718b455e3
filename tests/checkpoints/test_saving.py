"""Saving: what is written, when it is visible, what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flame.checkpoints import files as checkpoint_files
from flame.checkpoints import manager as checkpoint
from flame.checkpoints import random_state
from flame.checkpoints.manager import HF_FOLDER, TRAINER_FILE
from flame.checkpoints.storage import TensorWriter
from flame.errors import UserError
from flame.runtime.agreement import RankFailure
from tests.support.checkpoints import assert_equal, build_case, expected, names, read_stored


@pytest.fixture(autouse=True)
def in_group(group) -> None:
    """Each test is a process group of its own."""


PATIENCE = 30  # seconds until a thread that should have been let go gives up


def hold_writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing goes no further before the event is set."""
    gate, write = threading.Event(), TensorWriter.write_data

    def write_later(self, *arguments):
        gate.wait(PATIENCE)
        return write(self, *arguments)

    monkeypatch.setattr(TensorWriter, "write_data", write_later)
    return gate


def test_both_ways_write_the_same(tmp_path):
    """Every live tensor and the random states, once; the list of files is that of the folder."""
    for asynchronous in (False, True):
        case = build_case(tmp_path / str(asynchronous), asynchronous=asynchronous)
        case.fill(3)
        case.save(3)
        case.checkpointer.close()
        folder = tmp_path / str(asynchronous) / "step-3"
        stored = read_stored(folder)
        wanted = expected(3) | {f"rng.rank-00000.{name}": state for name, state in random_state.capture().items()}
        assert_equal(stored, wanted)
        state = json.loads((folder / TRAINER_FILE).read_text())
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        del files[TRAINER_FILE]
        assert state.pop("files") == files and {".metadata", "__0_0.distcp"} < files.keys()
        assert (folder / HF_FOLDER / "nested" / "vocab.txt").read_text() == "a b c"
        digests = {name: xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) for name in files}
        assert state.pop("digests") == digests and len(state.pop("digest")) == 32
        assert state == {"step": 3, "config": {"training": {"seed": 1}}, "world_size": 1}


def test_training_goes_on_while_a_thread_writes(tmp_path, monkeypatch):
    gate = hold_writing(monkeypatch)
    case = build_case(tmp_path, asynchronous=True)
    case.fill(1)
    state: dict[str, Any] = {"step": 1, "config": {}, "counters": {"tokens": 5}}
    case.checkpointer.save(1, state)
    case.fill(2)
    state["counters"]["tokens"] = 99
    assert names(tmp_path) == [] and not (tmp_path / "step-1").exists()
    gate.set()
    case.checkpointer.wait()
    assert_equal(case.full(), expected(2))
    loaded = case.checkpointer.load_latest(lambda state: None)
    assert loaded is not None and loaded["counters"] == {"tokens": 5}
    assert_equal(case.full(), expected(1))


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    """The host buffers are filled again only when the first checkpoint is written; and they are the same ones."""
    gate = hold_writing(monkeypatch)
    case = build_case(tmp_path, asynchronous=True)
    case.fill(1)
    case.save(1)
    case.fill(2)
    background = case.checkpointer._background
    assert background is not None
    buffers = {key: buffer.data_ptr() for key, buffer in background.staging._buffers.items()}
    wait = case.checkpointer.wait

    def wait_and_let_go() -> None:
        gate.set()
        wait()

    case.checkpointer.wait = wait_and_let_go  # type: ignore[method-assign]
    case.save(2)
    case.checkpointer.close()
    assert buffers == {key: buffer.data_ptr() for key, buffer in background.staging._buffers.items()}
    for step in (1, 2):
        stored = read_stored(tmp_path / f"step-{step}")
        assert_equal({name: stored[name] for name in expected(step)}, expected(step))


class PowerCut(BaseException):
    """Not an Exception: nothing catches it."""


@pytest.mark.parametrize("moment", ["write_durably", "sync_to_disk", "os.replace"])
def test_a_crash_before_the_commit_leaves_nothing_visible(tmp_path, monkeypatch, moment):
    case = build_case(tmp_path)
    case.fill(1)
    case.save(1)

    def crash(*arguments):
        raise PowerCut

    owner = os if moment == "os.replace" else checkpoint_files
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment.removeprefix("os."), crash)
        with pytest.raises(PowerCut):
            case.save(2)
    assert names(tmp_path) == ["step-1"] and (tmp_path / "step-2.partial").exists()
    case.fill(9)
    assert case.load() == 1
    assert_equal(case.full(), expected(1))
    case.save(2)
    assert names(tmp_path) == ["step-1", "step-2"] and not list(tmp_path.glob("*.partial"))


def test_files_are_on_the_disk_before_the_rename_and_the_rename_before_the_end(tmp_path, monkeypatch):
    """By the order of the calls: each file and folder is flushed, then renamed, then its parent is flushed, then others go."""
    case = build_case(tmp_path, keep=1)
    case.save(1)
    events: list[tuple[str, str]] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def note_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_replace(source, target) -> None:
        events.append(("replace", Path(source).name))
        replace(source, target)

    def note_rmtree(path, **options) -> None:
        events.append(("rmtree", Path(path).name))
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note_fsync)
        patch.setattr(os, "replace", note_replace)
        patch.setattr(shutil, "rmtree", note_rmtree)
        case.save(2)
    commit = events.index(("replace", "step-2.partial"))
    flushed = [name for kind, name in events[:commit] if kind == "fsync"]
    assert {"__0_0.distcp", "config.json", "vocab.txt", "nested", HF_FOLDER, "step-2.partial"} < set(flushed)
    assert flushed.index(TRAINER_FILE) > flushed.index("__0_0.distcp")
    assert events[commit + 1] == ("fsync", tmp_path.name)
    assert ("replace", "step-1") in events[commit + 2 :] and ("replace", "step-1") not in events[:commit]
    assert ("rmtree", "step-1.old.partial") in events[commit + 2 :]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_is_reported_once_and_leaves_the_others(tmp_path, monkeypatch, asynchronous):
    """At the next call if it was made beside the training; the checkpoint before it stays, although only one is kept."""
    case = build_case(tmp_path, keep=1, asynchronous=asynchronous)
    case.fill(1)
    case.save(1)
    case.checkpointer.wait()

    def attempt(error: OSError) -> None:
        def fail(*arguments):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(TensorWriter, "write_data", fail)
            case.save(2)
            case.checkpointer.wait()

    with pytest.raises(RankFailure, match=r"step-2\" was not saved: OSError: \[Errno 5\] broken"):
        attempt(OSError(errno.EIO, "broken"))
    with pytest.raises(UserError, match=r"job.dump_folder: the disk of .* is full: free space") as full:
        attempt(OSError(errno.ENOSPC, "No space left on device"))
    assert len(full.value.lines) == 1
    assert names(tmp_path) == ["step-1"] and not list(tmp_path.glob("*.partial"))
    case.checkpointer.wait()
    case.save(3)
    case.checkpointer.close()
    assert names(tmp_path) == ["step-3"]


def test_a_disk_that_is_full_is_told_from_what_follows_from_it(tmp_path, monkeypatch):
    """The archive that torch.save was writing reports an inner error of its own."""
    case = build_case(tmp_path)

    def create_stream(self, path, mode):
        if mode == "rb":
            return real(self, path, mode)
        return _open_full(path)

    from torch.distributed.checkpoint.filesystem import FileSystem

    real = FileSystem.create_stream
    monkeypatch.setattr(FileSystem, "create_stream", create_stream)
    with pytest.raises(UserError, match="is full"):
        case.save(1)
    assert not list(tmp_path.iterdir())


def _open_full(path: Path):
    """A context with a file that takes 300 bytes."""

    class Full:
        def __init__(self) -> None:
            self.file = open(path, "wb", buffering=0)  # noqa: SIM115
            self.left = 300

        def write(self, data) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *ignored: object) -> None:
            self.file.close()

    return Full()


def test_no_save_begins_without_room_for_it(tmp_path, monkeypatch):
    case = build_case(tmp_path / "deep" / "folder", keep=3)
    case.save(1)
    needed = sum(path.stat().st_size for path in (tmp_path / "deep").rglob("*") if path.is_file())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    free = [0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    for call in (case.checkpointer.prepare, lambda: case.save(2)):
        with pytest.raises(UserError) as error:
            call()
        (line,) = error.value.lines
        assert "job.dump_folder" in line and "needs 0.02 GiB" in line and "0.00 GiB are free" in line
        assert "lower checkpoint.keep_latest_k = 3" in line
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in read_stored(tmp_path / "deep/folder/step-1").values())
    free[0] = int(tensors * 1.01) + 16 * 2**20 - 1
    assert free[0] > needed
    with pytest.raises(UserError):
        case.save(2)
    free[0] += 1
    case.save(2)
    assert names(tmp_path / "deep" / "folder") == ["step-1", "step-2"]


def test_what_an_unfinished_save_has_left_does_not_take_the_room(tmp_path, monkeypatch):
    case = build_case(tmp_path)
    torn = tmp_path / "step-1.partial"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if torn.exists() else 2**40))
    case.checkpointer.prepare()
    assert not torn.exists()


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (0, [1, 2, 3, 4])])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept_but_not_before_the_commit(tmp_path, monkeypatch, keep, kept, asynchronous):
    case = build_case(tmp_path, keep=keep, asynchronous=asynchronous)
    seen: list[list[str]] = []
    commit = checkpoint.commit

    def look(*arguments) -> None:
        seen.append(names(tmp_path))
        commit(*arguments)

    monkeypatch.setattr(checkpoint, "commit", look)
    for step in range(1, 5):
        case.save(step)
    case.checkpointer.close()
    assert names(tmp_path) == [f"step-{step}" for step in kept]
    assert all(len(before) == min(step, keep or 9) for step, before in enumerate(seen))


def test_a_later_checkpoint_that_was_passed_over_does_not_push_out_the_new_one(tmp_path):
    case = build_case(tmp_path, keep=1)
    case.save(1)
    case.save(9)
    (tmp_path / "step-9" / "__0_0.distcp").unlink()
    case.save(2)
    assert names(tmp_path) == ["step-2", "step-9"]
    assert case.load() == 2


def test_the_same_step_is_replaced(tmp_path):
    case = build_case(tmp_path)
    for seed in (1, 2):
        case.fill(seed)
        case.save(5)
    assert names(tmp_path) == ["step-5"] and not list(tmp_path.glob("*.partial"))
    case.fill(3)
    case.load()
    assert_equal(case.full(), expected(2))


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "python_normal": lambda: random.gauss(0, 1),
    "numpy": lambda: np.random.random(),
    "numpy_normal": lambda: np.random.normal(),
}


def test_a_resumed_rank_draws_what_it_would_have_drawn(tmp_path):
    case = build_case(tmp_path)
    random.gauss(0, 1)
    np.random.normal()
    case.save(1)
    wanted = [draw() for draw in DRAWS.values()]
    assert case.load() == 1
    assert [draw() for draw in DRAWS.values()] == wanted


@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(list(DRAWS)), max_size=8))
def test_random_states_come_back(seed, calls):
    """From any point, also between the two normal variates that are drawn together."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    for call in calls:
        DRAWS[call]()
    state = random_state.capture()
    wanted = [draw() for draw in DRAWS.values() for _ in range(3)]
    random_state.restore(state)
    assert [draw() for draw in DRAWS.values() for _ in range(3)] == wanted


def test_a_checkpoint_whose_shard_is_not_there_is_not_committed(tmp_path, monkeypatch):
    """As where another machine writes into a folder of its own: the last good one is kept."""
    case = build_case(tmp_path, keep=1)
    case.save(1)
    real = checkpoint.check_written

    def lose(unfinished, metadata):
        next(unfinished.glob("*.distcp")).unlink()
        real(unfinished, metadata)

    monkeypatch.setattr(checkpoint, "check_written", lose)
    with pytest.raises(RankFailure, match=r"is missing or too short: is .* one folder for all machines"):
        case.save(2)
    assert names(tmp_path) == ["step-1"]


def test_a_failed_background_save_does_not_keep_the_next_from_being_made(tmp_path, monkeypatch, caplog):
    case = build_case(tmp_path, asynchronous=True)
    real, failures = checkpoint.commit, [1]

    def commit(*arguments) -> None:
        if failures and failures.pop():
            raise OSError(errno.EIO, "Input/output error")
        real(*arguments)

    monkeypatch.setattr(checkpoint, "commit", commit)
    case.save(1)
    case.save(2)
    case.checkpointer.wait()
    assert names(tmp_path) == ["step-2"]
    assert "was not saved" in caplog.text and "trying again with this one" in caplog.text
    failures += [1, 1]
    case.save(3)
    case.save(4)
    with pytest.raises(RankFailure):
        case.save(5)
