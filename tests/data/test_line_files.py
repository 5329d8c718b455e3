"""Lines of plain files, read in place: the same as reading the files in text mode."""

from __future__ import annotations

import gzip
import io
import pickle
import random
from pathlib import Path

import pytest

from flame.config.schema import Corpus
from flame.data.sources import line_files
from flame.data.sources.cells import FileShards, TableRows
from flame.data.sources.json_lines import JsonLines
from flame.data.sources.line_files import LineRows, open_lines
from flame.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read_in_text_mode(content: bytes) -> list[str]:
    text = io.TextIOWrapper(io.BytesIO(content), encoding="latin-1").read()
    return text.removesuffix("\n").split("\n") if text else []


def strip_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def open_all(files: list[Path]) -> LineRows:
    rows = open_lines([str(path) for path in files], lambda cell: cell)
    assert rows is not None
    return rows


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 1 << 20])
def test_lines_are_those_of_text_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(line_files, "BYTES_AT_ONCE", at_once)
    draw = random.Random(0)
    contents = [b"a", b"\n", b"\r", b"\r\n", b"\n\r", b"a\r", b"a\n\nb", b"\xef\xbb\xbfx\r\r\ny\xff\x00"]
    contents += [bytes(draw.choice(b"\n\rab\x85\x0b\xff") for _ in range(draw.randrange(1, 40))) for _ in range(60)]
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_bytes(content)
    expected = [line for content in contents for line in read_in_text_mode(content)]
    for rows in (
        open_all(files),
        open_all(files),
        pickle.loads(pickle.dumps(LineRows([str(files[0])], open_all(files[:1])._index, str))),
    ):
        part = expected if len(rows) > 1 else expected[:1]
        assert len(rows) == len(part)
        assert [strip_end(rows.read(index)) for index in range(len(rows))] == part
    backwards = [strip_end(open_all(files).read(index)) for index in reversed(range(len(expected)))]
    assert backwards[::-1] == expected


def test_rows_are_those_of_compressed_files(tmp_path: Path) -> None:
    content = b'{"text": "a"}\r\n\n{"text": "\xc3\xa9"}\r{"text": "\xe9"}\nno json\n'
    content += b'\xef\xbb\xbf{"text": " b "}\n{"text": 1}\n{"text": "c"}'
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content))

    def read(name: str, *, streaming: bool = False) -> list[str | None]:
        rows = JsonLines(Corpus(dataset="json", data_files=str(tmp_path / name), streaming=streaming), "training").open()
        assert isinstance(rows, FileShards if streaming else LineRows if name.startswith("plain") else TableRows)
        return list(rows.read_shard(0, 0) if isinstance(rows, FileShards) else map(rows.read, range(len(rows))))

    expected = ["a", None, "é", None, None, " b ", None, "c"]
    assert read("plain.jsonl") == read("plain.jsonl", streaming=True) == read("packed.jsonl.gz") == expected


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_file_that_changes_ends_the_run(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = open_all([path])
    if change == "shorter":
        assert rows.read(0) == '{"text": "one"}\n'
        path.open("r+").truncate(20)
    else:
        path.write_text('{"text": "three"}\n{"text": "four"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl.*changed"):
        rows.read(1)
    assert len(open_all([path])) == 2 and open_all([path]).read(1) is not None


def test_the_index_is_made_once_for_each_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n")
    assert len(open_all([path])) == 2
    with monkeypatch.context() as patched:
        patched.setattr(line_files, "index_lines", None)
        assert len(open_all([path])) == 2
    path.write_text("1\n2\n3\n")
    assert len(open_all([path])) == 3
