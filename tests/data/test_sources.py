from __future__ import annotations

import bz2
import csv
import gzip
import http.server
import io
import logging
import lzma
import pickle
import sysconfig
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.feather as pa_feather
import pyarrow.parquet as pq
import pytest
import zstandard

from flame.config.schema import Training
from flame.data.sources.base import TextRows
from flame.data.sources.cells import FileShards
from flame.data.sources.csv import CsvColumn
from flame.errors import UserError
from tests.support.sources import choose_kind
from tests.support.sources import open_source as open_any_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def open_source(training: Training) -> TextRows:
    source = open_any_source(training, "training")
    assert not hasattr(source, "num_shards")
    return source


def read_all(source: TextRows) -> list[str | None]:
    rows = [source.read(index) for index in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(index) for index in range(len(copy))] == rows, "workers must see the same rows"
    return rows


def read_either(training: Training) -> list[Any]:
    """All rows, with random access or streamed, here and as a worker sees them."""
    source = open_any_source(training, "training")
    if not hasattr(source, "num_shards"):
        return read_all(source)
    copies = [source, pickle.loads(pickle.dumps(source))]
    rows, again = ([row for shard in range(each.num_shards) for row in each.read_shard(shard, 0)] for each in copies)
    assert rows == again
    return rows


def expect_one_line(training: Training, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        open_any_source(training, "training")
    assert len(caught.value.lines) == 1 and "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_standard_library_of_this_machine() -> None:
    source = open_source(Training())
    assert choose_kind(Training()).short_name == "stdlib" and len(source) > 500
    texts = {source.read(index) for index in range(len(source))}
    assert Path(sysconfig.get_path("stdlib"), "asyncio", "locks.py").read_text(encoding="utf-8") in texts


def test_standard_library_is_sorted_without_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "b.py": b"b\r\n",
        "a/z.py": b"z",
        "a.py": "é".encode(),
        "bad.py": b"# \xe9",
        "empty.py": b" \n",
        "notes.txt": b"no",
        "site-packages/x.py": b"no",
        "dist-packages/deep/y.py": b"no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    source = open_source(Training())
    assert read_all(source) == ["é", "z", "b\r\n", None, None]
    (tmp_path / "a.py").unlink()
    assert source.read(0) is None


def test_text_files_are_one_document_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a[1]*.txt").write_bytes("one\r\ntwo é\u2028\u0085end\n".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").write_bytes(b" \n\t\n")
    (tmp_path / "e.txt").write_bytes(b"last")
    (tmp_path / "folder.txt").mkdir()
    source = open_source(Training(dataset="text", data_files=f"{tmp_path}/e.txt, {tmp_path}/*.txt"))
    assert read_all(source) == ["last", "one\ntwo é\u2028\u0085end\n", None, None, None]
    assert capfd.readouterr() == ("", "")


def test_each_broken_json_line_is_one_bad_row(tmp_path: Path) -> None:
    good_and_bad = [
        (b'\xef\xbb\xbf{"body": "first"}', "first"),
        (b"", None),
        (b'{"body": 1}', None),
        (b'{"other": "x"}', None),
        (b'["body"]', None),
        (b"{broken", None),
        (b'{"body": "caf\xe9"}', None),
        (b'{"body": " \\n "}', None),
        (b'{"body": ""}', None),
        (b'{"body": null}', None),
        (b'{"body": "\\ud800"}', None),
        (b"[" * 100_000, None),
        ('{"id": 1, "body": "é\u2028\u0085 \\n \\u00e9 \U0001f600"}'.encode(), "é\u2028\u0085 \n é \U0001f600"),
        (b'{"body": "last"}', "last"),
    ]
    lines, expected = zip(*good_and_bad, strict=True)
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "windows.jsonl").write_bytes(b'{"body": "x"}\r\n{"body": "y"}')
    (tmp_path / "a-empty.jsonl").write_bytes(b"")
    source = open_source(Training(dataset="json", data_files=f"{tmp_path}/*.jsonl", text_column="body"))
    assert read_all(source) == [*expected, "x", "y"]


