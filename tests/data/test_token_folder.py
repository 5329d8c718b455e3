from __future__ import annotations

import json
import pickle
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame.data.encoding import encode_document, encode_documents, fingerprint_tokenizer
from flame.data.sources.token_folder import Manifest, TokenFolder, open_token_folder
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.tokenizers import make_bpe

BYTES = load_tokenizer("bytes")
OPTION = 'training.dataset = "tokens" (training.data_files = x)'
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def write_folder(folder: Path, documents: list[list[int]], dtype: str = "uint16", vocabulary_size: int = 258) -> Manifest:
    """The format, written anew from its description."""
    offsets = [0]
    for ids in documents:
        offsets.append(offsets[-1] + len(ids))
    flat = [token for ids in documents for token in ids]
    (folder / "tokens.bin").write_bytes(b"".join(t.to_bytes(2 if dtype == "uint16" else 4, "little") for t in flat))
    (folder / "offsets.bin").write_bytes(b"".join(offset.to_bytes(8, "little") for offset in offsets))
    manifest = Manifest(
        format_version=1,
        dtype=dtype,  # type: ignore[arg-type]
        documents=len(documents),
        tokens=len(flat),
        bad_rows=3,
        tokenizer="bytes",
        tokenizer_fingerprint=fingerprint_tokenizer(BYTES),
        eos_id=256,
        vocabulary_size=vocabulary_size,
        dataset="stdlib",
        dataset_name="",
        dataset_split="train",
        data_files="",
        text_column="text",
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return manifest


def open_folder(folder: Path, tokenizer: PreTrainedTokenizerFast = BYTES) -> TokenFolder:
    return open_token_folder(str(folder), OPTION, "mine", tokenizer)


def expect_one_line(folder: Path, *parts: str, tokenizer: PreTrainedTokenizerFast = BYTES) -> None:
    with pytest.raises(UserError) as caught:
        open_folder(folder, tokenizer)
    line = str(caught.value)
    assert len(caught.value.lines) == 1 and "\n" not in line
    for part in (OPTION, str(folder), *parts):
        assert part in line


@given(st.data(), st.sampled_from(["uint16", "uint32"]))
def test_documents_are_the_plain_slices(data: st.DataObject, dtype: str) -> None:
    ids = st.integers(0, 2**16 - 1 if dtype == "uint16" else 2**32 - 1)
    documents = [[*each, 256] for each in data.draw(st.lists(st.lists(ids, max_size=6), min_size=1, max_size=8))]
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), documents, dtype, vocabulary_size=2**32)
        folder = open_folder(Path(name))
        assert len(folder) == len(documents)
        order = data.draw(st.permutations(range(len(documents))))
        assert {index: folder.read(index).tolist() for index in order} == dict(enumerate(documents))


def test_documents_are_views_of_the_file(tmp_path: Path) -> None:
    write_folder(tmp_path, [[1, 2, 3, 256], [256]])
    folder = open_folder(tmp_path)
    first, again = folder.read(0), folder.read(0)
    assert first.dtype == np.uint16 and not first.flags.writeable
    assert np.shares_memory(first, again)
    with open(tmp_path / "tokens.bin", "r+b") as file:
        file.write(b"\x07\x00")
    assert first.tolist() == [7, 2, 3, 256]


def test_pickles_are_small_and_map_the_files_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_folder(tmp_path / "data", [[5] * 5000 + [256], [1, 256]])
    folder = open_folder(Path("data"))
    folder.read(0)
    pickled = pickle.dumps(folder)
    assert len(pickled) < 1000
    monkeypatch.chdir("/")
    copy = pickle.loads(pickled)
    assert (copy.name, copy.option, len(copy)) == ("mine", OPTION, 2)
    assert copy.read(1).tolist() == [1, 256] and copy.read(0).tolist() == [5] * 5000 + [256]


def test_folders_that_are_missing_or_unfinished(tmp_path: Path) -> None:
    expect_one_line(tmp_path / "none", "no such folder", "flame-preprocess")
    write_folder(tmp_path, [[256]])
    (tmp_path / "manifest.json").rename(tmp_path / "manifest.json.tmp")
    expect_one_line(tmp_path, "unfinished", "run the same")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"format_version": 1}', '{"format_version": 1, "dtype": "int8"}', "[" * 10**5]
)
def test_garbage_manifests(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path, [[256]])
    (tmp_path / "manifest.json").write_text(content)
    expect_one_line(tmp_path, "manifest.json", "damaged", "delete the folder")


def test_other_versions(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 2, "shape": "round"}')
    expect_one_line(tmp_path, "format_version = 2", "reads 1")


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.bin"])
def test_files_of_the_wrong_size(tmp_path: Path, file: str) -> None:
    write_folder(tmp_path, [[1, 256], [2, 256]])
    whole = (tmp_path / file).read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        (tmp_path / file).write_bytes(content)
        expect_one_line(tmp_path, f"{file}", f"{len(content)} bytes", f"says {len(whole)}")
    (tmp_path / file).unlink()
    expect_one_line(tmp_path, file, "no bytes")


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 2, 5]])
def test_offsets_with_wrong_ends(tmp_path: Path, offsets: list[int]) -> None:
    write_folder(tmp_path, [[1, 256], [2, 256]])
    (tmp_path / "offsets.bin").write_bytes(np.array(offsets, "<i8").tobytes())
    expect_one_line(tmp_path, "offsets.bin", f"from {offsets[0]} to {offsets[-1]}", "0 to 4")


