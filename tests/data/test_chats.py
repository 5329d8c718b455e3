"""Columns of chats and of token ids: what documents they become, and which tokens count."""

from __future__ import annotations

import json
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame.cli.preprocess import main as preprocess
from flame.config.schema import Training
from flame.data.batch import NO_LABEL, build_batch
from flame.data.corpus_content import describe_content, list_differences
from flame.data.document_streams import open_document_stream
from flame.data.documents import WHOLE, open_documents
from flame.data.encoding import Labelled
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture
from flame.data.packing import Packer
from flame.data.state import DataState
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.chats import CHATML, CHATS, FORGETFUL, MARKED, make_chat_tokenizer, to_sharegpt, write_out
from tests.support.refusals import expect_one_line
from tests.support.runs import run_here
from tests.support.sources import choose_kind
from tests.support.tokenizers import make_bpe

BYTES = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_chats(folder: Path, rows: list[Any], column: str = "messages", kind: str = "json") -> Training:
    path = folder / f"chats.{kind}"
    if kind == "json":
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({column: rows, "other": list(range(len(rows)))}), path)
    return Training(dataset=kind, data_files=str(path), text_column=column)


def read_documents(corpus: Training, tokenizer: Any, loss_on: str = "all") -> list[Any]:
    documents = pickle.loads(pickle.dumps(open_documents(choose_kind(corpus), tokenizer, loss_on)))
    if hasattr(documents, "num_shards"):
        return [tokens for shard in range(documents.num_shards) for _, tokens in documents.read_shard(shard, 0)]
    return [documents.read(index) for index in range(len(documents))]


def mark(labelled: Labelled) -> list[bool]:
    counts = np.zeros(len(labelled.tokens), dtype=bool)
    for start, end in labelled.spans:
        counts[start:end] = True
    return counts.tolist()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_are_rendered_token_by_token(tmp_path: Path, column: str, kind: str, streaming: bool) -> None:
    rows = CHATS if column == "messages" else [to_sharegpt(chat) for chat in CHATS]
    corpus = write_chats(tmp_path, rows, column, kind)
    corpus.streaming = streaming
    tokenizer = make_chat_tokenizer()
    found = read_documents(corpus, tokenizer)
    assert [tokens.tolist() for tokens in found] == [write_out(chat)[0] for chat in CHATS]
    for tokens, chat in zip(found, CHATS, strict=True):
        assert tokens.tolist()[:-1] == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_the_assistants_tokens_are_told_exactly(tmp_path: Path, template: str, streaming: bool) -> None:
    corpus = write_chats(tmp_path, CHATS)
    corpus.streaming = streaming
    for found, chat in zip(read_documents(corpus, make_chat_tokenizer(template), "assistant"), CHATS, strict=True):
        assert (found.tokens.tolist(), mark(found)) == write_out(chat)


def test_the_tokens_are_those_of_transformers_own_mask(tmp_path: Path) -> None:
    """With a tokenizer whose tokens reach over the borders of turns."""
    marked, plain = (make_bpe(merges=True) for _ in range(2))
    body = "{{ message.content }}"
    for tokenizer, inner in ((marked, "{% generation %}" + body + "{% endgeneration %}"), (plain, body)):
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message.role == 'assistant' %}" + inner + "{% else %}" + body + "{% endif %}"
            "{% endfor %}"
        )
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b a"}, {"role": "user", "content": "b ab"}],
        [{"role": "user", "content": "é a"}, {"role": "assistant", "content": "b✓"}],
    ]
    corpus = write_chats(tmp_path, chats)
    by_marks, by_prefixes = (read_documents(corpus, tokenizer, "assistant") for tokenizer in (marked, plain))
    for chat, one, other in zip(chats, by_marks, by_prefixes, strict=True):
        expected = marked.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert one.tokens.tolist() == other.tokens.tolist() == [*expected["input_ids"], marked.eos_token_id]
        eos_counts = chat[-1]["role"] == "assistant"
        assert mark(one) == mark(other) == [*map(bool, expected["assistant_masks"]), eos_counts]