def test_parquet_rows(tmp_path: Path) -> None:
    rows = pa.array([b"good", b"caf\xe9", None, b" ", b"", "é".encode()], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": range(6), "body": rows}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "body": pa.array([], pa.string())}), tmp_path / "a.parquet")
    source = open_source(Training(dataset="parquet", data_files=f"{tmp_path}/*.parquet", text_column="body"))
    assert read_all(source) == ["good", None, None, None, None, "é"]


def test_parquet_column_must_be_one_of_strings(tmp_path: Path) -> None:
    table = pa.table({"id": [1], "body": ["x"], "tags": [["a"]], "raw": [b"x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    files = f"{tmp_path}/a.parquet"
    columns = "id (int64), body (string), tags (List), raw (binary)"
    expect_one_line(Training(dataset="parquet", data_files=files), 'training.text_column = "text" is not a column of', columns)
    for column in ("id", "tags", "raw"):
        training = Training(dataset="parquet", data_files=files, text_column=column)
        expect_one_line(training, f'training.text_column = "{column}" is a column of', "not of strings", columns)


def test_dataset_by_name(tmp_path: Path) -> None:
    """A folder stands in for the Hub: `datasets` treats its path as the name of a dataset."""
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"body": ["c"]}), tmp_path / "test.parquet")
    name = str(tmp_path)
    assert read_all(open_source(Training(dataset=name, text_column="body"))) == ["a", "b"]
    assert read_all(open_source(Training(dataset=name, text_column="body", dataset_split="test"))) == ["c"]
    expect_one_line(Training(dataset=name), "training.text_column", "body (string)")
    expect_one_line(Training(dataset=name, dataset_split="dev"), f'training.dataset = "{name}"', "dev", "training.dataset_split")
    expect_one_line(Training(dataset=name, dataset_name="en"), f'training.dataset = "{name}"', "training.dataset_name")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk_is_read(tmp_path: Path, streaming: bool) -> None:
    rows = datasets.Dataset.from_dict({"body": ["a", "b", None, "d"], "id": [1, 2, 3, 4]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=rows, dev=rows.select([3, 0])).save_to_disk(tmp_path / "several")
    one, several = (
        Training(dataset=f"{tmp_path}/{name}", streaming=streaming, text_column="body") for name in ("one", "several")
    )
    assert read_either(one) == read_either(several) == ["a", "b", None, "d"]
    several.dataset_split = "dev"
    assert read_either(several) == ["d", "a"]
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    ids.save_to_disk(tmp_path / "ids")
    found = read_either_ids(Training(dataset=f"{tmp_path}/ids", streaming=streaming, text_column="input_ids"))
    assert found == [[1, 2], [3]]

    several.dataset_split = "test"
    expect_one_line(several, 'training.dataset_split = "test" is no split of', "which has: train, dev")
    several.dataset_split, several.text_column = "train", "text"
    expect_one_line(several, 'training.text_column = "text" is not a column of', "body (string), id (int64)")
    one.dataset_split = "dev"
    expect_one_line(one, 'training.dataset_split = "dev"', "with one split")
    one.dataset_split, one.dataset_name = "train", "en"
    expect_one_line(one, 'training.dataset_name = "en"', "no configurations")
    (tmp_path / "one" / "state.json").write_text("{")
    one.dataset_name = ""
    expect_one_line(one, "is a folder of save_to_disk that cannot be read")


def read_either_ids(training: Training) -> list[Any]:
    source = open_any_source(training, "training")
    if hasattr(source, "num_shards"):
        return [row.tolist() for shard in range(source.num_shards) for row in source.read_shard(shard, 0)]
    return [source.read(index).tolist() for index in range(len(source))]


def test_dataset_out_of_reach() -> None:
    expect_one_line(Training(dataset="nobody/nothing"), 'training.dataset = "nobody/nothing" cannot be loaded', "network")


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_sources_without_rows(tmp_path: Path, kind: str) -> None:
    if kind == "json":
        (tmp_path / "empty").write_bytes(b"")
    else:
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty")
    expect_one_line(
        Training(dataset=kind, data_files=f"{tmp_path}/empty"), f'training.dataset = "{kind}"', "empty", "has no rows"
    )


def test_standard_library_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    expect_one_line(Training(), 'training.dataset = "stdlib" has no rows')


@pytest.mark.parametrize(
    ("kind", "content"), [("parquet", b"PAR1 broken"), ("text", b"\x1f\x8b broken"), ("json", b"\x1f\x8b broken")]
)
def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes) -> None:
    (tmp_path / "broken.gz").write_bytes(content)
    files = f"{tmp_path}/broken.gz"
    handler = BufferingHandler(capacity=100)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    expect_one_line(Training(dataset=kind, data_files=files), f'training.dataset = "{kind}" cannot be loaded', files)
    assert not handler.buffer, "the one line is all that the user sees"


OTHER_COLUMNS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "null-typed in the first": ({"tag": pa.nulls(2)}, {"tag": ["x", "y"]}),
    "null-typed in the second": ({"tag": ["x", "y"]}, {"tag": pa.nulls(2)}),
    "only in the first": ({"id": [1, 2]}, {}),
    "only in the second": ({}, {"id": [1, 2]}),
    "of other types": ({"id": [1, 2]}, {"id": [["a"], []]}),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_other_columns_may_differ_from_file_to_file(tmp_path: Path, case: str, kind: str, streaming: bool) -> None:
    first, second = OTHER_COLUMNS[case]
    texts = {"a": ["one", "two"], "b": ["three", None]}
    write = pq.write_table if kind == "parquet" else pa_feather.write_feather
    for name, others in (("a", first), ("b", second)):
        write(pa.table({"text": texts[name], **others}), tmp_path / f"{name}.{kind}")
    corpus = Training(dataset=kind, data_files=f"{tmp_path}/*.{kind}", streaming=streaming)
    assert read_either(corpus) == ["one", "two", "three", None]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_other_columns_of_a_hub_dataset_may_differ(tmp_path: Path, case: str, streaming: bool) -> None:
    first, second = OTHER_COLUMNS[case]
    pq.write_table(pa.table({"text": ["one", "two"], **first}), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": ["three", None], **second}), tmp_path / "train-00001-of-00002.parquet")
    assert read_either(Training(dataset=str(tmp_path), streaming=streaming)) == ["one", "two", "three", None]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([pa.nulls(2), pa.array(["a", "b"])], [None, None, "a", "b"]),
        ([pa.array(["a", None]), pa.nulls(1)], ["a", None, None]),
        ([pa.array(["a"]), pa.array(["b"], pa.large_string())], ["a", "b"]),
        ([pa.array(["a", "a"]).dictionary_encode(), pa.array(["b"])], ["a", "a", "b"]),
    ],
)
def test_the_column_itself_may_be_null_or_another_kind_of_string(
    tmp_path: Path, cells: list[pa.Array], expected: list[str | None], streaming: bool
) -> None:
    for number, column in enumerate(cells):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
    corpus = Training(dataset="parquet", data_files=f"{tmp_path}/*.parquet", streaming=streaming)
    assert read_either(corpus) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_the_column_is_named(tmp_path: Path, streaming: bool) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    corpus = Training(dataset="parquet", data_files=f"{tmp_path}/*.parquet", streaming=streaming)
    for columns, parts in (
        ({"body": ["b"]}, ["is not a column of", "b.parquet", "body (string)"]),
        ({"text": [1]}, ["is a column of int64, not of strings", "b.parquet"]),
        ({"text": [[1, 2]]}, ["is string in ", "and List in ", "a.parquet", "b.parquet"]),
    ):
        pq.write_table(pa.table(columns), tmp_path / "b.parquet")
        expect_one_line(corpus, 'training.text_column = "text"', 'training.dataset = "parquet"', *parts)


