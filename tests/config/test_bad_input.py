"""Bad input is one line for each mistake, or a counted bad row, and never a traceback; nor does it run as code."""

from __future__ import annotations

import builtins
import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import transformers.dynamic_module_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.checkpoints.files import list_checkpoints
from flame.cli.preprocess import main as preprocess
from flame.config.schema import JobConfig, Training
from flame.data.mixture import open_held_out
from flame.data.order import shuffled_index
from flame.data.sources.cells import FileShards
from flame.data.tokenizer import build_bytes_tokenizer, load_tokenizer
from flame.errors import UserError
from flame.models.causal_lm import build_on_meta, find_model_conflicts, load_model_config
from flame.models.config_values import find_impossible_values
from flame.models.memory import Share, check_memory, estimate_bytes, find_memory
from flame.train import main
from flame.trainer.options import read_options
from flame.trainer.setup import open_inputs
from tests.support.models import tiny_llama
from tests.support.options import TABLE
from tests.support.paths import REPO
from tests.support.refusals import expect_one_line
from tests.support.sources import open_source


@pytest.fixture(autouse=True, scope="module")
def no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


# ---------------------------------------------------------------- configurations

MIXTURE = """
[job]
dump_folder = "exp/mixture"

[model]
config = "configs/models/llama_quickstart.json"
tokenizer_path = "bytes"

[sources.web]
dataset = "json"
data_files = "rows.jsonl"
weight = 3

[sources.books]
dataset = "text"
data_files = "*.txt, sub/**/*.txt"

[sources.ready]
dataset = "tokens"
data_files = "ready"
weight = 0.5

[sources.stream]
dataset = "parquet"
data_files = "?.parquet"
text_column = "body"
streaming = true

[training]
num_streams = 2
seq_len = 64
context_len = 32

[validation]
interval = 10
holdout_every = 3
"""

VALIDATED = """
[model]
config = "model.json"
tokenizer_path = "tokenizer"
trust_remote_code = false

[training]
dataset = "json"
data_files = "rows.jsonl"
streaming = true
num_streams = 1
seq_len = 64
context_len = 64

[lr_scheduler]
decay_ratio = 0.5
decay_type = "linear"

[validation]
interval = 5
num_sequences = 4
dataset = "parquet"
data_files = "a.parquet"
text_column = "body"

[checkpoint]
async_mode = "async"
keep_latest_k = 3
"""

TEXTS = [(REPO / "configs" / "quickstart.toml").read_text(), MIXTURE, VALIDATED]

TEXT_VALUES = st.one_of(
    st.sampled_from(["bytes", "json", "text", "parquet", "tokens", "stdlib", "pandas", "nobody/nothing", "~", ".", "linear"]),
    st.sampled_from(["rows.jsonl", "*.parquet", "broken.parquet", "ready", "tokenizer", "model.json", "sub", "body", "async"]),
    st.sampled_from(["./no\\nfile", "no\\nbody/no\\u2028thing", "no/such/folder", "~nobody/x", "rows.jsonl/x", "a" * 300]),
    st.sampled_from(["[", "**", "*", ",,"]),
).map('"{}"'.format)
VALUES = st.one_of(
    TEXT_VALUES,
    st.sampled_from(["0", "-1", "1", "3", "7.5", "1e400", "9" * 30, "0x7fffffffffffffff", "nan", "-inf", "true", "1979-05-27"]),
    st.sampled_from(["[1, [2, {}]]", "{a = {b = [1]}}", '""', "''' \n\n'''", '"a\\nb"', '"\\u2028\\u001b[31m\\u0085"']),
    st.sampled_from(['"\\u0000"', '"\U0001f600é\u202e"']),
)
NAMES = st.sampled_from(
    ["training", "sources", "sources.web", "sources.'a b'", "x", "", '"a\\nb"', "é", "validation", "model.config"]
)
KEYS = [f"--{key}" for key in TABLE.schemas]
WORDS = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(["--", "-1", "-h2", "--=", "x", "0.1", "*.txt", "é\x1b[31m", "\udcff", "a\nb", "--sources.a.b"]),
    st.sampled_from(["--training.num_streams=7", "--training.steps=-1", "--training.streaming", "--training.dataset=text"]),
    st.sampled_from(["--sources.web.weight", "--validation.interval=3", "--model.config=nobody/nothing"]),
    st.sampled_from(["--job.config_file=no\n.toml", "--job.dump_folder=rows.jsonl/x"]),
)
SECTIONS = "|".join(name.partition(".")[0] for name in TABLE.sections)
Draw = Callable[[st.SearchStrategy], Any]