def test_what_is_no_chat_is_a_bad_row(tmp_path: Path) -> None:
    strict = CHATML.replace("{% for", "{% if messages[0].role == 'x' %}{{ raise_exception('no') }}{% endif %}{% for", 1)
    rows = [CHATS[0], None, [], "text", [{"role": "x", "content": "y"}], [{"text": "z"}], [{"role": "user"}, 3], CHATS[0]]
    # The first rows hold chats and texts, and then texts are meant.
    assert [tokens is None for tokens in read_documents(write_chats(tmp_path, rows), make_chat_tokenizer(strict))] == [
        row != "text" for row in rows
    ]
    rows[3] = 5
    found = read_documents(write_chats(tmp_path, rows), make_chat_tokenizer(strict))
    assert [tokens is None for tokens in found] == [False, *[True] * 6, False]


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    thought = [*CHATS[0], {"role": "user", "content": "and?"}, {"role": "assistant", "content": "<think>hm</think>yes"}]
    thought[1] = {"role": "assistant", "content": "<think>well</think>Hallo"}
    corpus = write_chats(tmp_path, [thought])
    with pytest.raises(UserError) as caught:
        read_documents(corpus, make_chat_tokenizer(FORGETFUL), "assistant")
    expect_one_line(caught.value, 'training.loss_on = "assistant"', "message 1 of row 0", "{% generation %}")
    (tokens,) = read_documents(corpus, make_chat_tokenizer(FORGETFUL))
    assert b"well" not in bytes(token for token in tokens if token < 256)


