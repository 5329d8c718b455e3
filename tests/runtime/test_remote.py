"""Copies of remote folders: complete, as they are there now, made once for each machine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flame.errors import UserError
from flame.runtime.remote import fetch
from tests.support.refusals import expect_one_line
from tests.support.remote import serve

LABEL = 'checkpoint.initial_load_path = "there"'


pytestmark = pytest.mark.usefixtures("own_remote_cache")


def write(address: str, **files: str) -> None:
    for name, content in files.items():
        fsspec.filesystem("memory").pipe_file(f"{address}/{name.replace('__', '/')}", content.encode())


def read(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".state")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def find_refusal(label: str, address: str) -> str:
    with pytest.raises(UserError) as refusal:
        fetch(label, address, ["*", "config.json"])
    expect_one_line(refusal.value, label)
    return str(refusal.value)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    get = MemoryFileSystem.get_file

    def counted(self: Any, source: str, *arguments: Any, **settings: Any) -> None:
        names.append(source.rpartition("/")[2])
        get(self, source, *arguments, **settings)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return names


def test_files_that_match_are_copied_once(address: str, copied: list[str]) -> None:
    write(address, a_json="1", b_json="2", c="3", sub__d_json="4")
    folder = fetch(LABEL, address, ["*_json"])
    assert read(folder) == {"a_json": "1", "b_json": "2"} and sorted(copied) == ["a_json", "b_json"]
    assert fetch(LABEL, address + "/", ["a_json", "c"]) == folder
    assert read(folder) == {"a_json": "1", "b_json": "2", "c": "3"} and copied[2:] == ["c"]
    fetch(LABEL, address, ["*", "sub/*"])
    assert read(folder)["sub/d_json"] == "4" and copied[3:] == ["d_json"]


def test_a_copy_is_what_is_there_now(address: str, copied: list[str]) -> None:
    write(address, a="1", b="2", c="3")
    folder = fetch(LABEL, address, ["*"])
    write(address, a="9")  # as many bytes
    fsspec.filesystem("memory").rm_file(f"{address}/b")
    (folder / "c").write_text("")
    assert read(fetch(LABEL, address, ["a", "c"])) == {"a": "9", "c": "3"}
    assert sorted(copied[3:]) == ["a", "c"]


def test_what_came_short_is_no_copy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(address, a="1", b="22")

    def cut(self: Any, source: str, target: str, **settings: Any) -> None:
        Path(target).write_text("1")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", cut)
        assert "2 bytes, and 1 came" in find_refusal(LABEL, address)
    assert read(fetch(LABEL, address, [])) == {"a": "1"}
    assert read(fetch(LABEL, address, ["*"])) == {"a": "1", "b": "22"}


def test_nothing_is_written_outside_the_copy(address: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    write(address, a="1")
    root = store._strip_protocol(address)
    store.store[f"{root}/../../evil"] = store.store[f"{root}/a"]
    try:
        assert read(fetch(LABEL, address, ["*", "*/*", "*/*/*"])) == {"a": "1"}
    finally:
        del store.store[f"{root}/../../evil"]
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("memory://bucket/nowhere", "no such folder"),
        ("nonsense://bucket/x", "fsspec knows no nonsense://"),
        ("http://127.0.0.1:9/x", "cannot be copied"),
    ],
)
def test_mistakes_are_one_line(place: str, says: str) -> None:
    assert says in find_refusal(f'model.config = "{place}"', place)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", refuse)
    line = find_refusal(LABEL, "s3://bucket/x")
    assert line == f"{LABEL}: needs a package that is not installed (Install s3fs to access S3): install it"


@pytest.mark.parametrize("lists", [True, False])
def test_a_web_server_need_not_list_its_files(tmp_path: Path, lists: bool) -> None:
    place = tmp_path / "web" / "model"
    place.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "part-1.bin", "other.bin"):
        (place / name).write_text(name)
    with serve(tmp_path / "web", lists=lists) as (server, gets):
        folder = fetch(LABEL, f"{server}/model", ["config.json", "token*", "part-1.bin", "missing.bin"])
        assert read(folder) == {name: name for name in ("config.json", "tokenizer.json", "part-1.bin")}
        gets.clear()
        fetch(LABEL, f"{server}/model", ["config.json", "token*"])
        assert not gets["/model/config.json"] and len(read(folder)) == 3
        (place / "config.json").unlink()
        fetch(LABEL, f"{server}/model", ["config.json", "token*"])
        assert read(folder).keys() == {"tokenizer.json", "part-1.bin"}


def test_who_comes_at_the_same_time_waits(address: str, copied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As processes of a machine do: locks of files tell threads apart, too."""
    write(address, a="1")
    get = MemoryFileSystem.get_file

    def linger(self: Any, *arguments: Any, **settings: Any) -> None:
        get(self, *arguments, **settings)
        time.sleep(0.3)

    monkeypatch.setattr(MemoryFileSystem, "get_file", linger)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(LABEL, address, ["*"]), range(4)))
    assert copied == ["a"] and read(folders.pop()) == {"a": "1"}