def change_bytes(draw: Draw, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]


def change_lines(draw: Draw, content: bytes) -> bytes:
    lines = content.split(b"\n")
    one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    match draw(st.sampled_from(["drop", "double", "swap", "move"])):
        case "drop":
            del lines[one]
        case "double":
            lines.insert(other, lines[one])
        case "swap":
            lines[one], lines[other] = lines[other], lines[one]
        case "move":
            lines.insert(other, lines.pop(one))
    return b"\n".join(lines)


def change_match(draw: Draw, content: bytes, pattern: bytes, replacement: st.SearchStrategy[str]) -> bytes:
    """Replace group 1 of one match of the pattern."""
    matches = list(re.finditer(pattern, content, re.MULTILINE))
    if not matches:
        return content
    start, end = draw(st.sampled_from(matches)).span(1)
    return content[:start] + draw(replacement).encode() + content[end:]


def change_value(draw: Draw, content: bytes) -> bytes:
    return change_match(draw, content, rb"^\w+ *= *([^#\n]+)", VALUES)


def change_value_alike(draw: Draw, content: bytes) -> bytes:
    if draw(st.booleans()):
        return change_match(draw, content, rb'^\w+ *= *("[^"\n]*")', TEXT_VALUES)
    return change_match(draw, content, rb"^\w+ *= *(\d+)\b", st.integers(1, 200).map(str))


def change_key(draw: Draw, content: bytes) -> bytes:
    return change_match(draw, content, rb"^\w*?(\w) *=", st.sampled_from(["", "s", ".x", "-", " x", "é"]))


def change_section(draw: Draw, content: bytes) -> bytes:
    return change_match(draw, content, rb"^\[(.+)\]", NAMES)


