"""Jobs on disjoint GPUs: who runs beside whom, and what is left of a job that exceeds its limit."""

from __future__ import annotations

import os
import sys
import time
from itertools import combinations
from math import inf
from pathlib import Path

import pytest

from benchmarks.pool import GO, MARK, Ended, Job, explain, launch, list_gpus, run_jobs, wait_for_turn

NAMED = "echo $CUDA_VISIBLE_DEVICES; date +%s.%N; sleep 0.15; date +%s.%N"
WAIT = "test $(head -c 1) || exit 9; "
"""A rank's `wait_for_turn`."""


def shell(name: str, script: str, gpus: int = 1, seconds: float = inf, expected: float = 0.0) -> Job:
    return Job(name, gpus, ["sh", "-c", script], seconds, expected, waits=WAIT in script)


def run_all(jobs: list[Job], gpus: list[str], logs: Path, seconds: float = inf) -> dict[str, Ended]:
    return {ended.job.name: ended for ended in run_jobs(jobs, gpus, logs, seconds)}


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def read_pid(path: Path) -> int:
    until = time.monotonic() + 10
    while not (path.exists() and path.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.01)
    return int(path.read_text())


@pytest.mark.parametrize("early", [(), (0, 2, 3, 5), range(7)])
def test_jobs_share_the_host_but_no_gpu(tmp_path: Path, early):
    sizes = [4, 2, 1, 2, 1, 1, 3]
    jobs = [shell(f"job{n}", (WAIT if n in early else "") + NAMED, gpus) for n, gpus in enumerate(sizes)]
    ended = run_all(jobs, ["3", "4", "GPU-x", "6"], tmp_path)
    assert len(ended) == len(jobs) and all(each.problem is None for each in ended.values())
    turns = []
    for job in jobs:
        names, start, end = (tmp_path / f"{job.name}.log").read_text().split()
        assert len(set(names.split(","))) == job.gpus and set(names.split(",")) <= {"3", "4", "GPU-x", "6"}
        turns.append((set(names.split(",")), float(start), float(end)))
    beside = [a[0] & b[0] for a, b in combinations(turns, 2) if a[1] < b[2] and b[1] < a[2]]
    assert len(beside) >= 2 and not any(beside)


def test_jobs_start_beside_others_and_wait(tmp_path: Path):
    """Two on halves of the first one's GPUs, and a third when one of them has its turn."""

    def note_times(name: str, *until: str) -> str:
        """Of the job's start, its turn and its end, which waits until those others have noted theirs."""
        started = " && ".join(["true", *(f"[ -e {tmp_path}/{other} ]" for other in until)])
        wait = f"for i in $(seq 1000); do {started} && break; sleep 0.01; done"
        return f"date +%s.%N; touch {tmp_path}/{name}; {WAIT} date +%s.%N; {wait}; date +%s.%N"

    jobs = [shell("first", note_times("first", "left", "right"), 2)]
    jobs += [shell(name, note_times(name, *(["last"] if name != "last" else []))) for name in ("left", "right", "last")]
    assert all(each.problem is None for each in run_all(jobs, ["0", "1"], tmp_path).values())
    read = {job.name: list(map(float, (tmp_path / f"{job.name}.log").read_text().split())) for job in jobs}
    for name in ("left", "right"):
        assert read[name][0] < read["first"][2] <= read[name][1]
    assert read["first"][2] <= read["last"][0] < min(read["left"][2], read["right"][2]) <= read["last"][1]


def test_the_longest_start_first_and_the_next_ones_where_gpus_are_free_first(tmp_path: Path):
    expected = {"a": 10, "b": 50, "c": 20, "d": 25}
    jobs = [shell(name, f"{WAIT} echo $CUDA_VISIBLE_DEVICES", expected=seconds) for name, seconds in expected.items()]
    run_all(jobs, ["0", "1"], tmp_path)
    assert [(tmp_path / f"{name}.log").read_text().strip() for name in "bdc"] == ["0", "1", "1"]


def test_limits_count_from_the_turn(tmp_path: Path):
    ended = run_all([shell("first", "sleep 2.5"), shell("second", WAIT, seconds=2.0)], ["0"], tmp_path)
    assert ended["second"].problem is None and ended["second"].seconds < 2.0


def test_what_waits_when_the_time_is_over_has_no_turn(tmp_path: Path):
    script = f"echo $$ > {tmp_path}/pid; {WAIT} touch {tmp_path}/turn"
    ended = run_all([shell("first", "sleep 60"), shell("second", script)], ["0"], tmp_path, seconds=0.5)
    assert ended["second"] == Ended(shell("second", script), 0.0, "not started: the time was over")
    assert not is_alive(read_pid(tmp_path / "pid")) and not (tmp_path / "turn").exists()


def test_closing_kills_what_waits(tmp_path: Path):
    quick = shell("quick", f"while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done", expected=20)
    jobs = [quick, shell("slow", "sleep 60", expected=10), shell("waiting", f"echo $$ > {tmp_path}/pid; {WAIT}")]
    ended = run_jobs(jobs, ["0", "1"], tmp_path)
    assert next(ended).job.name == "quick" and is_alive(read_pid(tmp_path / "pid"))
    ended.close()
    assert not is_alive(read_pid(tmp_path / "pid"))