def test_streaming_reads_the_same_rows_from_anywhere(tmp_path: Path) -> None:
    """JSON lines and parquet, shard by shard, from the start and from each row, bad rows included; also in another process."""
    for shard in range(3):
        rows = [b'{"text": "%d-%d"}' % (shard, row) if row % 5 != 2 else b"{broken \xe9" for row in range(700)]
        (tmp_path / f"{shard}.jsonl").write_bytes(b"\n".join(rows))
        cells = pa.array([b"%d-%d" % (shard, row) if row % 5 != 2 else b"caf\xe9" for row in range(700)], pa.binary())
        pq.write_table(pa.table({"id": range(700), "text": cells.view(pa.string())}), tmp_path / f"{shard}.parquet")
    for kind, files in (("json", "*.jsonl"), ("parquet", "*.parquet")):
        training = Training(dataset=kind, data_files=f"{tmp_path}/{files}", streaming=True)
        opened = open_any_source(training, "training")
        assert isinstance(opened, FileShards) and opened.num_shards == 3
        for source in (opened, pickle.loads(pickle.dumps(opened))):
            for shard in range(3):
                expected = [f"{shard}-{row}" if row % 5 != 2 else None for row in range(700)]
                for row in (0, 1, 255, 256, 257, 699, 700):
                    assert list(source.read_shard(shard, row)) == expected[row:], (kind, shard, row)


