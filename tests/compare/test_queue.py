"""The queue with stand-ins for the trainer: real processes, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flame.compare import command
from flame.compare.devices import Slot, list_slots
from flame.compare.metrics import Metric
from flame.compare.outcomes import COMPLETE, FAILED, STOPPED, UNFINISHED, read_outcome
from flame.compare.queue import LOCK_FILE, Active, RunQueue, try_lock
from flame.compare.runs import Run, check_folders, read_record, write_record
from flame.compare.spec import CONFIG_KEY, Budget, Spec
from flame.errors import UserError
from tests.support.comparisons import build_stand_in, make_run, write_result, write_spec
from tests.support.paths import REPO
from tests.support.refusals import expect_one_line

TWO_SLOTS = [Slot((), 1), Slot((), 1)]


def count_starts(run: Run) -> int:
    path = run.folder / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count_done(run: Run) -> int:
    path = run.folder / "progress"
    return int(path.read_text()) if path.exists() else 0


def test_runs_are_made_once_and_a_failure_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture):
    runs = [make_run(tmp_path, "broken", 3), *(make_run(tmp_path, "quick", 3, seed) for seed in (1, 2, 3))]
    assert RunQueue(runs, TWO_SLOTS, build_stand_in).make()
    assert [read_outcome(run.folder).state for run in runs] == [FAILED, COMPLETE, COMPLETE, COMPLETE]
    assert read_outcome(runs[0].folder).line == "exit code 3: it broke here"
    assert "3/broken/seed 1: failed" in capsys.readouterr().out
    assert RunQueue(runs, TWO_SLOTS, build_stand_in).make()
    assert [count_starts(run) for run in runs] == [2, 1, 1, 1]  # what has failed is tried again


def test_a_killed_run_goes_on_and_at_last_counts_as_failed(tmp_path: Path):
    run, cursed = make_run(tmp_path, "quick", 40), make_run(tmp_path, "cursed", 10_000)
    killed: list[int] = []

    class Killing(RunQueue):
        def _start(self, run: Run, slot: Slot) -> bool:
            started = super()._start(run, slot)
            process = self._active[-1].process
            if run.arm == "cursed" or not killed:
                before = count_done(run)
                wait_until(lambda: count_done(run) > before + 2)
                killed.append(count_done(run))
                process.kill()
            return started

    assert Killing([run], TWO_SLOTS, build_stand_in).make()
    assert read_outcome(run.folder).state == COMPLETE and count_starts(run) == 2
    assert count_done(run) == 40 and len((run.folder / "metrics.jsonl").read_text().splitlines()) <= 40 + 1
    assert Killing([cursed], TWO_SLOTS, build_stand_in).make()
    assert read_outcome(cursed.folder).state == FAILED and count_starts(cursed) == 3
    assert "exit code -9" in read_outcome(cursed.folder).line


START_QUEUE = """
import sys
from pathlib import Path
from flame.compare.devices import Slot
from flame.compare.queue import RunQueue
from tests.support.comparisons import build_stand_in, make_run
runs = [make_run(Path(sys.argv[1]), "quick", 400, seed) for seed in (1, 2, 3)]
sys.exit(0 if RunQueue(runs, [Slot((), 1)] * 2, build_stand_in).make() else 75)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda stop: stop.name)
def test_runs_save_and_end_with_their_queue(tmp_path: Path, stop: signal.Signals):
    runs = [make_run(tmp_path, "quick", 400, seed) for seed in (1, 2, 3)]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    queue = subprocess.Popen([sys.executable, "-c", START_QUEUE, tmp_path], env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: all(count_done(run) > 2 for run in runs[:2]))
    queue.send_signal(stop)
    assert queue.wait(30) == (-9 if stop == signal.SIGKILL else 75)
    pids = [int((run.folder / "starts").read_text()) for run in runs[:2]]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    done = [count_done(run) for run in runs]
    assert all(2 < count < 400 for count in done[:2]) and done[2] == 0
    assert {read_outcome(run.folder).state for run in runs} == {UNFINISHED}
    short = [replace(run, task=str(count + 5)) for run, count in zip(runs, done, strict=True)]
    assert RunQueue(short, TWO_SLOTS, build_stand_in).make()
    assert [count_done(run) for run in runs] == [count + 5 for count in done]  # each went on where it was
    assert [count_starts(run) for run in runs] == [2, 2, 1]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_ends_once_it_has_reached_what_it_is_run_for(tmp_path: Path):
    run = replace(make_run(tmp_path, "quick", 10_000), stops=(Metric("validation_exact_match", True, stop_at=0.1),))
    assert RunQueue([run], TWO_SLOTS, build_stand_in).make()
    assert read_outcome(run.folder).state == STOPPED and 10 <= count_done(run) < 10_000
    assert RunQueue([run], TWO_SLOTS, build_stand_in).make() and count_starts(run) == 1


