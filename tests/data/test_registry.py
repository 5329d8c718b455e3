"""What a value of `dataset` means, and which options of a source are refused or have no effect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flame.data.sources.hub import HubDataset
from flame.data.sources.registry import BUILT_IN, find_kind, is_from_hub
from flame.errors import UserError
from tests.support.paths import REPO
from tests.support.sources import MODEL, list_unused_data_options, read_faults, read_job

GENERATED = ("pathstar", "siblings", "reasoning_gym")
WITHOUT_FILES = [*MODEL, "--training.dataset"]


def test_each_name_is_its_kind():
    assert list(BUILT_IN) == ["stdlib", "text", "json", "csv", "parquet", "arrow", "tokens", *GENERATED]
    for name, kind in BUILT_IN.items():
        assert find_kind(name, "training") is kind and not is_from_hub(name)
    assert find_kind("reasoning_gym:maze", "training") is BUILT_IN["reasoning_gym"] and not is_from_hub("reasoning_gym:maze")


@pytest.mark.parametrize("name", ["imdb", "HuggingFaceFW/fineweb-edu", "a/b.c_d-e", "owner/json", "owner/tokens"])
def test_names_of_the_hub(name):
    assert find_kind(name, "training") is HubDataset and is_from_hub(name)


def test_an_existing_folder_is_read_as_the_hub_is(tmp_path: Path):
    assert find_kind(str(tmp_path), "training") is HubDataset and not is_from_hub(str(tmp_path))


@pytest.mark.parametrize(
    "name, parts",
    [
        ("jsonl", ['did you mean "json"?', '"owner/jsonl"']),
        ("JSON", ['did you mean "json"?']),
        ("parque", ['did you mean "parquet"?']),
        ("token", ['did you mean "tokens"?']),
        ("texts", ['did you mean "text"?']),
        ("path-star", ['did you mean "pathstar"?']),
        ("sibling", ['did you mean "siblings"?']),
        ("data/corpus.jsonl", ['write training.dataset = "json" with training.data_files = "data/corpus.jsonl"']),
        ("corpus.json.gz", ['write training.dataset = "json"']),
        ("/data/a.parquet", ['write training.dataset = "parquet" with training.data_files = "/data/a.parquet"']),
        ("notes.TXT", ['write training.dataset = "text"']),
        ("data/train.bin", ['write training.dataset = "tokens" with training.data_files = "data/train.bin"']),
        ("a.csv.gz", ['write training.dataset = "csv"']),
        ("", ["is no source", '"stdlib", "text", "json", "csv", "parquet", "arrow", "tokens", "pathstar"', "owner/name"]),
        ("a/b/c", ["is no source", "an existing folder"]),
        ("./missing", ["is no source"]),
        ("/missing", ["is no source"]),
        ("~/missing", ["is no source"]),
        ("s3://bucket/data", ["is no source"]),
        ("my corpus", ["is no source"]),
        ("a--b", ["is no source"]),
        ("x" * 97, ["is no source"]),
    ],
)
def test_names_of_nothing_say_what_is_meant(name, parts):
    with pytest.raises(UserError) as caught:
        find_kind(name, "training")
    (line,) = caught.value.lines
    assert line.startswith(f'training.dataset = "{name}" ') and all(part in line for part in parts)


def test_a_wrong_name_is_one_line_of_the_run():
    (line,) = read_faults([*WITHOUT_FILES, "jsonl"])
    assert line.startswith('training.dataset = "jsonl" is no kind of source')
    lines = read_faults([*MODEL, "--sources.a.dataset", "jsonl", "--sources.b.dataset", "a/b", "--sources.c.dataset", "a/b/c"])
    assert [line.split(" ")[0] for line in lines] == ["sources.a.dataset", "sources.c.dataset"]
    assert list_unused_data_options([*MODEL, "--validation.dataset", "jsonl"]) == ["validation.dataset"]


@pytest.mark.parametrize(
    "options, parts",
    [
        (["text"], ["needs training.data_files (paths, folders or globs"]),
        (["json"], ["needs training.data_files (paths, folders or globs"]),
        (["tokens"], ["needs training.data_files (a folder of flame-preprocess, or token files)"]),
        (["parquet", "--training.data_files", "/none/*.parquet"], ['training.data_files: "/none/*.parquet" matches no file']),
        (
            ["stdlib", "--training.data_files", "a"],
            ["training.data_files is set", 'allowed with "text", "json", "csv", "parquet", "arrow", "tokens"'],
        ),
        (["owner/name", "--training.data_files", "a"], ["training.data_files is set"]),
        (
            ["text", "--training.data_files", "README.md", "--training.streaming", "true", "--validation.holdout_every", "3"],
            ["one document a shard", "validation.holdout_every = 3"],
        ),
    ],
)
def test_what_would_read_another_corpus_is_refused(options, parts, monkeypatch):
    monkeypatch.chdir(REPO)
    (line,) = read_faults([*WITHOUT_FILES, *options])
    assert line.startswith("training.da") and all(part in line for part in parts)


def test_a_rule_that_training_and_validation_break_is_one_line():
    both = ["--validation.dataset", "siblings", "--validation.interval", "3", "--training.dataset", "siblings"]
    tokenizer = ["--model.config", "m.json", "--model.tokenizer_path", "siblings"]
    assert len(read_faults([*tokenizer, *both, "--training.context_len", "4"])) == 1


@pytest.mark.parametrize(
    "options, unused",
    [
        (["stdlib", "--training.dataset_name", "a", "--training.text_column", "b"], ["dataset_name", "text_column"]),
        (["stdlib", "--training.dataset_split", "a", "--training.streaming", "true"], ["dataset_split", "streaming"]),
        (["text", "--training.data_files", "README.md", "--training.text_column", "b"], ["text_column"]),
        (["tokens", "--training.data_files", "x", "--training.streaming", "true"], ["streaming"]),
        (["owner/name", "--training.dataset_name", "a", "--training.text_column", "b", "--training.streaming", "true"], []),
        (["siblings", "--siblings.pairs", "3", "--training.dataset_name", "a"], ["dataset_name"]),
    ],
)
def test_what_a_source_does_not_read_is_listed(options, unused, monkeypatch):
    monkeypatch.chdir(REPO)
    assert list_unused_data_options([*WITHOUT_FILES, *options]) == [f"training.{name}" for name in unused]


def test_sections_of_sources_that_are_not_read_are_listed():
    idle = ["--pathstar.labels", "9", "--siblings.pairs", "3"]
    assert list_unused_data_options([*MODEL, *idle]) == ["pathstar.labels", "siblings.pairs"]
    off = ["--validation.dataset", "siblings", "--validation.holdout_every", "0"]
    assert list_unused_data_options([*MODEL, *idle, *off]) == ["validation.dataset", "pathstar.labels", "siblings.pairs"]


def test_sections_keep_their_ranges():
    (line,) = read_faults([*MODEL, "--pathstar.labels", "0"])
    assert line.startswith("pathstar.labels = 0 (command line): allowed is an integer")
    assert read_job([*MODEL, "--siblings.parents", "7"]).extensions["siblings"].parents == 7  # type: ignore[attr-defined]


def test_rules_are_checked_without_loading_the_libraries_that_read_data():
    program = (
        "import sys; from flame.config.schema import JobConfig; "
        "from flame.data.sources.registry import find_data_conflicts, list_used; "
        "job = JobConfig(); job.training.dataset = 'parquet'; print(len(list(find_data_conflicts(job)))); list_used(job); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (found.stdout, found.stderr) == ("1\n[]\n", "")