@pytest.mark.parametrize(
    ("rows", "tokenizer", "loss_on", "parts"),
    [
        (CHATS, BYTES, "all", ["holds chats", 'model.tokenizer_path = "bytes" has no chat template']),
        (["text"], make_chat_tokenizer(), "assistant", ["needs chats", "holds texts"]),
        ([[1, 2]], make_chat_tokenizer(), "assistant", ["needs chats", "holds token ids"]),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, rows: list, tokenizer: Any, loss_on: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_documents(write_chats(tmp_path, rows), tokenizer, loss_on)
    expect_one_line(caught.value, 'training.dataset = "json"', *parts)


def test_sources_without_chats_are_refused() -> None:
    for dataset in ("stdlib", "siblings"):
        with pytest.raises(UserError) as caught:
            open_documents(choose_kind(Training(dataset=dataset)), make_chat_tokenizer(), "assistant")
        expect_one_line(caught.value, 'training.loss_on = "assistant"', f'training.dataset = "{dataset}"')


STRICT = "{% if not messages or messages[0].role == 'x' %}{{ raise_exception('no') }}{% endif %}" + CHATML
DATED = "{{ strftime_now('%H:%M:%S.%f') }}\n"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_chat_that_the_assistant_begins_may_be_a_bad_row(tmp_path: Path, streaming: bool) -> None:
    rows = [CHATS[0], CHATS[0][1:], CHATS[0]]
    corpus = write_chats(tmp_path, rows)
    corpus.streaming = streaming
    found = read_documents(corpus, make_chat_tokenizer(STRICT), "assistant")
    assert [labelled is None for labelled in found] == [False, True, False]
    lenient = read_documents(corpus, make_chat_tokenizer(), "assistant")
    assert mark(lenient[1]) == write_out(rows[1])[1]


def test_chats_that_are_all_refused_are_one_line(tmp_path: Path) -> None:
    documents = open_documents(choose_kind(write_chats(tmp_path, [CHATS[0][1:]])), make_chat_tokenizer(STRICT), "assistant")
    stream = open_document_stream(documents, WHOLE, 0, 1, 0)
    with pytest.raises(UserError) as caught:
        stream.read(stream.first)
    expect_one_line(caught.value, "yields no usable text: 1 rows read", "or the chat template")


@pytest.mark.parametrize("streaming", [False, True])
def test_roles_of_which_nothing_counts_are_told_once(tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    chats = [[{"role": "user", "content": "a"}, {"role": "model", "content": "b"}], CHATS[0]] * 3
    corpus = write_chats(tmp_path, chats)
    corpus.streaming = streaming
    read_documents(corpus, make_chat_tokenizer())
    assert not caplog.messages
    read_documents(corpus, make_chat_tokenizer(), "assistant")
    (line,) = caplog.messages
    assert 'some have the roles "model"' in line and 'training.dataset = "json"' in line
    caplog.clear()
    read_documents(
        write_chats(tmp_path, [*CHATS, [*CHATS[0], {"role": "critic", "content": "c"}]]), make_chat_tokenizer(), "assistant"
    )
    assert not caplog.messages


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_the_clock_of_templates_stands_still(tmp_path: Path, template: str) -> None:
    corpus = write_chats(tmp_path, CHATS)
    tokenizer = make_chat_tokenizer(DATED + template)
    first, again = (read_documents(corpus, tokenizer, "assistant") for _ in range(2))
    for one, other, chat in zip(first, again, CHATS, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        counts = write_out(chat)[1]
        assert mark(one)[-len(counts) :] == counts and not any(mark(one)[: -len(counts)])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_content_of_chats_is_their_messages_and_the_template(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_chats(tmp_path, CHATS)
    corpus.streaming = streaming

    def describe(template: str) -> Any:
        kind = choose_kind(corpus)
        return json.loads(json.dumps(describe_content(kind, open_documents(kind, make_chat_tokenizer(template)))))

    dated = describe(DATED + CHATML)
    monkeypatch.setattr("flame.data.chats.STARTED", datetime(2000, 1, 1))
    assert list_differences(dated, describe(DATED + CHATML)) == []
    assert list_differences(dated, describe(CHATML)) == ["another chat template of model.tokenizer_path"]
    edited = json.loads(json.dumps(CHATS).replace("Hallo", "Hullo"))
    write_chats(tmp_path, edited)
    assert list_differences(dated, describe(DATED + CHATML))[0].endswith(
        "0 is another (1 of the " + ("1" if streaming else "3") + " compared are)"
    )


# ---------------------------------------------------------------- what a step counts

SEQ_LEN, CONTEXT_LEN = 150, 90


def test_labels_are_the_assistants_tokens_of_first_chunks(tmp_path: Path) -> None:
    """Token by token, for packs that cut documents."""
    documents = open_documents(choose_kind(write_chats(tmp_path, CHATS)), make_chat_tokenizer(), "assistant")
    packer = Packer(open_document_stream(documents, WHOLE, 0, 1, 3), "json", 0, SEQ_LEN, CONTEXT_LEN)
    cursor, answered = packer.first_cursor, 0
    for index in range(8):
        sequence = packer.next_sequence(cursor)
        again = packer.next_sequence(cursor)
        assert again.input_ids.tolist() == sequence.input_ids.tolist() and again.cursor == sequence.cursor
        cursor, batch = sequence.cursor, build_batch(sequence, index)
        expected: list[int] = []
        left, answers = [], []
        for chunk, end in zip(batch.documents, batch.cu_seqlens.tolist()[1:], strict=True):
            ids, counts = write_out(CHATS[int(chunk.document)])
            own = [t for t in range(chunk.start, chunk.end - 1) if chunk.start == 0 and counts[t + 1]]
            expected += [ids[t + 1] if t in own else NO_LABEL for t in range(chunk.start, chunk.end)]
            left += [chunk.end - 1 - t for t in own]
            answers += [[end - (chunk.end - own[0]), end]] if own else []
        assert batch.labels[0].tolist() == expected
        assert batch.tokens_left.tolist() == left and batch.answers.tolist() == answers
        assert batch.num_labels == batch.chunk_labels.sum() == len(left)
        for distance in (1, 2, 5, 40):
            assert batch.count_ahead(distance) == sum(each >= distance for each in left)
        answered += batch.num_labels
    assert answered > 100


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_loader_resumes_chats_exactly(tmp_path: Path, streaming: bool, workers: int) -> None:
    for number in range(2):
        corpus = write_chats(tmp_path, CHATS[number:])
        Path(corpus.data_files).rename(tmp_path / f"{number}.jsonl")
    corpus.data_files, corpus.streaming, corpus.loss_on = f"{tmp_path}/*.jsonl", streaming, "assistant"
    corpus.seq_len, corpus.context_len, corpus.num_streams, corpus.num_workers = SEQ_LEN, CONTEXT_LEN, 2, workers
    documents = open_documents(choose_kind(corpus), make_chat_tokenizer(), "assistant")
    state = DataState(corpus.num_streams, corpus.seed)

    def take(count: int) -> list[tuple]:
        loader = PackedLoader(corpus, Mixture((documents,), (1.0,)), 0, 1, state)
        taken = []
        for _ in range(count):
            batch = next(loader)
            state.advance([batch], 1)
            taken.append((batch.input_ids.tolist(), batch.labels.tolist(), batch.num_labels))
        loader.close()
        return taken

    whole = take(6)
    state = DataState(corpus.num_streams, corpus.seed)
    assert take(2) + take(4) == whole


def test_a_run_with_both_losses_counts_the_assistant_alone(workspace: Path, tmp_path: Path) -> None:
    make_chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    corpus = write_chats(tmp_path, CHATS * 10)
    changes = {
        "training__data_files": corpus.data_files,
        "training__text_column": "messages",
        "training__loss_on": "assistant",
        "training__seq_len": 256,
        "training__context_len": 200,
        "training__steps": 2,
        "training__num_streams": 1,
        "model__tokenizer_path": tmp_path / "tokenizer",
        "checkpoint__enable_checkpoint": False,
        "validation__holdout_every": 4,
        "validation__interval": 2,
    }
    rows = run_here(workspace, tmp_path / "run", **changes)
    steps = [row for row in rows if "ce_loss" in row]
    assert all(0 < row["anchors"] < 4 * 256 / 3 for row in steps) and "validation_loss" in rows[-1]


def test_held_out_chats_without_an_assistant_are_refused(workspace: Path, tmp_path: Path) -> None:
    make_chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    corpus = write_chats(tmp_path, CHATS * 10)
    (tmp_path / "held").mkdir()
    held = write_chats(tmp_path / "held", [CHATS[2][:1]] * 40)
    changes = {
        "training__data_files": corpus.data_files,
        "training__text_column": "messages",
        "training__loss_on": "assistant",
        "training__seq_len": 128,
        "training__context_len": 128,
        "model__tokenizer_path": tmp_path / "tokenizer",
        "validation__dataset": "json",
        "validation__data_files": held.data_files,
        "validation__text_column": "messages",
        "validation__interval": 2,
    }
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **changes)
    assert stop.value.code == UserError.EXIT_CODE


# ---------------------------------------------------------------- token ids


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_column_of_token_ids_is_taken_as_it_is(tmp_path: Path, kind: str, streaming: bool) -> None:
    rows = [[1, 2, 256], [3], [], None, [256, 5]]
    corpus = write_chats(tmp_path, rows, "input_ids", kind)
    corpus.streaming = streaming
    found = read_documents(corpus, BYTES)
    assert [None if tokens is None else tokens.tolist() for tokens in found] == [[1, 2, 256], [3, 256], None, None, [256, 5, 256]]
    assert all(tokens.dtype == np.int32 for tokens in found if tokens is not None)


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("wrong", [258, -1, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, kind: str, wrong: int) -> None:
    corpus = write_chats(tmp_path, [[1, 2], [3, wrong]], "input_ids", kind)
    with pytest.raises(UserError) as caught:
        read_documents(corpus, BYTES)
    expect_one_line(caught.value, "training.dataset = ", f"row 1 holds the token id {wrong}", "ids 0 to 257")


def test_preprocess_writes_chats_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for column, rows in (("messages", CHATS), ("input_ids", [[1, 2], [3, 256]])):
        corpus = write_chats(tmp_path, rows, column)
        command = ["--dataset=json", f"--data_files={corpus.data_files}", f"--text_column={column}", "--num_workers=0"]
        assert preprocess([*command, f"--out={tmp_path}/{column}", f"--tokenizer_path={tmp_path}/tokenizer"]) == 0
        folder = open_documents(
            choose_kind(Training(dataset="tokens", data_files=f"{tmp_path}/{column}")),
            load_tokenizer(str(tmp_path / "tokenizer")),
        )
        if column == "messages":
            make_chat_tokenizer(CHATML + " ").save_pretrained(tmp_path / "other")
            assert preprocess([*command, f"--out={tmp_path}/{column}", f"--tokenizer_path={tmp_path}/other"]) == 2
            assert "was made with another chat template" in capsys.readouterr().err
        expected = [write_out(chat)[0] for chat in CHATS] if column == "messages" else [[1, 2, 256], [3, 256]]
        assert [folder.read(index).tolist() for index in range(len(folder))] == expected  # type: ignore[arg-type,union-attr]