def test_a_turn_comes_once_for_each_rank_and_never_when_the_scheduler_is_gone(monkeypatch: pytest.MonkeyPatch):
    assert wait_for_turn()  # no job
    monkeypatch.setenv(MARK, "some job")
    reads, writes = os.pipe()
    os.write(writes, GO * 2)
    os.close(writes)
    with open(reads) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert [wait_for_turn() for _ in range(3)] == [True, True, False]


@pytest.mark.slow
def test_ranks_of_torchrun_wait(tmp_path: Path):
    """Each rank reads the input of its launcher."""
    script = tmp_path / "rank.py"
    script.write_text("import sys\nsys.exit(sys.stdin.buffer.raw.read(1) != b'g')")
    torchrun = launch(2, "", [])[:-2]
    ended = run_all([Job("ranks", 2, [*torchrun, str(script)], waits=True)], ["0", "1"], tmp_path)
    assert ended["ranks"].problem is None, ended["ranks"].lines


def test_a_job_over_its_limit_leaves_no_process(tmp_path: Path):
    """Also none in a session of its own, whose parent is gone, as torchrun's workers are."""
    script = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60' & exec sleep 60"
    ended = run_all([shell("slow", script, seconds=0.5), shell("quick", "true")], ["0"], tmp_path)
    assert ended["slow"].problem in {"killed after 0 s, its limit", "killed after 1 s, its limit"}
    assert not is_alive(read_pid(tmp_path / "pid"))
    assert ended["quick"].problem is None


def test_what_a_job_leaves_behind_is_ended(tmp_path: Path):
    script = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60' & while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done"
    assert run_all([shell("careless", script)], ["0"], tmp_path)["careless"].problem is None
    assert not is_alive(read_pid(tmp_path / "pid"))


def test_closing_kills_what_runs(tmp_path: Path):
    scripts = {"quick": f"while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done", "slow": f"echo $$ > {tmp_path}/pid; sleep 60"}
    ended = run_jobs([shell(name, script) for name, script in scripts.items()], ["0", "1"], tmp_path)
    assert next(ended).job.name == "quick" and is_alive(read_pid(tmp_path / "pid"))
    ended.close()
    assert not is_alive(read_pid(tmp_path / "pid"))


def test_failures_are_named_and_the_others_go_on(tmp_path: Path):
    jobs = [shell("wrong", "echo so; exit 3"), shell("large", "true", gpus=3), shell("right", "true", gpus=2)]
    ended = run_all(jobs, ["0", "1"], tmp_path)
    problems = {name: each.problem for name, each in ended.items()}
    assert problems == {"wrong": "ended with 3", "large": "needs 3 GPUs, of 2", "right": None}
    assert (tmp_path / "wrong.log").read_text() == "so\n"


def test_the_limit_of_all_ends_what_runs_and_what_waits(tmp_path: Path):
    jobs = [shell("first", "sleep 60"), shell("second", "true")]
    start = time.monotonic()
    problems = {name: each.problem for name, each in run_all(jobs, ["0"], tmp_path, seconds=0.3).items()}
    assert time.monotonic() - start < 10
    assert problems == {"first": "killed after 0 s, the limit of all", "second": "not started: the time was over"}


def test_gpus_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert list_gpus() == ["2", "GPU-5"]


def test_one_gpu_needs_no_launcher():
    assert launch(1, "some.module", ["a"])[1:] == ["-m", "some.module", "a"]
    assert launch(4, "some.module", ["a"])[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "-m", "some.module", "a")
    ]


def test_the_first_error_and_the_end_of_a_log_are_shown(tmp_path: Path):
    log = tmp_path / "a.log"
    assert explain(log) == []
    log.write_text("\n".join(["start", "torch.OutOfMemoryError: too much", *map(str, range(30))]))
    assert explain(log) == ["torch.OutOfMemoryError: too much", *map(str, range(18, 30))]
    log.write_text("start\nValueError: short\nend")
    assert explain(log) == ["start", "ValueError: short", "end"]
    log.write_text("\n".join(map(str, range(30))))
    assert explain(log) == list(map(str, range(18, 30)))


def test_the_report_of_torchrun_is_not_shown(tmp_path: Path):
    log = tmp_path / "a.log"
    elastic = "W1130 22:52:04 20273 torch/distributed/elastic/multiprocessing/api.py:1010]"
    before = ["start", "[rank1]: RuntimeError: so", f"{elastic} Sending process 20281 closing signal SIGTERM"]
    log.write_text("\n".join([*before, *["Traceback (most recent call last):"] * 40]))
    assert explain(log) == before


def test_threads_are_shared_among_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    run_all([shell("one", "echo $OMP_NUM_THREADS")], ["0", "1", "2", "3"], tmp_path)
    assert (tmp_path / "one.log").read_text() == "16\n"