def test_a_streamed_shard_that_breaks_is_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        texts = [f"{row * 7919**3:x}" for row in range(5000)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=1000)
    corpus = Training(dataset="parquet", data_files=f"{tmp_path}/*.parquet", streaming=True)
    source = open_any_source(corpus, "sources.web")
    assert isinstance(source, FileShards) and choose_kind(corpus, "sources.web").short_name == "web"
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[200:-5000] = bytes(len(content) - 5200)
    (tmp_path / "b.parquet").write_bytes(content)
    assert list(source.read_shard(0, 4990)) == texts[4990:]
    with pytest.raises(UserError, match=r'sources.web.dataset = "parquet": shard 1 of 2 cannot be read after row \d+') as caught:
        list(source.read_shard(1, 0))
    assert len(caught.value.lines) == 1 and "\n" not in str(caught.value)


# ---------------------------------------------------------------- streaming or not, and broken files


def compress(name: str, content: bytes) -> bytes:
    if name == "zip":
        with io.BytesIO() as buffer:
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("rows", content)
            return buffer.getvalue()
    if name == "tar":
        with io.BytesIO() as buffer:
            with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
                member = tarfile.TarInfo("rows")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            return buffer.getvalue()
    if name == "lz4":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "lz4") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    how: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
        "two frames": lambda part: zstandard.compress(part[:7]) + zstandard.compress(part[7:]),
        "plain": lambda part: part,
    }
    return how[name](content)