@st.composite
def bad_configurations(draw: Draw) -> bytes:
    content = draw(st.sampled_from(TEXTS)).encode()
    changes = st.sampled_from([change_bytes, change_lines, change_key, change_section, change_value, *[change_value_alike] * 5])
    for change in draw(st.lists(changes, min_size=1, max_size=2)):
        content = change(draw, content)
    return content


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with all that TEXTS name."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(REPO / "configs", folder / "configs")
    (folder / "model.json").write_text(json.dumps(tiny_llama(vocab_size=300).to_dict()))
    build_bytes_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "row {row}"}}\n' for row in range(9)))
    (folder / "sub").mkdir()
    for name in ("one.txt", "two.txt", "sub/three.txt", "sub/stdlib.py"):
        (folder / name).write_text(f"text of {name}")
    for name in ("a", "b"):
        pq.write_table(pa.table({"body": [f"{name} {row}" for row in range(9)]}), folder / f"{name}.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sysconfig, "get_path", {"stdlib": str(folder / "sub")}.__getitem__)
        with redirect_stdout(io.StringIO()):
            preprocess(["--out=ready", "--tokenizer_path=bytes", "--dataset=json", "--data_files=rows.jsonl", "--num_workers=0"])
        yield folder


def prepare(config: JobConfig) -> None:
    """What a run does, options read, before its processes meet."""
    tokenizer, _, mixture = open_inputs(config)
    if config.validation.interval:
        open_held_out(config, tokenizer, mixture)


@pytest.mark.long
def test_any_configuration_runs_or_is_refused_by_name(place: Path) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(bad_configurations(), st.just([]) | st.lists(WORDS, max_size=2), st.sampled_from([1, 1, 2]))
    def check(content: bytes, words: list[str], world_size: int) -> None:
        (place / "run.toml").write_bytes(content)
        outcome = "refused as options"
        try:
            config = read_options(["--job.config_file=run.toml", *words], world_size)
            outcome = "refused when opened"
            prepare(config)
            outcome = "accepted"
        except UserError as error:
            assert error.lines
            for line in error.lines:
                assert line.isprintable()
                assert re.search(rf"\b({SECTIONS})\.\w|\(command line\)|\((run|no\\n)\.toml\)", line), line
        outcomes[outcome] += 1

    check()
    assert outcomes["refused as options"] > 100 and outcomes["accepted"] > 30 and outcomes["refused when opened"] > 5, outcomes


@pytest.mark.parametrize("text", TEXTS)
def test_unchanged_the_configurations_are_accepted(place: Path, text: str) -> None:
    (place / "run.toml").write_text(text)
    prepare(read_options(["--job.config_file=run.toml"], 1))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"job.config_file": "no\n.toml"}, ["job.config_file", r"no\n.toml"]),
        ({"job.dump_folder": "a" * 300}, ["job.dump_folder", "cannot be a folder", "too long"]),
        ({"job.dump_folder": "model.json/run"}, ["job.dump_folder", "cannot be a folder", "Not a directory"]),
        ({"job.dump_folder": "a\0b"}, ["job.dump_folder", r"a\x00b", "cannot be a folder"]),
        ({"model.config": "deep.json"}, ["model.config", "deep.json cannot be read as JSON"]),
        ({"model.config": "nobody/no\x1bthing"}, ["model.config", r"nobody/no\x1bthing", "no such model on the Hub"]),
        ({"model.tokenizer_path": "a\u2028b"}, ["model.tokenizer_path", r"a\u2028b", "no such model on the Hub"]),
        ({"training.dataset": "a\nb"}, ["training.dataset", r"a\nb", "is no source"]),
        ({"training.dataset": "json", "training.data_files": "rows.jsonl, \x1b"}, ["training.data_files", r"\x1b"]),
        ({"training.dataset": "nobody/nothing"}, ["training.dataset", "network"]),
        ({"training.dataset": "xml"}, ["training.dataset", "is a reader of the datasets library, not a dataset"]),
        ({"training.dataset": "bad_csv", "training.streaming": "true"}, ["training.dataset", "bad_csv", "cannot be loaded"]),
    ],
    ids=str,
)
def test_values_that_only_show_later_are_one_line(place: Path, options: dict[str, str], parts: list[str]) -> None:
    (place / "deep.json").write_text("[" * 100_000)
    (place / "bad_csv").mkdir(exist_ok=True)
    (place / "bad_csv" / "train.csv").write_bytes(b'text\n"a\n\xff\xfe,,,\n1,2,3')
    defaults = {"model.config": "model.json", "model.tokenizer_path": "bytes", "training.num_streams": "1"}
    defaults |= {"training.context_len": "64", "training.seq_len": "64"}
    with pytest.raises(UserError) as caught:
        prepare(read_options([f"--{key}={value}" for key, value in (defaults | options).items()], 1))
    expect_one_line(caught.value, *parts)


def test_a_home_folder_in_model_config(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert read_options(["--model.config=~/model.json", "--model.tokenizer_path=~/tokenizer"], 1)


# ---------------------------------------------------------------- model configurations


SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 8192,
}


def build_from(folder: Path, **changes: object) -> None:
    """What a run does with a model configuration before it is sharded."""
    (folder / "m.json").write_text(json.dumps(SMALL_LLAMA | changes))
    model_config = load_model_config(str(folder / "m.json"))
    if faults := list(find_model_conflicts(model_config, 258, Training().context_len, exports=True)):
        raise UserError(*faults)
    build_on_meta(model_config, "cpu", "sdpa")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["hidden_size", "intermediate_size", "num_attention_heads"], [0.5, -4, 10**30, "x", None, []]),
        *itertools.product(["num_key_value_heads", "head_dim"], [0, -1, 10**30, "x", {}]),
        *itertools.product(["vocab_size", "num_hidden_layers"], [0.5, "x", None, []]),
        *itertools.product(["rope_theta", "rope_parameters"], ["x", [], 10**30]),
        ("num_key_value_heads", 3),
        ("hidden_act", "x\ny"),
        ("pad_token_id", 10**30),
        ("layer_types", "x"),
        *itertools.product(["attention_dropout"], [0.1, -1, 3, float("nan")]),
        *itertools.product(["model_type"], [0, None, "no\nsuch", [], "t5", "gemma3", "musicgen", "blt", "llama4"]),
        ("auto_map", 3),
    ],
)
def test_bad_model_configurations_are_one_line(tmp_path: Path, key: str, value: object) -> None:
    build_from(tmp_path)
    with pytest.raises(UserError) as caught:
        build_from(tmp_path, **{key: value})
    expect_one_line(caught.value, "model.config")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        *((key, 0, "must be at least 1") for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")),
        *((key, -1, "must be at least 1") for key in ("num_hidden_layers", "intermediate_size", "head_dim")),
        ("num_hidden_layers", 10**6, "must be at most 2000"),
        ("intermediate_size", 10**30, "must be at most 1099511627776"),
        ("vocab_size", 2**62, "must be at most 1099511627776"),
        ("rope_theta", 0, "must be more than 0"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}, "must be more than 0"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 0.0}, "must be more than 0"),
        ("rms_norm_eps", float("inf"), "must be a finite number"),
        ("rms_norm_eps", float("nan"), "must be a finite number"),
        ("rms_norm_eps", -1e-6, "must be a number from 0 to 1"),
        ("rms_norm_eps", 1e5, "must be a number from 0 to 1"),
        ("initializer_range", float("nan"), "must be a finite number"),
        ("rope_theta", float("inf"), "must be a finite number"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}, "must be a finite number"),
    ],
)
def test_impossible_values_are_named_with_their_key(tmp_path: Path, key: str, value: object, part: str) -> None:
    with pytest.raises(UserError) as caught:
        build_from(tmp_path, **{key: value})
    expect_one_line(caught.value, "model.config", f"{key}", part)


