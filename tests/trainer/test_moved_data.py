"""A run whose data are elsewhere, under another name, or other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch.distributed as dist

from flame.checkpoints.manager import TRAINER_FILE, list_checkpoints
from flame.cli.audit import main as audit
from flame.config.schema import Training
from flame.data.corpus_content import describe_content, list_differences
from flame.data.documents import open_documents
from flame.data.tokenizer import load_tokenizer
from tests.support.checkpoints import edit_state
from tests.support.runs import cut_power_after, measured, options, read_metrics, run_here
from tests.support.sources import choose_kind

UNNAMED = {"training__dataset": None, "training__data_files": None}


@pytest.fixture(scope="module")
def stopped_run(workspace, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    cut_power_after(4, options(workspace, run))
    return run


@pytest.fixture
def run(stopped_run, tmp_path) -> Path:
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.fixture
def moved(workspace, tmp_path) -> Path:
    return Path(shutil.copyfile(workspace / "corpus.jsonl", tmp_path / "elsewhere.jsonl"))


def refuse(workspace, run: Path, capsys, **changes: object) -> str:
    before = read_metrics(run)
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, run, **changes)
    dist.destroy_process_group()
    assert stop.value.code == 2 and read_metrics(run) == before
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def name_source(name: str, path: Path) -> dict[str, object]:
    return {f"sources__{name}__dataset": "json", f"sources__{name}__data_files": path}


def test_data_that_have_moved_are_known_again(workspace, run, moved, plain_run, caplog):
    rows = run_here(workspace, run, training__data_files=moved)
    assert measured(rows) == measured(read_metrics(plain_run))
    assert f'training.data_files: "{workspace}/corpus.jsonl" -> "{moved}"' in caplog.text


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda text: text + '{"text": "more"}\n', "41 documents instead of 40, "),
        (lambda text: text.replace("alpha", "omega"), "document "),
        (lambda text: text.replace("alpha", "al"), " bytes instead of "),
    ],
)
def test_other_data_are_refused_by_what_differs(workspace, run, moved, capsys, edit, found):
    moved.write_text(edit(moved.read_text()))
    line = refuse(workspace, run, capsys, training__data_files=moved)
    assert line.startswith('source "json" does not hold what the checkpoint was made with (') and found in line
    assert f'training.data_files = "{moved}" (before: "{workspace}/corpus.jsonl")' in line


def test_another_column_of_the_same_file_is_other_data(workspace, tmp_path, capsys):
    both = tmp_path / "both.jsonl"
    rows = [json.loads(line)["text"] for line in (workspace / "corpus.jsonl").read_text().splitlines()]
    both.write_text("".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in rows))
    first = {"training__data_files": both, "training__steps": 1}
    run_here(workspace, tmp_path / "run", **first)
    line = refuse(workspace, tmp_path / "run", capsys, training__data_files=both, training__text_column="body")
    assert "document 0 is another (40 of the 40 compared are)" in line and 'training.text_column = "body"' in line


def test_streamed_data_are_known_by_their_files(workspace, tmp_path, capsys):
    texts = [line for line in (workspace / "corpus.jsonl").read_text().splitlines(keepends=True)]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        for shard in range(4):
            (tmp_path / name / f"{shard}.jsonl").write_text("".join(texts[shard::4]))
    streamed = {"training__streaming": True, "training__num_streams": 4}
    run = tmp_path / "run"
    run_here(workspace, run, **streamed | {"training__data_files": tmp_path / "here/*.jsonl", "training__steps": 1})
    there = {"training__data_files": tmp_path / "there/*.jsonl"}
    run_here(workspace, run, **streamed | there | {"training__steps": 2})
    (tmp_path / "there" / "2.jsonl").write_text("".join(texts[2::4]).replace("alpha", "omega"))
    line = refuse(workspace, run, capsys, **streamed, **there)
    assert "(file 2 is another (1 of the 4 compared are))" in line


@pytest.mark.parametrize("is_saved", [True, False])
def test_streamed_folders_are_known_by_their_files(workspace, tmp_path, monkeypatch, is_saved):
    texts = [json.loads(line)["text"] for line in (workspace / "corpus.jsonl").read_text().splitlines()]

    def write(folder: Path, texts: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if is_saved:
            datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder, num_shards=4)
            return
        folder.mkdir()
        for shard in range(4):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::4]]
            (folder / f"train-{shard}.jsonl").write_text("".join(lines))

    def describe(dataset: str) -> dict:
        kind = choose_kind(Training(dataset=dataset, streaming=True, num_streams=4))
        return json.loads(json.dumps(describe_content(kind, open_documents(kind, load_tokenizer("bytes")))))

    write(tmp_path / "data", texts)
    monkeypatch.chdir(tmp_path)
    before = describe("data")
    assert len(before["sample"]) == 4 and before["bytes"] > 1000 and before["name"] == "folder train text"
    assert list_differences(before, describe("./data")) == []
    shutil.copytree("data", "elsewhere")
    assert list_differences(before, describe(str(tmp_path / "elsewhere"))) == []
    write(tmp_path / "data", [text.replace("alpha", "omega") for text in texts])
    assert list_differences(before, describe("data"))


def test_the_audit_of_a_renamed_source_is_one(workspace, tmp_path, moved, capsys):
    audited = {"training__audit": True}
    run_here(workspace, tmp_path / "run", **audited | {"training__steps": 3})
    run_here(workspace, tmp_path / "run", **audited | UNNAMED | name_source("other", moved))
    audit([str(tmp_path / "run")])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("| other")]
    assert rows and all(row[5:7] == ["0", "0"] for row in rows) and "| json" not in printed  # none repeated, none missing


@pytest.mark.parametrize("name", ["json", "text"])
def test_a_run_of_one_corpus_gets_a_second_source(workspace, run, moved, caplog, name):
    """The first keeps its position under any name, and its documents go on where they were."""
    second = moved.with_name("second.jsonl")
    second.write_text("".join(json.dumps({"text": f"second {number}"}) + "\n" for number in range(30)))
    changes = UNNAMED | name_source("json" if name == "text" else "also", second) | name_source(name, moved)
    before = json.loads((list_checkpoints(run / "checkpoint")[-1] / TRAINER_FILE).read_text())
    run_here(workspace, run, **changes)
    after = json.loads((list_checkpoints(run / "checkpoint")[-1] / TRAINER_FILE).read_text())
    old, new = before["data"]["sources"]["json"]["cursors"], after["data"]["sources"][name]["cursors"]
    assert all(new[stream] >= cursor for stream, cursor in old.items())
    assert after["counters"]["tokens_by_source"][name] >= before["counters"]["tokens_by_source"]["json"]
    assert sum(after["counters"]["tokens_by_source"].values()) == after["counters"]["tokens_seen"]
    assert ('source "json" is called "text" and goes on where it was' in caplog.text) == (name == "text")
    assert "is new and begins at its first document" in caplog.text


def test_a_source_under_another_name_goes_on_to_the_bit(workspace, run, moved, plain_run):
    rows = run_here(workspace, run, **UNNAMED | name_source("other", moved))
    assert measured(rows) == measured(read_metrics(plain_run))


def test_a_checkpoint_that_does_not_tell_its_data_goes_on_under_the_same_options_alone(workspace, run, moved, plain_run, capsys):
    (checkpoint,) = list_checkpoints(run / "checkpoint")
    edit_state(checkpoint, lambda state: state["data"]["sources"]["json"].pop("content"))
    assert "(its options differ; changed: training.data_files" in refuse(workspace, run, capsys, training__data_files=moved)
    assert measured(run_here(workspace, run)) == measured(read_metrics(plain_run))
