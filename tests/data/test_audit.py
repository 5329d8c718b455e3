"""The account of what was trained on, over kills and changed numbers of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.checkpoints.manager import TRAINER_FILE, list_checkpoints
from flame.cli.audit import count_tokens, list_gaps
from flame.cli.audit import main as check
from flame.data import audit
from flame.data.audit import read_audit
from tests.support.paths import REPO
from tests.support.runs import SEQ_LEN, fork_ranks, options, run_here

CHANGES = {
    "training__audit": True,
    "training__num_streams": 12,
    "training__gradient_accumulation_steps": 1,
    "checkpoint__interval": 2,
    "metrics__log_freq": 1,
}


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.booleans()), min_size=1, max_size=8))
def test_accounts_against_a_list_of_tokens(ranges: list[tuple[int, int, bool]]) -> None:
    lines = [
        {"step": 1, "sequence": 0, "source": "a", "trained": trained, "pieces": [[7, start, start + length, 0, False]]}
        for start, length, trained in ranges
    ]
    (token_count,) = count_tokens(lines).values()
    times: dict[int, int] = defaultdict(int)
    touched, left_out = set(), 0
    for start, length, trained in ranges:
        touched |= set(range(start, start + length))
        for token in range(start, start + length):
            times[token] += trained
        left_out += 0 if trained else length
    assert (token_count.documents, token_count.unfinished) == (1, 1)
    assert token_count.tokens == sum(times.values())
    assert token_count.left_out == left_out
    assert token_count.missing == len(set(range(max(touched) + 1)) - touched)
    if all(trained for *_, trained in ranges):
        assert token_count.repeated == sum(count - 1 for count in times.values() if count > 1)


def kill_after_step(ranks: int, workspace: Path, run: Path, step: int, **changes: object) -> None:
    """Start the run, and kill all its processes once it has logged a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "flame.train"]
    process = subprocess.Popen(
        [*command, *options(workspace, run, **changes)], cwd=REPO, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not any(row["step"] >= step for row in read_metrics_so_far(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_metrics_so_far(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 2), pytest.param((1, 4, 2, 3), marks=pytest.mark.long)], ids=str)
def test_every_token_once_over_kills_and_changed_ranks(workspace, tmp_path, capsys, ranks):
    """Each start but the last is killed between two checkpoints. The last goes on until epoch 0 is over everywhere."""
    run = tmp_path / "run"
    *killed, last = ranks
    for number, count in enumerate(killed):
        kill_after_step(count, workspace, run, 3 + 7 * number, **CHANGES, training__steps=1000)
    resumed = json.loads((list_checkpoints(run / "checkpoint")[-1] / TRAINER_FILE).read_text())["step"]
    assert resumed >= 2 + 7 * (len(killed) - 1)
    fork_ranks(last, workspace, run, **CHANGES, training__steps=resumed + 240 // last)

    documents = [json.loads(line)["text"] for line in (workspace / "corpus.jsonl").read_text().splitlines()]
    lengths = {document: len(text.encode()) + 1 for document, text in enumerate(documents)}
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    sequences = []
    for line in read_audit(run):
        assert line["source"] == "json" and line["trained"]
        sequences.append(line["sequence"])
        for document, start, end, epoch, _ in line["pieces"]:
            seen[epoch, document].extend(range(start, end))
    assert sorted(sequences) == list(range(len(sequences))), "each packed sequence was trained on once"
    assert {document: sorted(tokens) for (epoch, document), tokens in seen.items() if epoch == 0} == {
        document: list(range(length)) for document, length in lengths.items()
    }
    assert all(len(tokens) == len(set(tokens)) for tokens in seen.values())

    assert check([str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert f"| json | 0 | {len(documents)} | {sum(lengths.values())} | 0 | 0 | 0 | 0 | 0 |" in out
    assert out[-1] == "0 documents not seen in finished epochs; 0 bad rows passed over in all"


def test_a_token_trained_on_twice_is_found(workspace, tmp_path, capsys):
    run = tmp_path / "run"
    run_here(workspace, run, **CHANGES, training__steps=4)
    path = run / "audit" / "rank-00000.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    assert check([str(run)]) == 1
    assert f"| {SEQ_LEN} | 0 | 0 |" in capsys.readouterr().out


def test_what_a_crash_left_is_passed_over(workspace, tmp_path, capsys):
    run = tmp_path / "run"
    run_here(workspace, run, **CHANGES, training__steps=4)
    capsys.readouterr()
    assert check([str(run)]) == 0
    expected = capsys.readouterr()
    torn = run / "checkpoint" / "step-6.partial"
    for file in (None, TRAINER_FILE):
        torn.mkdir(exist_ok=True)
        if file is not None:
            (torn / file).write_text('{"step": 6')
        assert check([str(run)]) == 0
        assert capsys.readouterr() == expected


@pytest.mark.parametrize("damage", ["cut short", "file missing"])
def test_a_damaged_checkpoint_is_one_line(workspace, tmp_path, capsys, damage):
    run = tmp_path / "run"
    run_here(workspace, run, **CHANGES, training__steps=2)
    capsys.readouterr()
    newest = list_checkpoints(run / "checkpoint")[-1]
    if damage == "cut short":
        (newest / TRAINER_FILE).write_text('{"step": 2')
    else:
        next(newest.glob("*.distcp")).unlink()
    assert check([str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'checkpoint "{newest}" is damaged: ')


def test_steps_without_audit_are_told(workspace, tmp_path, capsys):
    run = tmp_path / "run"
    told = "steps not audited: "
    for audit_now, steps, line in ((True, 2, None), (False, 4, "3-4"), (True, 6, "3-4"), (False, 7, "3-4, 7")):
        run_here(workspace, run, **CHANGES | {"training__audit": audit_now, "training__steps": steps})
        capsys.readouterr()
        assert check([str(run)]) == int(line is not None), steps
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"{told}{line} (") if line else not last.startswith(told), last


@given(st.sets(st.integers(1, 12), min_size=1), st.integers(0, 14))
def test_gaps_against_a_list_of_steps(steps: set[int], further: int) -> None:
    last = max(steps) + further
    missing = set()
    for gap in list_gaps(steps, last):
        first, _, end = gap.partition("-")
        missing |= set(range(int(first), int(end or first) + 1))
    assert missing == set(range(1, last + 1)) - steps


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "sour', b'{"step": 2'])
def test_lines_of_later_steps_are_cut_off(tmp_path, monkeypatch, block, torn):
    monkeypatch.setattr(audit, "BLOCK", block)
    (tmp_path / "audit").mkdir()
    path = tmp_path / "audit" / "rank-00003.jsonl"
    lines = [b'{"step": %d, "sequence": %d}\n' % (step, sequence) for step in range(1, 7) for sequence in range(3)]
    for step in (0, 1, 4, 6, 9):
        path.write_bytes(b"".join(lines) + torn)
        audit.drop_audit_after(tmp_path, step)
        assert path.read_bytes() == b"".join(lines[: 3 * step]), (step, block)


def test_a_folder_without_audit_is_one_line(tmp_path, capsys):
    assert check([str(tmp_path)]) == 2
    assert "holds no audit" in capsys.readouterr().err