@pytest.mark.parametrize("family", ["gpt2", "mamba2", "gemma2", "gpt_neox", "bloom", "rwkv", "qwen3_moe", "deepseek_v3"])
def test_no_family_has_impossible_values_by_itself(family: str) -> None:
    assert not [*find_impossible_values(transformers.CONFIG_MAPPING[family]().to_dict())]


@pytest.mark.parametrize("option", ["model.config", "job.config_file"])
def test_a_file_without_end_is_one_line(folder: Path, option: str) -> None:
    for path in ("/dev/zero", str(folder / "config.json")):
        if path != "/dev/zero":
            Path(path).symlink_to("/dev/zero")
        with pytest.raises(UserError) as caught:
            read_options(["--model.tokenizer_path=bytes", f"--model.config={folder}/model", f"--{option}={path}"], 1)
        expect_one_line(caught.value, option, "larger than 16 MiB")
    with pytest.raises(UserError) as caught:
        load_model_config(str(folder))
    expect_one_line(caught.value, "model.config", "larger than 16 MiB")


@pytest.mark.parametrize("key", ["intermediate_size", "vocab_size"])
def test_a_model_larger_than_the_memory_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str], key: str) -> None:
    (folder / "large.json").write_text(json.dumps(SMALL_LLAMA | {key: 10**12}))
    (folder / "data").write_bytes(LINES)
    changes = {"model__config": folder / "large.json", "training__dataset": "json", "training__data_files": folder / "data"}
    expect_exit(capfd, folder, "model.config = ", "GiB", f"{key} = {10**12}", **changes)


def test_the_memory_that_a_step_needs_is_counted(folder: Path) -> None:
    """By hand: 4 bytes of weight and of gradient, and the moments, for each parameter; frozen weights have the first alone."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    model[1].requires_grad_(False)
    assert estimate_bytes(model, 8) == 4 * 30 + 12 * 20 and estimate_bytes(model, 4) == 4 * 30 + 8 * 20
    there = find_memory(torch.device("cpu"))
    assert 1 << 28 < there < 1 << 50
    config = load_model_config(str(folder / "model"))
    huge = torch.nn.Linear(there // 16, 1, bias=False, device="meta")
    cpu = torch.device("cpu")
    check_memory(huge, config, "x", cpu, Share(2, 1), 8)
    check_memory(huge, config, "x", cpu, Share(4, 2), 8)
    for share in (Share(1, 2), Share(2, 4)):
        with pytest.raises(UserError):
            check_memory(huge, config, "x", cpu, share, 8)


# ---------------------------------------------------------------- data

STEPS, SEQ_LEN = 2, 64


def run_options(folder: Path, **changes: object) -> list[str]:
    """Command line of a run of the model in `folder`, as short as can be."""
    values = {
        "job.dump_folder": folder / "run",
        "model.config": folder / "model",
        "model.tokenizer_path": "bytes",
        "training.num_streams": 1,
        "training.num_workers": 0,
        "training.seq_len": SEQ_LEN,
        "training.context_len": SEQ_LEN,
        "training.steps": STEPS,
        "checkpoint.enable_checkpoint": "false",
        "metrics.log_freq": 1,
    } | {key.replace("__", "."): str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(vocab_size=264).save_pretrained(tmp_path / "model")
    return tmp_path


def expect_exit(capfd: pytest.CaptureFixture[str], folder: Path, *parts: str, **changes: object) -> None:
    """A run ends with exit code 2 and one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(run_options(folder, **changes))
    assert stop.value.code == UserError.EXIT_CODE
    line = capfd.readouterr().err.removesuffix("\n")
    assert line.isprintable(), line
    for part in parts:
        assert part in line


