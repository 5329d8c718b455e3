"""Token files of other programs, written anew from their descriptions."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from flame.config.schema import Training
from flame.data.document_streams import open_document_stream
from flame.data.documents import WHOLE, open_documents
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture
from flame.data.packing import Packer
from flame.data.sources.files import describe_version
from flame.data.sources.token_files import TokenFiles
from flame.data.state import DataState
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.refusals import expect_one_line
from tests.support.sources import choose_kind

BYTES = load_tokenizer("bytes")
EOS = 256
DOCUMENTS = [[1, 2, EOS], [3, EOS], [EOS], [4, 5, 6, 7, EOS], [8, 9]]
CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def flatten(documents: list[list[int]], dtype: str) -> bytes:
    return np.asarray([token for ids in documents for token in ids], np.dtype(dtype).newbyteorder("<")).tobytes()


def write_nanogpt(path: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    path.write_bytes(flatten(documents, dtype))


def write_numpy(path: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    with path.open("wb") as file:
        np.save(file, np.frombuffer(flatten(documents, dtype), dtype))


def write_llmc(path: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    mark, version = (20240520, 1) if dtype == "uint16" else (20240801, 7)
    content = flatten(documents, dtype)
    header = struct.pack("<3i", mark, version, len(content) // np.dtype(dtype).itemsize)
    path.write_bytes(header.ljust(1024, b"\0") + content)


def write_megatron(path: Path, documents: list[list[int]], dtype: str = "uint16", per_document: int = 1) -> None:
    """With `per_document` sequences in each document."""
    sequences = [part.tolist() for ids in documents for part in np.array_split(ids, per_document)]
    path.write_bytes(flatten(documents, dtype))
    width, pointer, pointers = np.dtype(dtype).itemsize, 0, []
    for ids in sequences:
        pointers.append(pointer)
        pointer += len(ids) * width
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents) + 1)
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(sequences)}q", *pointers)
    index += struct.pack(f"<{len(documents) + 1}q", *(number * per_document for number in range(len(documents) + 1)))
    path.with_suffix(".idx").write_bytes(index)


WRITERS: dict[str, tuple[Any, str, str, list[list[int]]]] = {
    "nanoGPT": (write_nanogpt, "train.bin", "uint16", DOCUMENTS),
    "OLMo": (write_nanogpt, "part-0.npy", "uint16", DOCUMENTS),
    "NumPy uint16": (write_numpy, "part-0.npy", "uint16", DOCUMENTS),
    "NumPy int64": (write_numpy, "part-0.npy", "int64", DOCUMENTS),
    "llm.c": (write_llmc, "fineweb_train_000001.bin", "uint16", DOCUMENTS),
    "llm.c uint32": (write_llmc, "fineweb_train_000001.bin", "uint32", DOCUMENTS),
    "Megatron": (write_megatron, "text_document.bin", "uint16", [*DOCUMENTS[:-1], [8, 9, EOS]]),
    "Megatron int32": (write_megatron, "text_document.bin", "int32", [*DOCUMENTS[:-1], [8, 9, EOS]]),
}
"""What writes it, its name and dtype, and what is read: an index says that the last document ends."""


def open_files(files: object, tokenizer: Any = BYTES, **options: Any) -> TokenFiles:
    kind = choose_kind(Training(dataset="tokens", data_files=str(files), **options))
    assert not [*kind.find_conflicts(None)]  # type: ignore[arg-type]
    documents = pickle.loads(pickle.dumps(open_documents(kind, tokenizer)))
    assert isinstance(documents, TokenFiles)
    return documents


def read_all(documents: TokenFiles) -> list[list[int]]:
    return [documents.read(index).tolist() for index in range(len(documents))]


@pytest.mark.parametrize("writer", WRITERS)
def test_documents_are_those_written(tmp_path: Path, writer: str) -> None:
    write, name, dtype, expected = WRITERS[writer]
    write(tmp_path / name, DOCUMENTS, dtype)
    for files in (tmp_path / name, tmp_path, f"{tmp_path}/*"):
        assert read_all(open_files(files)) == expected
    documents = open_files(tmp_path)
    assert not documents.read(0).flags.writeable, "a view of the file"
    assert documents.measure().tolist() == [len(ids) for ids in expected]


@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=5), min_size=1, max_size=8),
    at_once=st.integers(1, 7),
    per_document=st.integers(1, 3),
)
def test_any_documents_are_split_where_they_end(documents: list[list[int]], at_once: int, per_document: int) -> None:
    ended = [[*ids, EOS] for ids in documents]
    with pytest.MonkeyPatch.context() as patch, temporary_folder() as folder:
        patch.setattr("flame.data.sources.token_index.TOKENS_AT_ONCE", at_once)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        write_nanogpt(folder / "a.bin", ended)
        write_megatron(folder / "b.bin", ended, "int32", per_document)
        assert read_all(open_files(folder / "a.bin", token_dtype="uint16")) == ended
        assert read_all(open_files(folder / "b.bin")) == ended
        write_megatron(folder / "b.bin", [ids for ids in documents if ids] or [[0]], "int32")
        assert read_all(open_files(folder / "b.bin")) == ([[*ids, EOS] for ids in documents if ids] or [[0, EOS]])


def temporary_folder() -> Any:
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def make() -> Any:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)

    return make()


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "b.bin", DOCUMENTS[2:])
    write_numpy(tmp_path / "a.npy", DOCUMENTS[:2], "int32")
    write_megatron(tmp_path / "c.bin", [[1, 1]], "int32")
    assert read_all(open_files(tmp_path)) == [*DOCUMENTS, [1, 1, EOS]]
    assert read_all(open_files(f"{tmp_path}/c.idx, {tmp_path}/b.bin")) == [[1, 1, EOS], *DOCUMENTS[2:]]


def test_dtype_and_end_of_text_may_be_given(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "a.bin", [[1, 2, 9], [3, 9]], "uint32")
    found = open_files(tmp_path / "a.bin", token_dtype="uint32", end_of_text_id=9)
    assert read_all(found) == [[1, 2, 9], [3, 9]]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "a.bin", DOCUMENTS)
    assert len(open_files(tmp_path)) == 5
    write_nanogpt(tmp_path / "a.bin", [*DOCUMENTS[:4], [8, 9, EOS], [1]])
    assert len(open_files(tmp_path)) == 6


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", ["nanoGPT", "Megatron"])
def test_a_loader_resumes_exactly(tmp_path: Path, writer: str, workers: int) -> None:
    write, name, dtype, _ = WRITERS[writer]
    write(tmp_path / name, DOCUMENTS[:4] * 5, dtype)
    training = Training(dataset="tokens", data_files=str(tmp_path / name), num_streams=2, num_workers=workers, seq_len=16)
    training.context_len = 8
    mixture = Mixture((open_documents(choose_kind(training), BYTES),), (1.0,))
    state = DataState(training.num_streams, training.seed)

    def take(count: int) -> list[list[int]]:
        loader = PackedLoader(training, mixture, 0, 1, state)
        taken = []
        for _ in range(count):
            batch = next(loader)
            state.advance([batch], 1)
            taken.append(batch.input_ids[0].tolist())
        loader.close()
        return taken

    whole = take(8)
    state = DataState(training.num_streams, training.seed)
    assert take(3) + take(5) == whole


def test_a_stream_can_be_entered_anywhere(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.bin", [[*range(number + 1)] for number in range(20)], "int32")
    documents = open_files(tmp_path / "a.bin")
    packer = Packer(open_document_stream(documents, WHOLE, 1, 3, 0), "tokens", 1, 16, 8)
    cursor, cursors, rows = packer.first_cursor, [], []
    for _ in range(6):
        cursors.append(cursor)
        sequence = packer.next_sequence(cursor)
        cursor = sequence.cursor
        rows.append(sequence.input_ids.tolist())
    for start in reversed(range(6)):
        again = Packer(open_document_stream(documents, WHOLE, 1, 3, 0), "tokens", 1, 16, 8)
        assert again.next_sequence(cursors[start]).input_ids.tolist() == rows[start]


# ---------------------------------------------------------------- what is refused


def expect_refusal(files: object, *parts: str, **options: Any) -> None:
    kind = choose_kind(Training(dataset="tokens", data_files=str(files), **options))
    with pytest.raises(UserError) as caught:
        open_documents(kind, BYTES)
    expect_one_line(caught.value, "training.", *parts)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "Megatron"])
def test_ids_outside_the_vocabulary(tmp_path: Path, writer: str) -> None:
    write, name, dtype, _ = WRITERS[writer]
    write(tmp_path / name, [[1, 258, EOS]], dtype)
    expect_refusal(tmp_path / name, f'"{tmp_path / name}" is a ', "token file", "holds the id 258", "the ids 0 to 257")


def test_what_a_file_is_instead(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.bin")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {}}))
    np.savez(tmp_path / "a.npz", np.arange(3))
    np.save(tmp_path / "float.npy", np.ones(3))
    np.save(tmp_path / "table.npy", np.ones((3, 2), np.int64))
    with (tmp_path / "named.npy").open("wb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        np.lib.format.write_array(file, np.zeros(3, [("é", "<i4")]), version=(3, 0))
    (tmp_path / "alone.idx").write_bytes(b"MMIDIDX\0\0" + bytes(40))
    (tmp_path / "empty.bin").touch()
    (tmp_path / "odd.bin").write_bytes(b"abc")
    write_nanogpt(tmp_path / "wide.bin", DOCUMENTS, "uint32")
    for name, parts in {
        "a.bin": ["it is a parquet file", 'dataset = "parquet"'],
        "rows.jsonl": ["it is text", 'dataset = "json"'],
        "meta.pkl": ["it is a pickle"],
        "a.npz": ["it is a zip"],
        "float.npy": ["a NumPy array of float64"],
        "table.npy": ["shape (3, 2)"],
        "named.npy": ["a NumPy file of format 3.0"],
        "alone.idx": ["the index of a Megatron file"],
        "empty.bin": ["it is empty"],
        "odd.bin": ["a nanoGPT token file of uint16: its 3 bytes are not whole ids", "token_dtype"],
        "wide.bin": ["a nanoGPT token file in which every second uint16 is 0", 'token_dtype = "uint32"', '"int64"'],
        "missing.bin": ["missing.bin"],
    }.items():
        expect_refusal(tmp_path / name, name, *parts)


@pytest.mark.parametrize("writer", ["nanoGPT", "OLMo", "NumPy int64", "llm.c"])
def test_a_file_without_an_end_of_text_id(tmp_path: Path, writer: str) -> None:
    write, name, dtype, _ = WRITERS[writer]
    write(tmp_path / name, [[1, 2, 9], [3, 4]], dtype)
    expect_refusal(tmp_path / name, f'"{tmp_path / name}" holds no end-of-text id 256', "set end_of_text_id")
    assert read_all(open_files(tmp_path / name, end_of_text_id=9)) == [[1, 2, 9], [3, 4]]
    write(tmp_path / name, [[1, 2, EOS]], dtype)
    assert len(open_files(tmp_path / name)) == 1


@pytest.mark.parametrize(
    ("written", "given", "advice"),
    [
        ("int64", "uint32", '"int64"'),
        ("int64", "int32", '"int64"'),
        ("uint32", "uint16", '"uint32"'),
        ("int64", "uint16", '"int64"'),
    ],
)
def test_a_dtype_that_is_given_too_narrow(tmp_path: Path, written: str, given: str, advice: str) -> None:
    write_nanogpt(tmp_path / "a.bin", DOCUMENTS, written)
    expect_refusal(tmp_path / "a.bin", f"every second {given} is 0", "set token_dtype = ", advice, token_dtype=given)


def test_files_of_folders_of_preprocess_are_no_token_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_nanogpt(tmp_path / name / "tokens.bin", DOCUMENTS)
        (tmp_path / name / "manifest.json").touch()
    for files in (f"{tmp_path}/a,{tmp_path}/b", tmp_path, f"{tmp_path}/a/*.bin", tmp_path / "a" / "tokens.bin"):
        expect_refusal(files, "is in a folder of flame-preprocess", "[sources.NAME]")


@pytest.mark.parametrize(
    "names",
    [
        ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),
        ("train/a.bin", "val/a.bin"),
        ("owt-train.bin", "owt-test.bin"),
        ("training/0.npy", "Validation/0.npy"),
    ],
)
def test_several_splits_in_a_folder(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_nanogpt(tmp_path / name, DOCUMENTS)
    expect_refusal(tmp_path, "the folder holds several splits (", *names)
    assert len(open_files(tmp_path / names[0])) == 5
    (tmp_path / names[1]).unlink()
    assert len(open_files(tmp_path)) == 5


def test_a_correct_copy_with_the_same_time_is_accepted(tmp_path: Path) -> None:
    """Also where a file system has no time of change."""
    path = tmp_path / "a.bin"
    write_nanogpt(path, [[1, 700, EOS]])
    time = path.stat().st_mtime_ns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flame.data.sources.index_cache._describe_state", lambda path: "\n".join(describe_version(path)))
        expect_refusal(path, "holds the id 700")
        write_nanogpt(path, [[1, 70, EOS]])
        os.utime(path, ns=(time, time))
        assert read_all(open_files(path)) == [[1, 70, EOS]]
    write_nanogpt(path, [[1, EOS, EOS]])
    os.utime(path, ns=(time, time))
    assert read_all(open_files(path)) == [[1, EOS], [EOS]]


def test_what_a_folder_is_instead(tmp_path: Path) -> None:
    for name in ("empty", "own", "nanogpt", "mds", "text"):
        (tmp_path / name).mkdir()
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "own" / "progress.json").touch()
    for name in ("train.bin", "val.bin"):
        write_nanogpt(tmp_path / "nanogpt" / name, DOCUMENTS)
    (tmp_path / "mds" / "shard.00000.mds").touch()
    (tmp_path / "text" / "a.txt").touch()
    for name, parts in {
        "empty": ["has no token files", "it holds nothing"],
        "own": ["has no manifest.json, so it is unfinished"],
        "nanogpt": ["holds several splits (train.bin, val.bin): name the files of one"],
        "mds": ["of MosaicML's StreamingDataset, which is not read"],
        "saved": ["of save_to_disk: write dataset = "],
        "text": ["it holds a.txt"],
        "none": ["no such folder"],
    }.items():
        expect_refusal(tmp_path / name, *parts)


def test_a_dtype_that_the_file_denies(tmp_path: Path) -> None:
    write_numpy(tmp_path / "a.npy", DOCUMENTS, "int64")
    expect_refusal(tmp_path / "a.npy", "says int64 itself, and token_dtype is uint32", token_dtype="uint32")
    assert len(open_files(tmp_path / "a.npy", token_dtype="int64")) == 5


def test_a_folder_of_tokens_as_dataset(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "train.bin", DOCUMENTS)
    with pytest.raises(UserError) as caught:
        open_documents(choose_kind(Training(dataset=str(tmp_path))), BYTES)
    expect_one_line(caught.value, f'training.dataset = "{tmp_path}" is a folder of token ids', "training.data_files")


def test_a_damaged_megatron_index(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.bin", DOCUMENTS, "uint16")
    index = (tmp_path / "a.idx").read_bytes()
    lengths, pointers, documents = 34, 34 + 4 * 5, 34 + 12 * 5
    for content, part in (
        (index[:-1], "its header says"),
        (index[:17] + b"\x07" + index[18:], "no integers"),
        (index[:lengths] + struct.pack("<i", 4) + index[lengths + 4 :], "of another file"),
        (index[: pointers + 8] + struct.pack("<q", 10**15) + index[pointers + 16 :], "of another file"),
        (index[: documents + 8] + struct.pack("<q", 3) + index[documents + 16 :], "boundaries of its documents"),
        (b"TNTIDX" + index, "an old Megatron"),
        (json.dumps({}).encode(), "no Megatron index"),
    ):
        (tmp_path / "a.idx").write_bytes(content)
        expect_refusal(tmp_path / "a.bin", "a.idx", part)
