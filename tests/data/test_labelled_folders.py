"""Folders of tokens that say what the assistant wrote: the same labels as the chats themselves."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame.cli.preprocess import main as preprocess
from flame.config.schema import Training
from flame.data import span_encoder
from flame.data.corpus_content import describe_content, list_differences
from flame.data.documents import open_documents
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture
from flame.data.state import DataState
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.chats import CHATML, CHATS, FORGETFUL, MARKED, make_chat_tokenizer
from tests.support.refusals import expect_one_line
from tests.support.sources import choose_kind

ROWS: list[Any] = [*CHATS, None, *CHATS[::-1], [{"role": "user", "content": "nobody answers"}], *CHATS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[CHATML, MARKED], ids=["prefixes", "marks"])
def tokenizer_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_chat_tokenizer(request.param).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def chats(tmp_path: Path) -> Training:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    return Training(dataset="json", data_files=str(path), text_column="messages")


def make(chats: Training, tokenizer_path: Path, out: Path, *, loss_on: str = "assistant", workers: int = 0) -> int:
    command = ["--dataset=json", f"--data_files={chats.data_files}", f"--text_column={chats.text_column}", f"--out={out}"]
    return preprocess([*command, f"--tokenizer_path={tokenizer_path}", f"--loss_on={loss_on}", f"--num_workers={workers}"])


def of_folder(folder: Path) -> Training:
    return Training(dataset="tokens", data_files=str(folder))


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def list_documents(corpus: Training, tokenizer: Any, loss_on: str = "assistant") -> list[tuple[list[int], list[list[int]]]]:
    documents = open_documents(choose_kind(corpus), tokenizer, loss_on)
    found = [documents.read(index) for index in range(len(documents))]  # type: ignore[arg-type,union-attr]
    return [(each.tokens.tolist(), each.spans.tolist()) for each in found if each is not None]


def test_documents_and_labels_are_those_of_the_chats(chats: Training, tokenizer_path: Path, tmp_path: Path) -> None:
    assert make(chats, tokenizer_path, tmp_path / "out") == 0
    tokenizer = load_tokenizer(str(tokenizer_path))
    expected = list_documents(chats, tokenizer)
    assert list_documents(of_folder(tmp_path / "out"), tokenizer) == expected and any(spans for _, spans in expected)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["loss_on"], manifest["documents"], manifest["bad_rows"]) == ("assistant", len(ROWS) - 1, 1)


def test_batches_are_those_of_the_chats(tmp_path: Path) -> None:
    make_chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in CHATS * 5))  # no bad row
    chats = Training(dataset="json", data_files=str(tmp_path / "chats.jsonl"), text_column="messages")
    make(chats, tmp_path / "tokenizer", tmp_path / "out")
    batches = []
    for corpus in (chats, of_folder(tmp_path / "out")):
        source = open_documents(choose_kind(corpus), tokenizer, "assistant")
        training = Training(num_streams=4, num_workers=0, seq_len=100, context_len=80, seed=3, loss_on="assistant")
        loader = PackedLoader(training, Mixture((source,), (1.0,)), 0, 1, DataState(4, 3))
        batches.append([(batch.input_ids.tolist(), batch.labels.tolist()) for batch in islice(loader, 12)])
    assert batches[0] == batches[1]


def test_workers_and_spans_leave_no_trace(
    chats: Training, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the tokens: they are those of a folder without labels."""
    make(chats, tokenizer_path, tmp_path / "one")
    monkeypatch.setattr(span_encoder, "LONGEST_SPAN", 1)
    monkeypatch.setattr(span_encoder, "CHARACTERS_AT_ONCE", 1)
    make(chats, tokenizer_path, tmp_path / "two", workers=2)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")
    make(chats, tokenizer_path, tmp_path / "plain", loss_on="all")
    plain, labelled = read_files(tmp_path / "plain"), read_files(tmp_path / "one")
    assert plain.keys() == labelled.keys() - {"labels.bin"} and "loss_on" not in json.loads(plain["manifest.json"])
    assert all(plain[name] == labelled[name] for name in ("tokens.bin", "offsets.bin"))