def count_bad_rows(rows: list[str | None], is_streamed: bool) -> int:
    """Bad rows that a run of one stream passes over, by walking along them. Tokens are bytes, and one that ends a document."""
    seed, tokens, bad_rows = Training().seed, 0, 0
    for epoch in itertools.count():
        for position in range(len(rows)):
            text = rows[position if is_streamed else shuffled_index(position, len(rows), seed, epoch)]
            bad_rows += text is None
            tokens += len(text.encode()) + 1 if text is not None else 0
            if tokens >= STEPS * SEQ_LEN:
                return bad_rows
    raise AssertionError


def table(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def view_as_strings(*cells: bytes | None) -> pa.Array:
    return pa.array(cells, pa.binary()).view(pa.string())


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows", content)
    return buffer.getvalue()


GOOD = [f"good {number}" for number in range(3)]
LINES = "".join(f'{{"text": "{text}"}}\n' for text in GOOD).encode()
GARBAGE = b"\x80\xff" + random.Random(0).randbytes(3000).replace(b"\x1f\x8b", b"")
PARQUET = table(text=[f"row {row * 7919**3:x}" for row in range(1000)])
LONG = "a b " * 1_250_000

# By dataset and content: the rows, None for a bad one.
READ_ON: dict[str, tuple[str, bytes, list[str | None]]] = {
    "half a line at the end": ("json", LINES + b'{"text": "ha', [*GOOD, None]),
    "NUL bytes": ("json", LINES + b'{"text": "a\0b"}\n\0\0\0\n', [*GOOD, None, None]),
    "deep nesting": ("json", LINES + b"[" * 100_000 + b"\n" + b'{"text":' * 50_000 + b"\n", [*GOOD, None, None]),
    "arrays": ("json", LINES + b'["text"]\n[]\n[{"text": "x"}]\n', [*GOOD, None, None, None]),
    "numbers": ("json", LINES + b"1\n1e999\nNaN\n" + b"9" * 5000 + b'\n{"text": 1}\n', [*GOOD, *[None] * 5]),
    "null and words": ("json", LINES + b'null\ntrue\n"text"\n{"text": null}\n', [*GOOD, *[None] * 4]),
    "lone surrogates": ("json", LINES + b'{"text": "\\ud800"}\n{"text": "x\\ude00 y"}\n', [*GOOD, None, None]),
    "surrogate pair": ("json", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "no UTF-8": ("json", LINES + b'{"text": "caf\xe9"}\n', [*GOOD, None]),
    "a line of 5 MB": ("json", b"{}\n" + json.dumps({"text": LONG}).encode() + b"\n", [None, LONG]),
    "BOM": ("json", b"\xef\xbb\xbf" + LINES + b"{}\n", [*GOOD, None]),
    "CRLF": ("json", (LINES + b"{}\n").replace(b"\n", b"\r\n"), [*GOOD, None]),
    "key twice": ("json", b'{"text": "a", "text": "b"}\n{"text": "a", "text": 1}\n', ["b", None]),
    "different keys": ("json", LINES + b'{"id": 1}\n{"id": "x", "text": "last"}\n', [*GOOD, None, "last"]),
    "gz of rows": ("json", gzip.compress(LINES + b"{}\n", mtime=0), [*GOOD, None]),
    "parquet without UTF-8": ("parquet", table(text=view_as_strings(b"ok", b"\xff\xfe", None, b" ")), ["ok", None, None, None]),
    "parquet of large strings": ("parquet", table(text=pa.array(["a", None], pa.large_string())), ["a", None]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "streaming"])
@pytest.mark.parametrize("case", READ_ON)
def test_bad_rows_are_counted_and_passed_over(
    folder: Path, capfd: pytest.CaptureFixture[str], case: str, streaming: bool
) -> None:
    dataset, content, rows = READ_ON[case]
    (folder / "data").write_bytes(content)
    main(run_options(folder, training__dataset=dataset, training__data_files=folder / "data", training__streaming=streaming))
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == STEPS
    assert metrics[-1]["bad_rows"] == count_bad_rows(rows, streaming)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "streaming"])