COMPRESSIONS = ["gz", "bz2", "xz", "zst", "two frames", "lz4", "zip", "tar", "plain"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_content_says_how_lines_are_compressed(tmp_path: Path, compression: str, suffix: str, streaming: bool) -> None:
    lines = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "caf\xc3\xa9"}\n{broken\n'
    (tmp_path / f"a.{suffix}").write_bytes(compress(compression, lines))
    (tmp_path / f"b.{suffix}").write_bytes(compress(compression, b""))
    (tmp_path / f"c.{suffix}").write_bytes(compress(compression, b'{"text": "last"}'))
    corpus = Training(dataset="json", data_files=f"{tmp_path}/*.{suffix}", streaming=streaming)
    assert read_either(corpus) == ["one", "café", None, "last"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_content_says_how_texts_are_compressed(tmp_path: Path, compression: str, streaming: bool) -> None:
    for name, content in (("a", b""), ("b", b"\xef\xbb\xbfone\r\ntwo"), ("c", b"\xef\xbb\xbf"), ("d", b"caf\xe9")):
        (tmp_path / f"{name}.txt").write_bytes(compress(compression, content))
    corpus = Training(dataset="text", data_files=f"{tmp_path}/*.txt", streaming=streaming)
    assert read_either(corpus) == [None, "one\ntwo", None, None]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_archive_is_its_files_in_order(tmp_path: Path, streaming: bool) -> None:
    names = ["b.txt", "a/z.txt", "a/b/c.txt", ".hidden", "__MACOSX/b.txt", "a.txt"]
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    corpus = Training(dataset="text", data_files=f"{tmp_path}/*", streaming=streaming)
    assert read_either(corpus) == ["a.txt", "b.txt", "a/z.txt", "a/b/c.txt"] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("json", gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-9], "Compressed file ended"),
        ("json", zstandard.compress(b'{"text": "x"}\n' * 100)[:-9], "Truncated compressed stream"),
        ("json", b"7z\xbc\xaf\x27\x1cxxxx", "it is a 7z archive, which is not read: unpack it"),
        ("text", b"PK\x03\x04 broken", "not a zip file"),
        ("parquet", b"PAR1 broken", "Parquet magic bytes not found"),
        ("arrow", b"ARROW1 broken", "File is too small"),
        ("csv", b'text,b\n"a,b\n', "EOF inside string: a quote in the row that begins in line 2"),
    ],
)
def test_a_broken_file_among_good_ones_is_named(tmp_path: Path, kind: str, content: bytes, reason: str, streaming: bool) -> None:
    table = pa.table({"text": ["good"]})
    for name in ("a", "c"):
        if kind in ("parquet", "arrow"):
            (pq.write_table if kind == "parquet" else pa_feather.write_feather)(table, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b'{"text": "good"}\n' if kind == "json" else b"text\ngood\n")
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_either(Training(dataset=kind, data_files=f"{tmp_path}/*", streaming=streaming))
    assert len(caught.value.lines) == 1
    for part in (f'"{tmp_path}/b"', reason, f'training.dataset = "{kind}"'):
        assert part in str(caught.value)
    assert f"{tmp_path}/*" not in str(caught.value)


# ---------------------------------------------------------------- folders, csv, remote addresses


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "text", "csv", "parquet", "arrow"])
def test_a_folder_is_its_files_of_the_kind(tmp_path: Path, kind: str, streaming: bool) -> None:
    suffix = {"json": "jsonl", "text": "txt"}.get(kind, kind)
    folder = tmp_path / "data"
    for name in ("b", "a", "sub/c", ".hidden/d", "_e"):
        path = folder / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, kind, Path(name).name)
    (folder / "README.html").write_text("no")
    if kind in ("json", "text", "csv"):
        plain = (folder / f"b.{suffix}").read_bytes()
        (folder / f"b.{suffix}").unlink()
        (folder / f"b.{suffix}.zst").write_bytes(zstandard.compress(plain))
    corpus = Training(dataset=kind, data_files=str(folder), streaming=streaming)
    assert read_either(corpus) == ["_e", "a", "b", "c"]
    (tmp_path / "none").mkdir()
    corpus.data_files = f"{tmp_path}/none"
    expect_one_line(corpus, f'training.data_files: "{tmp_path}/none" matches no file: of a folder, those that end with .{suffix}')


def write_text(path: Path, kind: str, text: str) -> None:
    """One file with one document."""
    if kind in ("parquet", "arrow"):
        (pq.write_table if kind == "parquet" else pa_feather.write_feather)(pa.table({"text": [text]}), path)
    else:
        path.write_text({"json": f'{{"text": "{text}"}}\n', "text": text, "csv": f"id,text\n1,{text}\n"}[kind])