def test_folders_without_documents(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    expect_one_line(tmp_path, "0 documents")


def test_folders_of_another_tokenizer(tmp_path: Path) -> None:
    manifest = replace(write_folder(tmp_path, [[256]]), tokenizer="some/name")
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    open_folder(tmp_path)
    make_bpe().save_pretrained(tmp_path / "mine")
    loaded = load_tokenizer(str(tmp_path / "mine"))
    expect_one_line(tmp_path, "--tokenizer_path some/name", f'model.tokenizer_path = "{tmp_path / "mine"}"', tokenizer=loaded)
    write_folder(tmp_path, [[256]])
    manifest = replace(manifest, tokenizer_fingerprint=fingerprint_tokenizer(loaded))
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    expect_one_line(tmp_path, 'model.tokenizer_path = "bytes"')


@pytest.mark.parametrize("make", [lambda: load_tokenizer("bytes"), make_bpe, lambda: make_bpe(lowercase=True)])
def test_fingerprints_outlive_calls_and_folders(tmp_path: Path, make) -> None:
    tokenizer = make()
    fingerprint = fingerprint_tokenizer(tokenizer)
    assert len(fingerprint) == 64 and fingerprint == fingerprint_tokenizer(make())
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    encode_document(tokenizer, "a")
    assert fingerprint == fingerprint_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint == fingerprint_tokenizer(AutoTokenizer.from_pretrained(tmp_path))


def test_fingerprints_tell_tokenizers_apart() -> None:
    extended, special = make_bpe(), make_bpe()
    extended.add_tokens(["abab"])
    special.add_tokens([AddedToken("<x>", special=True)])
    different = [BYTES, make_bpe(), make_bpe(merges=False), make_bpe(lowercase=True), make_bpe(eos="a"), extended, special]
    assert len({fingerprint_tokenizer(tokenizer) for tokenizer in different}) == len(different)


@given(st.lists(st.one_of(texts, st.sampled_from(["", "</s>", "a</s>b", "<x>", "ab  AB\r\n", "<|endoftext|>", "e\u0301"]))))
def test_many_documents_have_the_ids_of_the_tokenizers_own_call(documents: list[str]) -> None:
    for tokenizer in (load_tokenizer("bytes"), make_bpe(lowercase=True)):
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["a", "b b"], padding="max_length", max_length=9, truncation=True)
        encoded = encode_documents(tokenizer, documents)
        assert [ids.dtype for ids in encoded] == [np.int32] * len(documents)
        for text, ids in zip(documents, encoded, strict=True):
            expected = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
            if not expected or expected[-1] != tokenizer.eos_token_id:
                expected.append(tokenizer.eos_token_id)
            assert ids.tolist() == expected


# ---------------------------------------------------------------- damage in the middle


DAMAGE = {
    "an id outside the vocabulary": ("tokens.bin", 1, 300, ["tokens.bin", "is damaged", "the id 300, and the tokenizer has 258"]),
    "a document without its end": ("tokens.bin", 4, 7, ["document 1 does not end with the end-of-text id"]),
    "an offset that leaps": ("offsets.bin", 1, 10**15, ["offsets.bin", f"offset 2 is 5 after {10**15}"]),
    "an offset that falls": ("offsets.bin", 2, 1, ["offsets.bin", "offset 2 is 1 after 3"]),
    "an offset that stays": ("offsets.bin", 2, 3, ["offsets.bin", "offset 2 is 3 after 3"]),
    "an offset below 0": ("offsets.bin", 1, -3, ["offsets.bin", "offset 1 is -3 after 0"]),
    "an offset that is a little wrong": ("offsets.bin", 1, 2, ["document 0 does not end with the end-of-text id"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_in_the_middle_is_one_line(tmp_path: Path, case: str) -> None:
    file, at, value, parts = DAMAGE[case]
    write_folder(tmp_path, [[1, 2, 256], [3, 256], [4, 5, 6, 256]])
    open_folder(tmp_path)
    dtype = "<u2" if file == "tokens.bin" else "<i8"
    content = np.fromfile(tmp_path / file, dtype)
    content[at] = value
    content.tofile(tmp_path / file)
    expect_one_line(tmp_path, *parts, "copy it again")


def test_ids_are_read_once_for_each_state_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, [[1, 256], [2, 256]])
    open_folder(tmp_path)
    monkeypatch.setattr("flame.data.sources.token_folder.scan_tokens", None)
    assert open_folder(tmp_path).read(1).tolist() == [2, 256]


def test_without_a_cache_ids_are_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "inside"))
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", [[1, 256], [2, 256]])
    assert pickle.loads(pickle.dumps(open_folder(tmp_path / "data"))).read(1).tolist() == [2, 256]