def test_bad_text_files_are_bad_rows(folder: Path, streaming: bool) -> None:
    contents = [b"", b" \n\t\n", GARBAGE, "UTF-16".encode("utf-16"), PARQUET, pickle.dumps("x"), b"\xef\xbb\xbfgood"]
    rows: list[str | None] = [*[None] * 6, "good"]
    for number, content in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(content)
    corpus = Training(dataset="text", data_files=f"{folder}/*.txt", streaming=streaming)
    source = open_source(corpus, "training")
    if isinstance(source, FileShards):
        assert [row for shard in range(source.num_shards) for row in source.read_shard(shard, 0)] == rows
    else:
        assert [source.read(index) for index in range(len(source))] == rows


NO_TEXT = "yields no usable text"
NO_OBJECTS = "all empty, not text or undecodable: the first rows are no JSON objects: check training.data_files = "
ONE_ARRAY = "is one JSON array: one JSON object a line is needed: write each element on a line of its own"
CHECK_FILES = "all empty, not text or undecodable: check training.data_files = "
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("text", b"", CHECK_FILES),
    "empty json": ("json", b"", "has no rows"),
    "empty parquet": ("parquet", b"", "cannot be loaded"),
    "white text": ("text", b" \n\t\n", CHECK_FILES),
    "white json": ("json", b" \n\t\n", NO_OBJECTS),
    "white parquet": ("parquet", b" \n\t\n", "cannot be loaded"),
    "garbage as text": ("text", GARBAGE, CHECK_FILES),
    "garbage as json": ("json", GARBAGE, NO_OBJECTS),
    "garbage as parquet": ("parquet", GARBAGE, "cannot be loaded"),
    "UTF-16": ("json", LINES.decode().encode("utf-16"), NO_TEXT),
    "parquet as json": ("json", PARQUET, NO_OBJECTS),
    "other keys": (
        "json",
        b'{}\n{"body": "x", "id": 1}\n{"i\\u0000": 2, "id": 3}\n',
        'all empty, not text or undecodable: training.text_column = "text" is no key of the first rows, '
        "which have: body, id, i\\x00; give the one that holds the text",
    ),
    "numbers under the key": ("json", b'{"id": 1}\n{"text": 1}\n', 'check what the rows hold as training.text_column = "text"'),
    "one array": ("json", b'[{"text": "a"}, {"text": "b"}]\n', ONE_ARRAY),
    "one array over lines": ("json", b'\xef\xbb\xbf\n [ \n{"text": "a"},\n{"text": "b"}\n]\n', ONE_ARRAY),
    "one array from the first line on": ("json", b'[{"text": "a"},\n {"text": "b"}]\n', ONE_ARRAY),
    "cut parquet": ("parquet", PARQUET[:-300], "cannot be loaded"),
    "half a parquet": ("parquet", PARQUET[: len(PARQUET) // 2], "cannot be loaded"),
    "overwritten parquet": ("parquet", PARQUET[:100] + bytes(2000) + PARQUET[2100:], "cannot be "),
    "other column": ("parquet", table(body=["x"], id=[1]), "which has: body (string), id (int64)"),
    "numbers for text": ("parquet", table(text=[1]), "is a column of int64, not of strings"),
    "nothing for text": ("parquet", table(text=pa.nulls(3)), "is a column of null, not of strings"),
    "no rows": ("parquet", table(text=pa.array([], pa.string())), "has no rows"),
    "no UTF-8 at all": ("parquet", table(text=view_as_strings(b"\xff", b"\xfe")), 'check column training.text_column = "text"'),
    "gz of parquet": ("parquet", gzip.compress(PARQUET, mtime=0), "cannot be loaded"),
    "zip of parquet": ("parquet", zipped(PARQUET), "cannot be loaded"),
    "cut gz": ("json", gzip.compress(LINES, mtime=0)[:-10], "Compressed file ended"),
    "no gz": ("text", b"\x1f\x8b broken", "cannot be "),
    "no zip": ("json", b"PK\x03\x04 broken", "not a zip file"),
    "zstandard": ("json", b"\x28\xb5\x2f\xfd broken", "ZSTD decompress failed"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "streaming"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_end_the_run_with_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], case: str, streaming: bool
) -> None:
    dataset, content, expected = BROKEN[case]
    (folder / "data").write_bytes(content)
    changes = {"training__dataset": dataset, "training__data_files": folder / "data", "training__streaming": streaming}
    expect_exit(capfd, folder, f'training.dataset = "{dataset}"', expected, **changes)


def test_files_that_are_none(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "directory").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "itself").symlink_to(folder / "itself")
    for name, dataset in itertools.product(["directory", "dangling", "itself", "nothing"], ["text", "json", "parquet"]):
        changes = {"training__dataset": dataset, "training__data_files": folder / name}
        expect_exit(capfd, folder, f'training.data_files: "{folder}/{name}" matches no file', **changes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("dataset", ["text", "json", "parquet"])
def test_files_that_may_not_be_read(folder: Path, capfd: pytest.CaptureFixture[str], dataset: str) -> None:
    (folder / "data").write_bytes(LINES)
    (folder / "data").chmod(0)
    changes = {"training__dataset": dataset, "training__data_files": folder / "data"}
    expect_exit(capfd, folder, f'training.dataset = "{dataset}" cannot be loaded', "Permission denied", **changes)


def test_parquet_files_of_different_columns(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "a.parquet").write_bytes(table(text=["a"]))
    (folder / "b.parquet").write_bytes(table(body=["b"]))
    changes = {"training__dataset": "parquet", "training__data_files": folder / "*.parquet"}
    line = ['training.text_column = "text" is not a column of training.dataset = "parquet"', f'("{folder}/b.parquet")']
    expect_exit(capfd, folder, *line, **changes)
    changes |= {"training__streaming": True, "training__num_streams": 2}
    expect_exit(capfd, folder, *line, **changes)


@pytest.mark.parametrize(
    ("dataset", "workers"), [("json", 0), ("parquet", 0), pytest.param("parquet", 1, marks=pytest.mark.slow)]
)
def test_a_shard_that_breaks_during_training(folder: Path, capfd: pytest.CaptureFixture[str], dataset: str, workers: int) -> None:
    """The first rows of each shard are good, so that training begins."""
    texts = [f"{row * 7919**3:x}" for row in range(5000)]
    for name in ("a", "b"):
        if dataset == "json":
            lines = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
            content = gzip.compress(lines, mtime=0)[: 30_000 if name == "b" else None]
        else:
            buffer = io.BytesIO()
            pq.write_table(pa.table({"text": texts}), buffer, row_group_size=1000, compression="snappy")
            content = buffer.getvalue()
            if name == "b":
                middle = len(content) // 2
                content = content[:middle] + bytes(2000) + content[middle + 2000 :]
        (folder / name).write_bytes(content)
    changes = {"training__dataset": dataset, "training__data_files": f"{folder}/a, {folder}/b", "training__streaming": True}
    changes |= {"training__num_streams": 2, "training__num_workers": workers, "training__steps": 500}
    changes |= {"training__seq_len": 2048, "metrics__log_freq": 1, "checkpoint__enable_checkpoint": True}
    expect_exit(capfd, folder, f'training.dataset = "{dataset}": shard 1 of 2 cannot be read after row ', **changes)
    steps = (folder / "run" / "metrics.jsonl").read_text().count("\n")
    assert steps >= 1, "training went on until then"
    assert [path.name for path in list_checkpoints(folder / "run" / "checkpoint")][-1:] == [f"step-{steps}"], "nothing is lost"


# ---------------------------------------------------------------- code


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "streaming"])
def test_data_are_never_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    marker, content = folder / "marker", pickle.dumps(Payload(folder / "marker"))
    pickle.loads(content)
    assert marker.exists(), "the payload works"
    marker.unlink()
    place = folder / "place"
    place.mkdir()
    for name in ("train.pkl", "train.pt"):
        (place / name).write_bytes(content)
    monkeypatch.chdir(place)
    for name in ("train.pkl", "train.pt"):
        for dataset in ("text", "json", "parquet"):
            try:
                source = open_source(Training(dataset=dataset, data_files=name, streaming=streaming), "training")
            except UserError as error:
                assert dataset == "parquet"
                expect_one_line(error, "cannot be loaded")
                continue
            rows = source.read_shard(0, 0) if isinstance(source, FileShards) else map(source.read, range(len(source)))
            assert set(rows) == {None}
    for dataset in ("pandas", str(place), "."):
        with pytest.raises(UserError) as caught:
            open_source(Training(dataset=dataset, streaming=streaming), "training")
        expect_one_line(caught.value, f'training.dataset = "{dataset}"')
    assert not marker.exists()


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked on the terminal, which nobody answers."""
    asked: list[str] = []

    def ask(prompt: str = "") -> str:
        asked.append(prompt)
        raise EOFError

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return asked


def write_model_with_code(folder: Path, model_type: str) -> Path:
    """A model folder whose code touches a file when it is imported. Returns that file."""
    marker, name = folder / "marker", f"Code{model_type.title()}"
    (folder / "model" / "its_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(marker)!r}).touch()\n"
        f"class {name}Config(LlamaConfig):\n    model_type = {model_type!r}\n"
        f"class {name}Model(LlamaForCausalLM):\n    config_class = {name}Config\n"
    )
    settings = tiny_llama(vocab_size=264).to_dict() | {"model_type": model_type}
    settings["auto_map"] = {"AutoConfig": f"its_code.{name}Config", "AutoModelForCausalLM": f"its_code.{name}Model"}
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    return marker


def test_code_of_an_unknown_model_runs_only_if_trusted(
    folder: Path, capfd: pytest.CaptureFixture[str], questions: list[str]
) -> None:
    marker = write_model_with_code(folder, "unheard")
    with pytest.raises(UserError) as caught:
        load_model_config(str(folder / "model"))
    expect_one_line(caught.value, "model.config", "set model.trust_remote_code = true to run it, if you trust it")
    assert not marker.exists() and not questions

    changes = {"model__trust_remote_code": True, "checkpoint__enable_checkpoint": True}
    expect_exit(capfd, folder, "checkpoint.export_hf = true", "set it to false", **changes)
    main(run_options(folder, **changes, checkpoint__export_hf=False))
    assert marker.exists() and not questions
    main(run_options(folder, **changes, checkpoint__export_hf=False, training__steps=STEPS + 1))
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3], "a checkpoint of such a model is resumed"


def test_code_of_a_known_model_is_ignored_unless_trusted(folder: Path, questions: list[str]) -> None:
    """transformers has a Llama of its own."""
    marker = write_model_with_code(folder, "llama")
    main(run_options(folder, checkpoint__enable_checkpoint=True))
    assert not marker.exists() and not questions
    assert "auto_map" not in json.loads((folder / "run" / "hf" / "config.json").read_text())
    model = build_on_meta(load_model_config(str(folder / "model"), trust_remote_code=True), "cpu", "sdpa")
    assert marker.exists() and type(model).__name__ == "CodeLlamaModel" and not questions


def test_code_of_a_model_that_fails_is_one_line(folder: Path, questions: list[str]) -> None:
    write_model_with_code(folder, "failing")
    code = folder / "model" / "its_code.py"
    code.write_text(code.read_text() + "    def __init__(self, config):\n        raise SyntaxWarning('a\\nb')\n")
    with pytest.raises(UserError) as caught:
        build_on_meta(load_model_config(str(folder / "model"), trust_remote_code=True), "cpu", "sdpa")
    expect_one_line(caught.value, "model.config", "SyntaxWarning: a b")
    code.write_text("raise KeyError('c\\nd')")
    with pytest.raises(UserError) as caught:
        load_model_config(str(folder / "model"), trust_remote_code=True)
    expect_one_line(caught.value, "model.config", "cannot be loaded")


@pytest.mark.parametrize("tokenizer_class", ["CodeTokenizer", "PreTrainedTokenizerFast"])
def test_code_of_a_tokenizer_runs_only_if_trusted(tmp_path: Path, questions: list[str], tokenizer_class: str) -> None:
    place, marker = tmp_path / "tokenizer", tmp_path / "marker"
    build_bytes_tokenizer().save_pretrained(place)
    (place / "its_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(marker)!r}).touch()\n"
        "class CodeTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": [None, "its_code.CodeTokenizer"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    if tokenizer_class == "CodeTokenizer":
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(place))
        expect_one_line(caught.value, "model.tokenizer_path", "set model.trust_remote_code = true to run it, if you trust it")
    else:
        assert len(load_tokenizer(str(place))) == 258
    assert not marker.exists() and not questions
    assert type(load_tokenizer(str(place), trust_remote_code=True)).__name__ == "CodeTokenizer"
    assert marker.exists() and not questions