@pytest.mark.parametrize("streaming", [False, True])
def test_csv_cells_are_texts(tmp_path: Path, streaming: bool) -> None:
    """As Python's own reader has them; numbers and words such as NA are texts too."""
    rows = [["1", 'a, "b"\nc'], ["2", "NA"], ["x", "12"], ["3", ""], ["4", " "], ["5", "é✓"]]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *rows])
    with open(tmp_path / "b.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "extra"], ["q,r", "1"]])
    (tmp_path / "c.csv").write_bytes(b"text\ncaf\xe9\nok\n")
    (tmp_path / "d.csv").write_bytes(b"")
    with open(tmp_path / "a.csv", newline="", encoding="utf-8-sig") as file:
        expected: list[str | None] = [row["text"] for row in csv.DictReader(file)]
    assert expected[0] == rows[0][1]
    expected = [text if text and text.strip() else None for text in expected]
    corpus = Training(dataset="csv", data_files=f"{tmp_path}/*", streaming=streaming)
    assert read_either(corpus) == [*expected, "q,r", None, "ok"]
    expect_one_line(replace(corpus, text_column="body"), 'training.text_column = "body" is not a column of', "id (string)")


CSV = {
    "a cell too many": ("a.csv", b"text,label\na,1,x\nb,2\n", [None, "b"]),
    "a cell too many in each row": ("a.csv", b"text,label\na,1,x\n\nb,2,y\nc,3\n", [None, None, "c"]),
    "a cell too few": ("a.csv", b"label,text\n1\n2,b\n", [None, "b"]),
    "a quote in tab-separated cells": ("a.tsv", b'text\tlabel\n"a\t1\nb"c\t2\nd\t3\n', ['"a', 'b"c', "d"]),
    "a byte order mark before a quote": ("a.csv", b'\xef\xbb\xbf"text",label\n"a,b",1\n', ["a,b"]),
    "a byte order mark": ("a.tsv", b"\xef\xbb\xbftext\tlabel\r\na\t1\r\n", ["a"]),
    "a long cell": ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", ["x" * 200_000]),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", CSV)
def test_cells_of_csv_stay_in_their_row_and_column(tmp_path: Path, case: str, streaming: bool) -> None:
    name, content, expected = CSV[case]
    (tmp_path / name).write_bytes(content)
    assert read_either(Training(dataset="csv", data_files=f"{tmp_path}/{name}", streaming=streaming)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_csv_may_have_any_name(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.csv").write_text("текст,label\né,1\n", encoding="utf-8-sig")
    corpus = Training(dataset="csv", data_files=f"{tmp_path}/a.csv", streaming=streaming, text_column="текст")
    assert read_either(corpus) == ["é"]
    expect_one_line(replace(corpus, text_column="text"), "is not a column", "текст (string)")


def test_copies_of_older_readers_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    corpus = Training(dataset="csv", data_files=f"{tmp_path}/a.csv")
    assert read_either(corpus) == ["a"]
    monkeypatch.setattr(CsvColumn, "read", lambda reader, path: iter([pa.array(["corrected"], reader.cell_type)]))
    assert read_either(corpus) == ["a"]
    monkeypatch.setattr("flame.data.sources.arrow_cache.READERS_VERSION", "new")
    assert read_either(corpus) == ["corrected"]


@pytest.fixture
def memory() -> Iterator[Any]:
    """A remote place that is in memory."""
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.rm("/", recursive=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "text", "csv", "parquet", "arrow"])
def test_remote_files_are_read_as_those_here(tmp_path: Path, memory: Any, kind: str, streaming: bool) -> None:
    suffix = {"json": "jsonl", "text": "txt"}.get(kind, kind)
    for name in ("a", "b"):
        write_text(tmp_path / name, kind, name)
        memory.pipe(f"/bucket/{name}.{suffix}", (tmp_path / name).read_bytes())
    memory.pipe("/bucket/README.html", b"no")
    for files in ("memory://bucket", f"memory://bucket/*.{suffix}", f"memory://bucket/a.{suffix}, memory://bucket/b.{suffix}"):
        assert read_either(Training(dataset=kind, data_files=files, streaming=streaming)) == ["a", "b"]
    if kind != "parquet":
        return
    write_text(tmp_path / "a", kind, "changed")
    memory.pipe("/bucket/a.parquet", (tmp_path / "a").read_bytes())
    assert read_either(Training(dataset=kind, data_files="memory://bucket", streaming=streaming)) == ["changed", "b"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "text", "csv", "parquet"])
def test_files_of_a_web_server(tmp_path: Path, kind: str, streaming: bool) -> None:
    """One that knows no ranges."""
    write_text(tmp_path / "file", kind, "from afar")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, redirect_stderr(io.StringIO()):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/file"
        assert read_either(Training(dataset=kind, data_files=address, streaming=streaming)) == ["from afar"]
        expect_one_line(Training(dataset=kind, data_files=f"{address}x"), "cannot be listed", "filex")
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        pytest.param(
            "s3://bucket/a.jsonl",
            ["needs a package that is not installed", "s3fs"],
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed"),
        ),
        ("memory://none/a.jsonl", ["cannot be listed"]),
        ("memory://none/*.jsonl", ["matches no file"]),
        ("nothing://a", ["cannot be listed", "nothing"]),
    ],
)
def test_addresses_that_cannot_be_read(address: str, parts: list[str]) -> None:
    expect_one_line(Training(dataset="json", data_files=address), f'training.data_files: "{address}"', *parts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_was_saved_with_a_format(tmp_path: Path, streaming: bool) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "input_ids": [[1, 2], [3]]})
    table.with_format("torch").save_to_disk(tmp_path / "torch")
    table.with_format("numpy", columns=["text"]).save_to_disk(tmp_path / "numpy")
    for name in ("torch", "numpy"):
        corpus = Training(dataset=str(tmp_path / name), streaming=streaming, text_column="input_ids")
        assert read_either_ids(corpus) == [[1, 2], [3]]
        assert read_either(replace(corpus, text_column="text")) == ["a", "b"]


