"""`flame-preprocess`: what it writes, that it survives being killed at any moment, and mistakes in its options."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from flame.cli import preprocess
from flame.data import span_encoder, token_folder_writer
from flame.data.encoding import encode_document
from flame.data.sources.token_folder import open_token_folder
from flame.data.token_folder_writer import TokenFolderWriter
from flame.data.tokenizer import load_tokenizer
from tests.support.paths import REPO
from tests.support.tokenizers import make_bpe

BYTES = load_tokenizer("bytes")
FORK = multiprocessing.get_context("fork")
TEXTS: list[str | None] = [
    "é\r\n x",
    None,
    "<|endoftext|>",
    "\u2028 \x00",
    "a" * 5000,
    None,
    *(f"text {i} " * (i % 7 + 1) for i in range(60)),
]


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the forks made here
    monkeypatch.setattr(token_folder_writer, "SECONDS_BETWEEN_COMMITS", 0.0)
    monkeypatch.setattr(span_encoder, "LONGEST_SPAN", 3)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


def write_corpus(path: Path, rows: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in rows))
    return path


def options(corpus: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "out": out,
        "tokenizer_path": "bytes",
        "dataset": "json",
        "data_files": corpus,
        "text_column": "body",
        "num_workers": 0,
    } | changes
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expect_refusal(capsys: pytest.CaptureFixture[str], argv: list[str], *parts: str) -> None:
    try:
        code: object = preprocess.main(argv)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    for part in parts:
        assert part in captured.err


def test_documents_are_those_of_encode_document(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder" / "tokens"
    preprocess.main(options(corpus, out))
    expected = [encode_document(BYTES, text).tolist() for text in TEXTS if text is not None]
    folder = open_token_folder(str(out), "option", "name", BYTES)
    assert [folder.read(index).tolist() for index in range(len(folder))] == expected
    assert sorted(read_files(out)) == ["manifest.json", "offsets.bin", "tokens.bin"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["documents"] == 64 and manifest["bad_rows"] == 2 and manifest["tokens"] == sum(map(len, expected))
    assert (manifest["tokenizer"], manifest["eos_id"], manifest["vocabulary_size"]) == ("bytes", 256, 258)
    assert (manifest["dataset"], manifest["data_files"], manifest["text_column"]) == ("json", str(corpus), "body")
    captured = capsys.readouterr()
    assert "64 documents" in captured.out and "2 bad rows" in captured.out and "tokens/s" in captured.out
    assert f"--training.dataset tokens --training.data_files '{out}'" in captured.out
    assert captured.err == ""


def test_large_vocabularies_take_four_bytes(corpus: Path, tmp_path: Path) -> None:
    tokenizer = make_bpe(unused=1 << 16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    preprocess.main(options(corpus, tmp_path / "out", tokenizer_path=tmp_path / "tokenizer"))
    folder = open_token_folder(str(tmp_path / "out"), "option", "name", load_tokenizer(str(tmp_path / "tokenizer")))
    good = [text for text in TEXTS if text is not None]
    documents = [folder.read(index) for index in range(len(folder))]
    assert documents[0].dtype == np.uint32 and min(ids.min() for ids in documents) >= 1 << 16
    assert [ids.tolist() for ids in documents] == [encode_document(tokenizer, text).tolist() for text in good]


@pytest.mark.parametrize("batch", [1, 20, 10**9])
@pytest.mark.parametrize("span", [1, 7, 1000])
def test_chunks_leave_no_trace(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, span: int) -> None:
    preprocess.main(options(corpus, tmp_path / "whole"))
    monkeypatch.setattr(span_encoder, "CHARACTERS_AT_ONCE", batch)
    monkeypatch.setattr(span_encoder, "LONGEST_SPAN", span)
    preprocess.main(options(corpus, tmp_path / "cut"))
    assert read_files(tmp_path / "whole") == read_files(tmp_path / "cut")


class Death:
    """Kills the process at the n-th of the calls that change files. It can lose what was not synced, as a power cut does."""

    def __init__(self, moment: int, loses_unsynced: bool):
        self.left, self.loses_unsynced = moment, loses_unsynced
        self.synced: dict[str, int] = {}
        self.calls: dict[str, Callable[..., Any]] = {
            name: getattr(os, name) for name in ("write", "fsync", "replace", "truncate")
        }
        for name in self.calls:
            setattr(os, name, lambda *args, name=name: self.call(name, *args))

    def call(self, name: str, *args: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            if name == "write":
                self.calls["write"](args[0], args[1][: len(args[1]) // 2])
            if self.loses_unsynced:
                file = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else ""
                if file.endswith(".tmp"):
                    self.calls["truncate"](args[0], os.fstat(args[0]).st_size // 2)
                for path, size in self.synced.items():
                    self.calls["truncate"](path, min(size, os.path.getsize(path)))
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.calls[name](*args)
        path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else ""
        if path.endswith(".bin"):
            if name == "fsync":
                self.synced[path] = os.path.getsize(path)
            else:
                self.synced.setdefault(path, 0 if name == "write" else os.path.getsize(path))
        return result


def run_forked(argv: list[str], prepare: Callable[[], object] = lambda: None) -> Any:
    """Start preprocess in a copy of this process, which spares the imports."""

    def run() -> None:
        prepare()
        sys.exit(preprocess.main(argv))

    process = FORK.Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("loses_unsynced", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_at_every_call_that_changes_files(tmp_path: Path, loses_unsynced: bool) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS[:9])
    preprocess.main(options(corpus, tmp_path / "whole"))
    expected = read_files(tmp_path / "whole")
    moment = 0
    while True:
        out = tmp_path / f"killed-{moment}"
        killed = run_forked(options(corpus, out), lambda moment=moment: Death(moment, loses_unsynced))
        killed.join()
        if killed.exitcode == 0:
            break
        assert killed.exitcode == -signal.SIGKILL
        if (out / "manifest.json").exists():
            assert {**read_files(out), "progress.json": b""} == {**expected, "progress.json": b""}, "complete when it says so"
        preprocess.main(options(corpus, out))
        assert read_files(out) == expected, f"killed at call {moment}"
        moment += 1
    assert moment > 20


def test_killed_again_and_again_goes_on_from_the_last_commit(corpus: Path, tmp_path: Path) -> None:
    """Other chunks each time. Without going on, no process would live long enough to finish."""
    preprocess.main(options(corpus, tmp_path / "whole"))
    chooser = random.Random(0)
    out = tmp_path / "out"

    def prepare(moment: int, span: int) -> None:
        span_encoder.LONGEST_SPAN = span
        Death(moment, loses_unsynced=True)

    kills = 0
    while kills < 100:
        moment, span = chooser.randint(10, 40), chooser.randint(1, 8)
        process = run_forked(options(corpus, out), lambda moment=moment, span=span: prepare(moment, span))
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
    assert 2 < kills < 100
    assert read_files(out) == read_files(tmp_path / "whole")


def wait_for_rows(out: Path, rows: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if json.loads((out / "progress.json").read_text())["rows"] >= rows:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    raise AssertionError("no progress")


def list_children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def wait_for_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [process for process in processes if is_alive(process)]:
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            raise AssertionError("a worker lives on")
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def slow_down() -> None:
    """Give a test the time to strike while rows are being written."""
    commit = TokenFolderWriter._commit

    def slow_commit(writer: TokenFolderWriter) -> None:
        time.sleep(0.02)
        commit(writer)

    TokenFolderWriter._commit = slow_commit  # type: ignore[method-assign]
    token_folder_writer.SECONDS_BETWEEN_COMMITS = 0.0
    span_encoder.LONGEST_SPAN = 1


def fork_workers() -> None:
    slow_down()
    multiprocessing.get_context = lambda method: FORK  # type: ignore[assignment]


def test_workers_end_with_a_killed_process(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = run_forked(options(corpus, out, num_workers=2), fork_workers)
    wait_for_rows(out, 5)
    workers = list_children(process.pid)
    assert len(workers) >= 2, "both workers and perhaps Python's resource tracker"
    process.kill()
    process.join()
    wait_for_end(workers)


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_workers_write_the_same(corpus: Path, tmp_path: Path) -> None:
    preprocess.main(options(corpus, tmp_path / "whole"))
    out = tmp_path / "out"
    # Tests that a script has started in the background ignore SIGINT, and what they start inherits that; a terminal's does not.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tests.cli.test_preprocess import preprocess, slow_down; slow_down(); sys.exit(preprocess.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *options(corpus, out, num_workers=1)]
    process = subprocess.Popen(command, cwd=REPO, stdout=-1, stderr=-1, text=True, start_new_session=True)
    wait_for_rows(out, 5)
    workers = list_children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    output = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ("", "interrupted: the same command goes on where this one stopped\n")
    wait_for_end(workers)
    assert 5 <= json.loads((out / "progress.json").read_text())["rows"] < len(TEXTS)
    preprocess.main(options(corpus, out))
    assert read_files(out) == read_files(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_other_options_are_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool) -> None:
    out = tmp_path / "out"
    if finished:
        preprocess.main(options(corpus, out))
    else:
        run_forked(options(corpus, out), lambda: Death(30, False)).join()
        assert (out / "progress.json").exists()
    capsys.readouterr()
    before = read_files(out)
    make_bpe().save_pretrained(tmp_path / "other")
    twin = write_corpus(tmp_path / "twin.jsonl", TEXTS)
    for changes, parts in (
        ({"tokenizer_path": tmp_path / "other"}, ["another tokenizer", '"bytes"']),
        ({"data_files": twin}, [f'--data_files "{corpus}", now "{twin}"']),
        ({"text_column": "text"}, ['--text_column "body", now "text"']),
        ({"data_files": twin, "text_column": "text"}, ["--data_files", "--text_column"]),
    ):
        expect_refusal(capsys, options(corpus, out, **changes), str(out), "give the same, or another --out", *parts)
    write_corpus(corpus, [*TEXTS, "more"])
    expect_refusal(capsys, options(corpus, out), f"{len(TEXTS)} rows of data, now {len(TEXTS) + 1}")
    assert read_files(out) == before


def test_finished_folders_are_left_alone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess.main(options(corpus, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    BYTES.save_pretrained(tmp_path / "same")
    capsys.readouterr()
    preprocess.main(options(corpus, tmp_path / "out", tokenizer_path=tmp_path / "same"))
    output = capsys.readouterr()
    assert "complete already: 64 documents" in output.out and "--training.dataset tokens" in output.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_no_usable_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    argv = options(corpus, tmp_path / "out", text_column="other")
    keys = '--text_column = "other" is no key of the first rows, which have: body;'
    expect_refusal(capsys, argv, "no usable text", f"{len(TEXTS)} rows read", keys)
    preprocess.main(options(corpus, tmp_path / "out"))


def test_wrong_options_are_one_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    expect_refusal(capsys, options(corpus, out, tokenizer_path="./none"), '--tokenizer_path = "./none"')
    expect_refusal(capsys, options(corpus, out, dataset="tokens"), '--dataset = "tokens"', "give text")
    expect_refusal(capsys, options(corpus, out, dataset="pathstar"), '--dataset = "pathstar"', "[pathstar]", "training runs only")
    expect_refusal(capsys, options(corpus, out, tokenizer_path="pathstar"), '--tokenizer_path = "pathstar"', "training runs only")
    expect_refusal(capsys, options(corpus, out, dataset="jsonl"), '--dataset = "jsonl"', 'did you mean "json"?')
    expect_refusal(capsys, options(corpus, out, data_files=tmp_path / "none"), "--data_files", "matches no file")
    expect_refusal(capsys, ["--out", str(out), "--tokenizer_path", "bytes", "--dataset", "text"], "--data_files")
    assert not out.exists()
    (tmp_path / "file").touch()
    expect_refusal(capsys, options(corpus, tmp_path / "file"), f'--out "{tmp_path / "file"}" names a file: give a folder\n')


def test_options_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert preprocess.main(options(tmp_path / "a.txt", tmp_path / "out", dataset="text", text_column="body")) == 0
    assert capsys.readouterr().err == "without effect: --text_column\n"


def test_a_source_of_ones_own_is_read_by_workers(tmp_path: Path) -> None:
    (tmp_path / "own_poems.py").write_text(
        "from flame.data.sources.base import SourceKind\n\n\n"
        "class Rows:\n    def __len__(self):\n        return 9\n\n"
        "    def read(self, index):\n        return f'poem {index}'\n\n\n"
        "class Poems(SourceKind):\n    name = 'poems'\n\n    def open(self):\n        return Rows()\n"
    )
    argv = ["--out", str(tmp_path / "out"), "--tokenizer_path", "bytes", "--dataset", str(tmp_path / "own_poems.py")]
    assert preprocess.main([*argv, "--num_workers", "1"]) == 0
    folder = open_token_folder(str(tmp_path / "out"), "option", "name", BYTES)
    assert [BYTES.decode(folder.read(index)[:-1]) for index in range(len(folder))] == [f"poem {index}" for index in range(9)]


def test_rows_with_an_open_file_are_not_shared_by_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open_lines.py").write_text(
        "from flame.data.sources.base import SourceKind\n\n\n"
        "class Lines:\n    def __init__(self):\n        self.file = open(__file__)\n\n"
        "    def __len__(self):\n        return 3\n\n"
        "    def read(self, index):\n        return self.file.readline()\n\n\n"
        "class OpenLines(SourceKind):\n    name = 'lines'\n\n    def open(self):\n        return Lines()\n"
    )
    argv = ["--out", str(tmp_path / "out"), "--tokenizer_path", "bytes", "--dataset", str(tmp_path / "open_lines.py")]
    expect_refusal(capsys, [*argv, "--num_workers", "2"], "cannot be sent to worker processes", "--num_workers 0")
    assert preprocess.main([*argv, "--num_workers", "0"]) == 0


def test_files_of_others_are_not_overwritten(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens.bin").write_bytes(b"precious")
    expect_refusal(capsys, options(corpus, tmp_path / "out"), "tokens.bin", "another --out")
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == b"precious"


def test_damaged_progress_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run_forked(options(corpus, out), lambda: Death(60, False)).join()
    whole = read_files(out)
    (out / "tokens.bin").write_bytes(whole["tokens.bin"][:10])
    expect_refusal(capsys, options(corpus, out), "tokens.bin", "shorter", "start over")
    (out / "tokens.bin").write_bytes(whole["tokens.bin"])
    (out / "progress.json").write_text("{")
    expect_refusal(capsys, options(corpus, out), "progress.json", "damaged")


def test_one_process_at_a_time(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    process = run_forked(options(corpus, out), slow_down)
    wait_for_rows(out, 3)
    expect_refusal(capsys, options(corpus, out), f'another process is writing --out "{out}"')
    process.kill()
    process.join()
    preprocess.main(options(corpus, out))


def test_a_full_disk_is_one_line_and_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess.main(options(corpus, tmp_path / "whole"))
    capsys.readouterr()
    write, bucket = os.write, 6000

    def write_while_there_is_room(file: int, content: memoryview) -> int:
        nonlocal bucket
        if not bucket:
            raise OSError(28, "No space left on device")
        written = write(file, content[:bucket])
        bucket -= written
        return written

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_while_there_is_room)
        expect_refusal(capsys, options(corpus, out), f'cannot write to --out "{out}" (No space left on device)', "same command")
    preprocess.main(options(corpus, out))
    assert read_files(out) == read_files(tmp_path / "whole")


def test_json_lines_need_neither_torch_nor_datasets(corpus: Path, tmp_path: Path) -> None:
    """They take longer to load than a small corpus takes."""
    make_bpe().save_pretrained(tmp_path / "tokenizer")
    argv = options(corpus, tmp_path / "out", tokenizer_path=tmp_path / "tokenizer", num_workers=1)
    program = (
        f"import sys; from flame.cli.preprocess import main; main({argv}); print({{'torch', 'datasets'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_spans_are_short_where_rows_are_long() -> None:
    """Workers finish together, and a span fits in memory."""
    plan = [list(span_encoder.plan_spans(5, 1_000_005, 2, mean)) for mean in (0.0, 1e3, 1e9)]
    for spans in plan:
        assert [span.start for span in spans] == [5, *(span.stop for span in spans[:-1])] and spans[-1].stop == 1_000_005
    assert [spans[0].stop - spans[0].start for spans in plan] == [3, 3, 1]


class OneLong:
    """Stands for a `SpanEncoder`: row 0 is through when the next 40 are. Names of files say which rows are."""

    def __init__(self, done: Path):
        self.done = done

    def check_rows(self) -> None: ...

    def reopen_rows(self) -> None: ...

    def encode(self, span: span_encoder.Span) -> span_encoder.EncodedSpan:
        until = time.monotonic() + 10
        while span.start == 0 and len(list(self.done.iterdir())) < 40 and time.monotonic() < until:
            time.sleep(0.01)
        (self.done / str(span.start)).touch()
        none = np.empty(0, np.int64)
        return span_encoder.EncodedSpan(np.array([span.start]), none, int(time.monotonic() > until), none)


def test_workers_go_on_beside_a_long_row_and_order_stays(tmp_path: Path) -> None:
    spans = [span_encoder.Span(row, row + 1) for row in range(100)]
    found = list(span_encoder.encode_in_order(OneLong(tmp_path), spans, 2))  # type: ignore[arg-type]
    assert [(span, encoded.tokens.item()) for span, encoded in found] == [(span, span.start) for span in spans]
    assert not found[0][1].bad_rows, "the others stood still"


def test_a_cluster_of_long_rows_has_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain loop gives each span to the worker that is free first."""
    monkeypatch.setattr(span_encoder, "LONGEST_SPAN", 4096)
    lengths = np.full(2000, 10_000)
    lengths[1900:1920] = 200_000  # as the Python files of some packages
    free = [0] * 16
    for span in span_encoder.plan_spans(0, len(lengths), 16, lengths.mean()):
        free[free.index(min(free))] += int(lengths[span.start : span.stop].sum())
    assert max(free) < 1.4 * lengths.sum() / 16
