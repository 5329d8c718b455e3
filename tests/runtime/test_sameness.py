"""Ranks that have something else than the others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from flame.errors import UserError
from flame.runtime.sameness import check_same, hash_pieces, list_differences
from flame.trainer.named_files import hash_code
from flame.trainer.options import read_options
from flame.trainer.sameness import PLACES, describe_program
from flame.weights.fingerprint import describe_weights
from flame.weights.source import find_weights
from tests.support.ranks import run_on_ranks


def compare(folder: Path, values: list[dict[str, object]]) -> list[str]:
    """What the check says on this rank."""
    try:
        check_same(values[dist.get_rank()])
    except UserError as error:
        return error.lines
    return []


def test_a_difference_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    values = [{"a": 1, "b": None}, {"a": 1, "b": None}, {"a": 2, "b": None, "c": 3}]
    first, second, third = run_on_ranks(3, tmp_path / "run", compare, values)
    assert first == second == third and len(first) == 1
    line = first[0]
    assert line.startswith("a is 1 on ranks 0 to 1 (") and "), 2 on rank 2 (" in line
    assert line.endswith("): start the same command, with the same code and files, on all machines")


def test_what_a_rank_lacks_is_not_compared(tmp_path: Path) -> None:
    assert run_on_ranks(2, tmp_path / "run", compare, [{"a": 1, "b": 2}, {"a": 1}]) == [[], []]


def test_many_differences_are_counted() -> None:
    gathered = [(host, {f"o{number:02}": f"{host}{number}" for number in range(20)}) for host in "ab"]
    found = list_differences(gathered)
    assert found[0] == "o00 is a0 on rank 0 (a), b0 on rank 1 (b)" and found[-1] == "12 more differ" and len(found) == 9


def test_ranks_that_lie_apart_are_listed() -> None:
    gathered = [(host, {"x": value}) for host, value in zip("abab", ("1", "2", "1", "2"), strict=True)]
    assert list_differences(gathered) == ["x is 1 on ranks 0, 2 (a), 2 on ranks 1, 3 (b)"]


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "m.json"
    path.write_text('{"model_type": "llama"}')
    return str(path)


@pytest.fixture
def first_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the first rank of one of several machines."""
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("first_of_machine")
def test_options_are_compared_but_for_where_files_are(tmp_path: Path, model_file: str) -> None:
    def describe(*words: str) -> dict[str, object]:
        model = ["--model.config", model_file, "--model.tokenizer_path", "bytes"]
        return describe_program(read_options([*model, *words], 1))

    plain = describe()
    assert describe("--job.description", "another", "--job.dump_folder", str(tmp_path / "x")) == plain
    changed = describe("--optimizer.lr", "5e-3", "--comm.timeout_seconds", "7")
    assert {key for key in plain if plain[key] != changed[key]} == {"optimizer.lr", "comm.timeout_seconds"}
    assert not set(PLACES) & plain.keys()
    assert plain["version of torch"] and len(str(plain["hash of flame's code"])) == 16
    json.dumps(plain)


@pytest.mark.usefixtures("first_of_machine")
def test_code_of_the_users_own_is_compared_by_content(tmp_path: Path, model_file: str) -> None:
    logger = tmp_path / "own_logger.py"
    source = "from flame.logging.writers.base import MetricWriter\nclass Own(MetricWriter):\n    name = 'own'\n"
    logger.write_text(source)
    options = ["--model.config", model_file, "--model.tokenizer_path", "bytes", "--metrics.logger_path", str(logger)]
    before = describe_program(read_options(options, 1))
    logger.write_text(source + "# another line\n")
    after = describe_program(read_options(options, 1))
    assert {key for key in before if before[key] != after[key]} == {"hash of metrics.logger_path"}


def test_one_rank_of_a_machine_reads_for_all(monkeypatch: pytest.MonkeyPatch, model_file: str) -> None:
    options = read_options(["--model.config", model_file, "--model.tokenizer_path", "bytes"], 1)
    assert "hash of flame's code" not in describe_program(options), "on a single machine there is nothing to compare"
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert "hash of flame's code" not in describe_program(options)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "hash of flame's code" in describe_program(options)


def test_code_is_told_by_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    first = hash_code(tmp_path)
    (tmp_path / "b.txt").write_text("no code")
    assert hash_code(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert hash_code(tmp_path) != first


def test_a_large_file_is_told_by_its_pieces(tmp_path: Path) -> None:
    content = bytearray(1 << 20)
    path = tmp_path / "weights"
    path.write_bytes(content)
    plain = hash_pieces(path)
    for place in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] = 1
        path.write_bytes(changed)
        assert hash_pieces(path) != plain
    path.write_bytes(content + b"\0")
    assert hash_pieces(path) != plain


def test_weights_are_compared_by_content_and_not_by_path(tmp_path: Path) -> None:
    def describe(name: str, value: float) -> dict[str, object]:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"weight": torch.full((3, 2), value)}, folder / "model.safetensors")
        return describe_weights(find_weights(str(folder)))

    one, copy, other = describe("one", 1.0), describe("copy", 1.0), describe("other", 2.0)
    assert one == copy
    assert one.keys() == other.keys() and one != other