def test_an_interrupted_folder_is_continued(
    chats: Training, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(chats, tokenizer_path, tmp_path / "whole")
    monkeypatch.setattr(span_encoder, "LONGEST_SPAN", 1)
    monkeypatch.setattr("flame.data.token_folder_writer.SECONDS_BETWEEN_COMMITS", 0.0)
    encode = span_encoder.SpanEncoder.encode

    def stop(self: Any, span: Any) -> Any:
        if span.start == 5:
            raise KeyboardInterrupt
        return encode(self, span)

    with monkeypatch.context() as patched:
        patched.setattr(span_encoder.SpanEncoder, "encode", stop)
        assert make(chats, tokenizer_path, tmp_path / "out") == 130
    with (tmp_path / "out" / "labels.bin").open("ab") as file:
        file.write(b"\1" * 100)  # written, and not committed
    assert make(chats, tokenizer_path, tmp_path / "out") == 0
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_another_loss_is_another_folder(
    chats: Training, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(chats, tokenizer_path, tmp_path / "out", loss_on="all")
    assert make(chats, tokenizer_path, tmp_path / "out") == 2
    assert 'was made with --loss_on "all", now "assistant"' in capsys.readouterr().err


def test_a_folder_without_labels_is_refused(chats: Training, tokenizer_path: Path, tmp_path: Path) -> None:
    make(chats, tokenizer_path, tmp_path / "out", loss_on="all")
    with pytest.raises(UserError) as refusal:
        open_documents(choose_kind(of_folder(tmp_path / "out")), load_tokenizer(str(tokenizer_path)), "assistant")
    expect_one_line(refusal.value, 'training.loss_on = "assistant" needs chats', "flame-preprocess --loss_on assistant")


def test_labels_do_not_matter_where_all_tokens_count(chats: Training, tokenizer_path: Path, tmp_path: Path) -> None:
    make(chats, tokenizer_path, tmp_path / "out")
    tokenizer = load_tokenizer(str(tokenizer_path))
    documents = open_documents(choose_kind(of_folder(tmp_path / "out")), tokenizer)
    assert isinstance(documents.read(0), np.ndarray)  # type: ignore[union-attr]


def test_damaged_labels_are_refused(chats: Training, tokenizer_path: Path, tmp_path: Path) -> None:
    make(chats, tokenizer_path, tmp_path / "out")
    path, tokenizer = tmp_path / "out" / "labels.bin", load_tokenizer(str(tokenizer_path))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\2")
    with pytest.raises(UserError) as refusal:
        list_documents(of_folder(tmp_path / "out"), tokenizer)
    expect_one_line(refusal.value, "labels.bin", "is damaged")
    path.write_bytes(content[:-1])
    with pytest.raises(UserError) as refusal:
        open_documents(choose_kind(of_folder(tmp_path / "out")), tokenizer)
    expect_one_line(refusal.value, "labels.bin", "manifest.json says")


def test_a_resume_tells_other_labels(chats: Training, tokenizer_path: Path, tmp_path: Path) -> None:
    make(chats, tokenizer_path, tmp_path / "out")
    kind, tokenizer = choose_kind(of_folder(tmp_path / "out")), load_tokenizer(str(tokenizer_path))
    before = describe_content(kind, open_documents(kind, tokenizer, "assistant"))
    assert not list_differences(before, describe_content(kind, open_documents(kind, tokenizer, "assistant")))
    labels = tmp_path / "out" / "labels.bin"
    labels.write_bytes(bytes(1 - value for value in labels.read_bytes()))
    assert list_differences(before, describe_content(kind, open_documents(kind, tokenizer, "assistant")))


@pytest.mark.parametrize(("template", "says"), [(FORGETFUL, "renders message"), (CHATML, "needs chats")])
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, says: str) -> None:
    make_chat_tokenizer(template).save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": role, "content": f"<think>{role}</think>x"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "text": "plain"}) + "\n")
    column = "messages" if template == FORGETFUL else "text"
    corpus = Training(data_files=str(tmp_path / "rows.jsonl"), text_column=column)
    assert make(corpus, tmp_path / "tokenizer", tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith('--loss_on = "assistant"') and says in line
