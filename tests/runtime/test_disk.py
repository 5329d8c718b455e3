"""Disks that fail for a moment or for good, and files that vanish while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flame.errors import MachineFault, UserError
from flame.runtime import disk
from flame.runtime.appended_file import AppendedFile
from flame.runtime.disk import explain, replace
from flame.runtime.lock import LOCK_FILE, lock_run


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSE_SECONDS", 0.0)


def fail_first(monkeypatch: pytest.MonkeyPatch, times: int, number: int, *, made: bool = False) -> list[int]:
    """Let the first renames fail with an error.

    Args:
        made: the rename is made, and only its answer is lost.
    """
    real, calls = os.replace, []

    def fail(source, target):
        calls.append(1)
        if len(calls) <= times:
            if made:
                real(source, target)
            raise OSError(number, os.strerror(number), str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    return calls


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_rename_that_fails_once_is_tried_again(tmp_path, monkeypatch, caplog, number):
    (tmp_path / "a").write_text("a")
    calls = fail_first(monkeypatch, 1, number)
    replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a" and len(calls) == 2
    (message,) = caplog.messages
    assert "cannot be renamed to b" in message and "trying again" in message


def test_a_rename_whose_answer_was_lost_is_made(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    fail_first(monkeypatch, 1, errno.ESTALE, made=True)
    replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"


@pytest.mark.parametrize(("number", "attempts"), [(errno.EIO, disk.ATTEMPTS), (errno.EROFS, 1), (errno.ENOENT, 1)])
def test_a_rename_that_fails_for_good_raises(tmp_path, monkeypatch, number, attempts):
    calls = fail_first(monkeypatch, 9, number)
    with pytest.raises(OSError) as raised:
        replace(tmp_path / "a", tmp_path / "b")
    assert raised.value.errno == number and len(calls) == attempts


@pytest.mark.parametrize(
    ("number", "name", "kind"),
    [
        (errno.EROFS, "run/x", UserError),
        (errno.EACCES, "elsewhere", UserError),
        (errno.ENOSPC, "run/x", UserError),
        (errno.EIO, "elsewhere", MachineFault),
        (errno.ESTALE, "run/x", MachineFault),
        (errno.ENOENT, "run/x", UserError),
        (errno.ENOENT, "elsewhere", None),
        (errno.EINVAL, "run/x", None),
    ],
)
def test_errors_of_the_disk_are_one_line_and_those_of_the_program_are_not(number, name, kind):
    told = explain(OSError(number, os.strerror(number), name), Path("run"))
    assert type(told) is (kind or type(None))
    if told is not None:
        (line,) = told.lines
        assert line.startswith(f'"{name}": {os.strerror(number)}: ')


def test_a_file_that_is_deleted_is_written_anew_with_what_it_had(tmp_path, caplog):
    path = tmp_path / "lines"
    path.write_text("before\n")
    file = AppendedFile(path)
    file.write("one")
    for line in ("two", "three"):
        path.unlink()
        file.write(line)
    file.sync()
    assert path.read_text() == "before\none\ntwo\nthree\n"
    path.unlink()
    file.close()
    assert path.read_text() == "before\none\ntwo\nthree\n"
    assert caplog.messages == [f'"{path}" was deleted: it is written anew']


def test_a_file_that_is_replaced_is_gone_on_with(tmp_path, caplog):
    """As by an editor that saves under the same name."""
    path = tmp_path / "lines"
    file = AppendedFile(path)
    file.write("one")
    (tmp_path / "new").write_text("edited\n")
    (tmp_path / "new").rename(path)
    file.write("two")
    file.close()
    assert path.read_text() == "edited\ntwo\n"
    assert caplog.messages == [f'"{path}" was replaced: the run goes on in the new file']


def test_a_link_or_a_lost_folder_ends_the_writing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    file = AppendedFile(folder / "lines")
    (folder / "lines").unlink()
    (folder / "lines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="was replaced by a link"):
        file.write("one")
    (folder / "lines").unlink()
    folder.rmdir()
    with pytest.raises(MachineFault, match=f'"{folder}" was deleted while the run was writing to it'):
        file.write("one")
    file.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(UserError, match=r"run\.lock in it cannot be opened for writing \(Is a directory\)") as told:
        lock_run(tmp_path)
    assert len(told.value.lines) == 1

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be opened for writing \(Read-only file system\): make it writable"):
        lock_run(tmp_path)
