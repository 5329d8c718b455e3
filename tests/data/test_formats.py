"""Every kind of file gives the same documents with random access and streamed, and any run over them resumes exactly."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard

from flame.config.schema import Training
from flame.data.documents import TokenizedShards, open_documents
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture
from flame.data.state import DataState
from flame.data.tokenizer import load_tokenizer
from tests.support.sources import choose_kind

BYTES = load_tokenizer("bytes")
SHARDS = [[f"{shard}, {row}\n" + "é" * (row % 7) for row in range(9 + shard)] for shard in range(3)]
"""Texts of each file."""


def write_lines(path: Path, texts: list[str], compress: Callable[[bytes], bytes] = bytes) -> None:
    path.write_bytes(compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "id"], *([text, number] for number, text in enumerate(texts))])


def write_ids(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": [[*text.encode()] for text in texts]}), path)


WRITERS: dict[str, tuple[str, str, Callable[[Path, list[str]], Any]]] = {
    "json": ("json", "jsonl", write_lines),
    "json.gz": ("json", "jsonl.gz", lambda path, texts: write_lines(path, texts, gzip.compress)),
    "json.zst": ("json", "jsonl.zst", lambda path, texts: write_lines(path, texts, zstandard.compress)),
    "csv": ("csv", "csv", write_csv),
    "parquet": ("parquet", "parquet", lambda path, texts: pq.write_table(pa.table({"text": texts}), path, row_group_size=4)),
    "token ids": ("parquet", "parquet", write_ids),
    "arrow": ("arrow", "arrow", lambda path, texts: feather.write_feather(pa.table({"text": texts}), path)),
    "save_to_disk": ("", "", None),  # type: ignore[dict-item]
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_all(folder: Path, form: str, streaming: bool) -> Training:
    dataset, suffix, write = WRITERS[form]
    training = Training(streaming=streaming, num_streams=3, seq_len=40, context_len=16, num_workers=0)
    if form == "save_to_disk":
        even = [text for texts in SHARDS for text in texts]
        datasets.Dataset.from_dict({"text": even}).save_to_disk(folder / "saved", num_shards=3)
        training.dataset = str(folder / "saved")
        return training
    (folder / "files").mkdir()
    for number, texts in enumerate(SHARDS):
        write(folder / "files" / f"{number}.{suffix}", texts)
    training.dataset, training.data_files = dataset, str(folder / "files")
    return training


def take(training: Training, mixture: Mixture, state: DataState, count: int) -> list[tuple]:
    loader = PackedLoader(training, mixture, 0, 1, state)
    taken = []
    for _ in range(count):
        batch = next(loader)
        state.advance([batch], 1)
        taken.append((batch.input_ids[0].tolist(), batch.cu_seqlens.tolist(), [*batch.documents], batch.cursor))
    loader.close()
    return taken


@pytest.mark.parametrize("form", WRITERS)
def test_documents_are_the_same_streaming_or_not(tmp_path: Path, form: str) -> None:
    expected = [[*text.encode(), 256] for texts in SHARDS for text in texts]
    training = write_all(tmp_path, form, streaming=False)
    documents: Any = open_documents(choose_kind(training), BYTES)
    assert [documents.read(index).tolist() for index in range(len(documents))] == expected
    training.streaming = True
    shards = open_documents(choose_kind(training), BYTES)
    assert isinstance(shards, TokenizedShards) and shards.num_shards == 3
    assert [tokens.tolist() for shard in range(3) for _, tokens in shards.read_shard(shard, 0)] == expected  # type: ignore
    later = [tokens.tolist() for _, tokens in shards.read_shard(1, 5)]  # type: ignore[union-attr]
    assert later == [tokens.tolist() for _, tokens in shards.read_shard(1, 0)][5:]  # type: ignore[union-attr]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", WRITERS)
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, form: str, streaming: bool) -> None:
    training = write_all(tmp_path, form, streaming)
    mixture = Mixture((open_documents(choose_kind(training), BYTES),), (1.0,))
    state = DataState(training.num_streams, training.seed)
    whole = take(training, mixture, state, 30)
    for stop in (1, 7, 20):
        state = DataState(training.num_streams, training.seed)
        first = take(training, mixture, state, stop)
        saved = DataState(training.num_streams, training.seed)
        saved.load_state_dict(json.loads(json.dumps(state.state_dict())))
        assert first + take(training, mixture, saved, 30 - stop) == whole


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_worker_processes_read_all_forms(tmp_path: Path, streaming: bool) -> None:
    """A mixture of them, with no worker and with two."""
    sources = []
    for number, form in enumerate(WRITERS):
        (tmp_path / str(number)).mkdir()
        training = write_all(tmp_path / str(number), form, streaming)
        sources.append(open_documents(choose_kind(training, f"sources.s{number}"), BYTES))
    mixture = Mixture(tuple(sources), (1.0,) * len(sources))
    training.num_streams = 2
    alone = take(training, mixture, DataState(2, training.seed), 20)
    training.num_workers = 2
    assert take(training, mixture, DataState(2, training.seed), 20) == alone