def test_other_stops_make_a_run_stale(tmp_path: Path):
    lower, higher = Metric("loss", False, stop_at=1.5), Metric("exact_match", True, stop_at=0.9)
    run = replace(make_run(tmp_path, "quick", 1), stops=(lower, higher))
    write_record(run)
    check_folders([run, replace(run, stops=(higher, replace(lower, goal=0.1)))])
    for stops, now in (((lower,), "loss <= 1.5"), ((lower, replace(higher, stop_at=0.8)), "exact_match >= 0.8, loss <= 1.5")):
        with pytest.raises(UserError) as caught:
            check_folders([replace(run, stops=stops)])
        expect_one_line(caught.value, f"stop_at of exact_match >= 0.9, loss <= 1.5 (now {now})")


SLOW_START = "import time; time.sleep(1.5)\n"


def write_rows(folder: Path, steps: int) -> None:
    """What a stand-in has written in so many steps."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "validation_exact_match": step / 100} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_cut_off_after_it_had_reached_its_stop_goes_on(tmp_path: Path):
    """It has rows that no checkpoint holds. A signal would kill it before it listens."""
    run = replace(make_run(tmp_path, "quick", 10_000), stops=(Metric("validation_exact_match", True, stop_at=0.1),))
    write_rows(run.folder, 12)

    def build_slow(run: Run) -> list[str]:
        *words, source, folder, arm, task = build_stand_in(run)
        return [*words, SLOW_START + source, folder, arm, task]

    assert RunQueue([run], TWO_SLOTS, build_slow).make()
    assert read_outcome(run.folder).state == STOPPED and count_starts(run) == 1


@pytest.mark.parametrize(("checkpoint", "starts"), [(9, 1), (10, 0), (11, 0)])
def test_a_run_that_was_saved_once_it_had_reached_its_stop_is_done(tmp_path: Path, checkpoint: int, starts: int):
    run = replace(make_run(tmp_path, "quick", 10_000), stops=(Metric("validation_exact_match", True, stop_at=0.1),))
    write_rows(run.folder, 12)
    for step in (3, checkpoint):
        (folder := run.folder / f"checkpoint/step-{step}").mkdir(parents=True)
        for name in (".metadata", "trainer.json"):
            (folder / name).touch()
    (run.folder / "checkpoint/step-12").mkdir()  # cut off while it was written
    assert RunQueue([run], TWO_SLOTS, build_stand_in).make()
    assert read_outcome(run.folder).state == STOPPED and count_starts(run) == starts


def test_all_parts_of_a_metric_must_be_reached():
    metric = Metric("validation_exact_match", True, stop_at=0.9)
    rows = [
        {"validation_exact_match": 0.9, "validation_exact_match/3x3": 0.99, "validation_exact_match/5x5": 0.81},
        {"loss": 1.0},
    ]
    assert not metric.should_stop(rows) and metric.should_stop([*rows, dict.fromkeys(rows[0], 0.95)])
    assert Metric("validation_ce_loss", False, stop_at=1.0).should_stop([{"validation_ce_loss": 0.9}])
    assert not Metric("future/top1", True, stop_at=0.5).should_stop([{"future/top1": 0.4, "future/top1_same_document": 0.9}])
    assert not Metric("validation_ce_loss", False, stop_at=1.0).should_stop([{"validation_ce_loss": float("nan")}])


def test_two_queues_share_the_work(tmp_path: Path):
    """What another process is at is left to it. The lock ends with that process."""
    runs = [make_run(tmp_path, "quick", 2, seed) for seed in (1, 2)]
    runs[0].folder.mkdir(parents=True)
    hold = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.lockf(lock, fcntl.LOCK_EX); print('held', flush=True)"
    command = [sys.executable, "-S", "-c", f"{hold}; input()", runs[0].folder / LOCK_FILE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert try_lock(runs[0].folder / LOCK_FILE) is None
        assert RunQueue(runs, TWO_SLOTS, build_stand_in).make()
        assert [count_starts(run) for run in runs] == [0, 1]
        other.kill()
    assert RunQueue(runs, TWO_SLOTS, build_stand_in).make() and count_starts(runs[0]) == 1


def test_a_stale_run_is_named_and_not_mixed(tmp_path: Path):
    run = make_run(tmp_path, "quick", 1)
    run = replace(run, options=run.options | {"training.num_streams": 2})
    assert RunQueue([run], TWO_SLOTS, build_stand_in).make()
    check_folders([run, replace(run, folder=tmp_path / "new")])
    changed = replace(run, options=run.options | {"optimizer.lr": 0.5, "mtp.tokens": 3})
    for other, part in (
        (changed, "optimizer.lr = 0.003 (now 0.5)"),
        (replace(run, budget=Budget("tokens", 2000)), "a budget of 1,000 tokens (now 2,000 tokens)"),
        (replace(run, budget=Budget("seconds", 1000)), "(now 1,000 seconds"),
        (replace(run, processes=2), "1 processes (now 2)"),
        (replace(run, stops=(Metric("loss", False, stop_at=0.5),)), "stop_at of nothing (now loss <= 0.5)"),
    ):
        with pytest.raises(UserError) as caught:
            check_folders([other])
        expect_one_line(caught.value, str(run.folder), "stale", part, "choose another compare.out")
    (run.folder / "compare.json").unlink()
    (run.folder / "config.toml").write_text("")
    with pytest.raises(UserError) as caught:
        check_folders([run])
    expect_one_line(caught.value, "not of a comparison")


def test_a_run_is_stale_once_a_file_that_it_names_has_another_content(tmp_path: Path):
    model = tmp_path / "model.json"
    model.write_text(text := (REPO / "configs/models/pathstar_cpu.json").read_text())
    run = make_run(tmp_path, "quick", 1)
    run = replace(run, options=run.options | {"model.config": str(model)})
    write_record(run)
    check_folders([run])
    model.write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        check_folders([run])
    expect_one_line(caught.value, f"stale run, with another content of model.config = {model}: remove it")
    record = read_record(run.folder) or {}
    del record["files"]  # as an earlier version wrote it
    (run.folder / "compare.json").write_text(json.dumps(record))
    check_folders([run])


@pytest.mark.parametrize(
    ("new", "told"), [("lr = 0.5", "optimizer.lr = 0.003 (now 0.5)"), ("learning = 1", "optimizer.learning = 1")]
)
def test_a_run_that_changes_while_the_queue_works_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, new: str, told: str):
    """Each trainer reads the configuration file at its own start."""
    file = tmp_path / "run.toml"
    before = (REPO / "configs/pathstar_cpu.toml").read_text()
    file.write_text(before)
    runs = [make_run(tmp_path, "quick", 1, seed) for seed in (1, 2)]
    runs = [replace(run, options=run.options | {CONFIG_KEY: str(file)}) for run in runs]

    class Changing(RunQueue):
        def _finish(self, active: Active) -> None:
            super()._finish(active)
            file.write_text(before.replace("lr = 3e-3", new))

    assert Changing(runs, TWO_SLOTS[:1], build_stand_in).make()
    assert [read_outcome(run.folder).state for run in runs] == [COMPLETE, FAILED]
    assert [count_starts(run) for run in runs] == [1, 0]
    line = read_outcome(runs[1].folder).line
    assert told in line and "since the command was started" in line
    assert len([each for each in capsys.readouterr().out.splitlines() if line in each]) == 1
    with pytest.raises(UserError):
        check_folders(runs)


def test_a_report_mixes_no_options(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run.toml").write_text(text := (REPO / "configs/pathstar_cpu.toml").read_text())
    path = write_spec(tmp_path, old=f"{REPO}/configs/pathstar_cpu.toml", new=f"{tmp_path}/run.toml")

    def make(_spec: Spec, runs: list[Run]) -> int:
        write_result(runs[0], [0.1])
        (tmp_path / "run.toml").write_text(text.replace("lr = 3e-3", "lr = 0.5"))
        return 1

    monkeypatch.setattr(command, "_make", make)
    assert command.main([path]) == 2 and not (tmp_path / "out/report.md").exists()
    assert "stale run, with optimizer.lr = 0.003 (now 0.5)" in capsys.readouterr().err


def test_seconds_are_stale_when_they_are_other_steps(tmp_path: Path):
    run = replace(make_run(tmp_path, "quick", 1), budget=Budget("seconds", 9), steps=30)
    assert RunQueue([run], TWO_SLOTS, build_stand_in).make()
    assert (read_record(run.folder) or {})["steps"] == 30
    check_folders([run, replace(run, steps=None)])
    with pytest.raises(UserError, match=r"30 steps for its seconds \(now 31\)"):
        check_folders([replace(run, steps=31)])


@pytest.mark.parametrize(
    ("parallel", "gpus_per_run", "gpus", "expected"),
    [
        (2, 1, [], [((), 4), ((), 4)]),
        (1, 1, ["0", "1"], [(("0",), 4), (("1",), 4)]),
        (2, 1, ["3", "7"], [(("3",), 2), (("7",), 2), (("3",), 2), (("7",), 2)]),
        (1, 2, ["0", "1", "2", "3", "4"], [(("0", "1"), 2), (("2", "3"), 2)]),
        (16, 1, [], [((), 1)] * 16),
    ],
)
def test_slots(parallel: int, gpus_per_run: int, gpus: list[str], expected: list):
    assert list_slots(parallel, gpus_per_run, gpus, cores=8) == expected


def test_too_few_gpus():
    with pytest.raises(UserError, match=r"compare\.gpus_per_run = 4: this machine has 2"):
        list_slots(1, 4, ["0", "1"], cores=8)