def pack_archive(path: Path, members: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("archive", ["a.zip", "a.tar.gz"])
def test_an_archive_is_read_as_its_folder(tmp_path: Path, archive: str, streaming: bool) -> None:
    """The files of the kind, decompressed."""
    members = {
        "README.html": b"{}\n",
        "a.jsonl.gz": gzip.compress(b'{"text": "a"}\n', mtime=0),
        "b/c.jsonl": b'{"text": "c"}\n',
        "b.json.zst": zstandard.compress(b'{"text": "b"}\n'),
        "b/meta.txt": b"{}\n",
    }
    pack_archive(tmp_path / archive, members)
    corpus = Training(dataset="json", data_files=str(tmp_path / archive), streaming=streaming)
    assert read_either(corpus) == ["a", "b", "c"]
    pack_archive(tmp_path / archive, {"enwik8": b"whole"})
    assert read_either(replace(corpus, dataset="text")) == ["whole"]
    pack_archive(tmp_path / archive, {"a.tsv": b'text\tb\n"a\t1\n', "b.csv": b'text\n"b,b"\n', "c.md": b"c"})
    assert read_either(replace(corpus, dataset="csv")) == ['"a', "b,b"]
    pack_archive(tmp_path / archive, {"a.py": b"1", "b.py": b"2"})
    with pytest.raises(UserError) as caught:
        read_either(replace(corpus, dataset="text"))
    assert len(caught.value.lines) == 1 and archive in str(caught.value)
    assert ("of the 2 files in it none ends with .txt or .md") in str(caught.value)


LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["zst", "lz4"])
def test_a_compressed_file_may_begin_with_a_skippable_frame(tmp_path: Path, form: str, streaming: bool) -> None:
    """As pzstd and the seekable format write them."""
    content = zstandard.compress(LINE)
    if form == "lz4":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "lz4") as file:
            file.write(LINE)
        content = sink.getvalue().to_pybytes()
    frames = b"".join(bytes([0x50 + n]) + b"\x2a\x4d\x18" + n.to_bytes(4, "little") + b"x" * n for n in (4, 0, 9))
    (tmp_path / "a.jsonl").write_bytes(frames + content)
    assert read_either(Training(dataset="json", data_files=f"{tmp_path}/a.jsonl", streaming=streaming)) == ["a"]


@pytest.mark.parametrize("first", ["[1]", "[", "[2024] started", "[]", '[{"text": "x"}]'])
def test_a_first_json_line_that_is_no_object_is_a_bad_row(tmp_path: Path, first: str) -> None:
    """But a single bracket begins an array."""
    (tmp_path / "a.jsonl").write_text(first + '\n{"text": "a"}\n{"text": "b"}\n')
    training = Training(dataset="json", data_files=str(tmp_path / "a.jsonl"))
    if first == "[":
        with pytest.raises(UserError, match="is one JSON array"):
            open_source(training)
    else:
        assert read_all(open_source(training)) == [None, "a", "b"]
