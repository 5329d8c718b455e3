"""The command that measures a whole host, with workers that only write results: order, limits, tables, failures."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import node, pool, step_worker
from benchmarks.fault_ranks import Stage
from benchmarks.node_runs import Case, Host
from benchmarks.pool import REPO
from benchmarks.shapes import write_shape
from benchmarks.timing import Report
from flame.models.causal_lm import build_on_meta, load_model_config
from flame.trainer.estimate import estimate_run

MEMORY = 139.8


class Workers:
    """Stand-ins for `benchmarks.step_worker`: shells that write a result, or fail."""

    def __init__(self) -> None:
        self.scripts: dict[str, str] = {}
        """By a word in the options: what is done instead."""
        self.started: list[int] = []

    def launch(self, gpus: int, module: str, arguments: list[str]) -> list[str]:
        if module != "benchmarks.step_worker":
            return ["false"]
        self.started.append(gpus)
        spec = json.loads(Path(arguments[0]).read_text())
        result = {
            "steps_ms": [100.0 + 25 * (gpus - 1)] * 3,
            "idle": 0.01,
            "exposed communication": 0.02 * (gpus - 1),
            "peak_gib": 50.0,
            "mfu": 0.5,
            "tokens_per_second": 1000.0 * gpus,
        }
        script = next((script for word, script in self.scripts.items() if word in spec["options"]), "true")
        return ["sh", "-c", f"head -c 1 > /dev/null && {script} && echo '{json.dumps(result)}' > {spec['result']}"]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    workers = Workers()
    monkeypatch.setattr(step_worker, "launch", workers.launch)
    monkeypatch.setattr(node, "list_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(node, "describe_gpu", lambda: ("Some GPU", MEMORY))
    monkeypatch.setattr(node, "CHARACTERS", 20_000)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return workers


def build_host(tmp_path: Path, gpus: int) -> Host:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "some words " * 10_000}) + "\n")
    names = [str(gpu) for gpu in range(gpus)]
    scaling = ([node.SHORT, node.LONG], [node.NEXT_TOKEN, node.FUTURE, node.CHEAP, *node.GATHERED])
    return Host(tmp_path, tmp_path, names, node.choose_counts(None, gpus), MEMORY, Report(tmp_path / "node.md"), *scaling)


def read_cells(path: Path, title: str) -> list[dict[str, str]]:
    """The rows of a table of a report, by column."""
    lines = path.read_text().split(title)[1].lstrip("\n").split("\n\n")[0].splitlines()
    columns, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_powers_of_two_are_measured():
    assert [node.choose_counts(None, gpus) for gpus in (1, 2, 3, 4, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4, 8]]
    assert node.choose_counts([4, 1, 4], 8) == [1, 4]


def test_efficiencies_are_of_one_gpu(workers: Workers, tmp_path: Path):
    assert node.main([str(tmp_path), "--parts", "weak-scaling", "negatives"]) == 0
    rows = read_cells(tmp_path / "node.md", "Weak scaling, Llama-3.2-1B")
    assert len(rows) == 16
    for row in rows:
        alone = row["GPUs"] == "1"
        assert row["ms [low, high]"] == ("100.0" if alone else "125.0") and row["note"] == ""
        assert row["efficiency"] == ("1.000" if alone else "0.800")
        assert row["exposed communication, %"] == ("0.00" if alone else "2.00") and row["idle, %"] == "1.00"
    predicted = {row["by docs/scaling.md's model"] for row in rows if row["tokens a GPU"] == "16,384" and row["GPUs"] == "2"}
    assert predicted == {"-", "0.966", "0.968"}  # as docs/scaling.md has them
    assert len(workers.started) == 17  # the run with local negatives is one of the other part's
    kept = json.loads((tmp_path / "node.json").read_text())
    assert len(kept["runs"]) == 17 and not kept["problems"]
    assert "(negatives: 0 s)" in (tmp_path / "node.md").read_text()


def test_a_failing_run_shows_its_log_and_the_others_go_on(workers: Workers, tmp_path: Path):
    workers.scripts = {"next_token": "echo torch.OutOfMemoryError: too large; exit 1"}
    assert node.main([str(tmp_path), "--parts", "weak-scaling", "--gpus", "1"]) == 1
    for row in read_cells(tmp_path / "node.md", "Weak scaling, Llama-3.2-1B"):
        failed = row["setting"] == "next token"
        assert row["note"] == ("out of memory (ended with 1)" if failed else "")
        assert row["ms [low, high]"] == ("-" if failed else "100.0")
    report = (tmp_path / "node.md").read_text()
    assert (
        "1B_16384_tokens_1_gpus_next_token: out of memory (ended with 1)\n\n```\ntorch.OutOfMemoryError: too large\n```" in report
    )


def test_a_part_over_its_limit_is_cut_off_and_the_next_goes_on(workers: Workers, tmp_path: Path):
    workers.scripts = {"next_token": "sleep 60"}
    start = time.monotonic()
    assert node.main([str(tmp_path), "--parts", "weak-scaling", "negatives", "--gpus", "2", "--seconds", "1"]) == 1
    assert time.monotonic() - start < 15
    notes = [row["note"] for row in read_cells(tmp_path / "node.md", "Weak scaling, Llama-3.2-1B")]
    assert "killed after 1 s, the limit of all" in notes and "not started: the time was over" in notes
    assert [row["note"] for row in read_cells(tmp_path / "node.md", "Negatives, Llama-3.2-1B")] == ["", ""]


def test_a_part_that_raises_is_reported(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(host: Host, seconds: float) -> None:
        raise ValueError("so")

    monkeypatch.setitem(node.PARTS, "layouts", node.Part(fail, 1))
    assert node.main([str(tmp_path), "--parts", "layouts", "negatives"]) == 1
    report = (tmp_path / "node.md").read_text()
    assert "layouts: failed" in report and "ValueError: so" in report
    assert len(read_cells(tmp_path / "node.md", "Negatives, Llama-3.2-1B")) == 2


def test_a_stop_writes_the_table(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What SIGTERM's handler raises comes out of the wait for a job."""
    workers.scripts = {"next_token": "sleep 60"}
    waits = iter([SystemExit(143)])

    def sleep(_: float) -> None:
        if (error := next(waits, None)) is not None:
            raise error

    monkeypatch.setattr(pool.time, "sleep", sleep)
    with pytest.raises(SystemExit):
        node.main([str(tmp_path), "--parts", "weak-scaling", "--gpus", "2"])
    assert {row["note"] for row in read_cells(tmp_path / "node.md", "Weak scaling, Llama-3.2-1B")} == {"not measured"}


def test_layouts_need_four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    workers = Workers()
    monkeypatch.setattr(step_worker, "launch", workers.launch)
    node.measure_layouts(build_host(tmp_path, 2), 10)
    assert "needs 4 GPUs, here are 2" in (tmp_path / "node.md").read_text() and not workers.started
    node.measure_layouts(build_host(tmp_path, 4), 10)
    rows = read_cells(tmp_path / "node.md", "FSDP against HSDP, Llama-3.2-1B")
    assert [row["layout"] for row in rows] == ["FSDP over 4", "HSDP 2 x 2"] * 2


def test_large_models_are_tried_if_they_fit_and_shorter_if_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights take 130 or 520 GiB over all GPUs; 32B on 4 fits with halved moments alone."""
    weights, workers = {"8B": 130.0, "32B": 520.0}, Workers()
    workers.scripts = {"131072": "exit 1", "24576": "echo torch.OutOfMemoryError: too large; exit 1"}
    monkeypatch.setattr(step_worker, "launch", workers.launch)

    def build_estimator(self: Host, case: Case) -> Callable[[int], float]:
        share = weights[case.shape] * (0.75 if "bfloat16" in case.further else 1.0) / case.gpus
        per_token = 0.00075 if "full" in case.further else 0.004
        return lambda tokens: share + per_token * tokens

    monkeypatch.setattr(Host, "_estimator", build_estimator)
    host = build_host(tmp_path, 4)
    node.measure_large(host, 20)
    rows = read_cells(tmp_path / "node.md", "8B and 32B")
    assert [row["shape"] for row in rows] == ["8B"] * (len(rows) - 5) + ["32B"] + ["8B"] * 4
    assert rows[-5]["options"] == "activation_checkpoint.mode full optimizer.state_dtype bfloat16" and rows[-5]["note"] == ""
    longest = rows[-4:]
    assert [row["tokens a GPU"] for row in longest] == ["24,576", "131,072", "20,480", "65,536"]
    assert [row["note"] for row in longest] == ["out of memory (ended with 1)", "ended with 1", "", ""]
    assert all(row["tokens/s a GPU"] == "1,000" and row["MFU, % of bfloat16"] == "50.0" for row in longest[-2:])
    assert longest[-1]["estimate, GiB"] == f"{130 / 4 + 0.00075 * 65_536:.1f}"
    alone = build_host(tmp_path / "one", 1)
    workers.started.clear()
    node.measure_large(alone, 20)
    notes = {row["note"] for row in read_cells(tmp_path / "one" / "node.md", "8B and 32B")}
    assert notes == {"not tried: does not fit, by the estimate"} and not workers.started and not alone.problems


def test_what_is_tried_after_a_failure():
    case = Case("32B", 16_384, 4, "next token", node.RECOMPUTE)
    assert node.choose_smaller(case, "ended with 1") == case._replace(further=(*node.RECOMPUTE, *node.HALVED_MOMENTS))
    assert node.choose_smaller(node.halve_moments(case), "ended with 1") is None
    assert node.choose_smaller(Case("8B", 16_384, 4, "future"), "out of memory (ended with 1)") is None


def test_the_longest_sequence_that_fits(tmp_path: Path):
    """Against a search over all lengths, one by one, with the estimate that users see."""
    host = build_host(tmp_path, 1)
    case = Case("340M", 4096, 1, "future")
    host.memory = 15.0
    longest = host.find_longest(case, most=20_480)
    assert 4096 < longest < 20_480
    fits = [estimate_run(host.configure(case._replace(tokens=n * 4096))).peak / 2**30 <= 0.95 * 15 for n in range(1, 6)]
    assert longest == 4096 * sum(fits) and fits == sorted(fits, reverse=True)
    host.memory = 1.0
    assert host.find_longest(case) == 0


def test_every_option_of_every_run_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On 8 GPUs. A mistake in an option would show on the GPUs only."""
    configs = {}

    def configure(self: Host, cases: list[Case], seconds: float) -> None:
        configs.update({case: self.configure(case) for case in cases if case.tokens != node.LONG})

    monkeypatch.setattr(Host, "measure", configure)
    monkeypatch.setattr(Host, "estimate", lambda self, case: 100.0)
    monkeypatch.setattr(Host, "find_longest", lambda self, case: 262_144)
    host = build_host(tmp_path, 8)
    for name in ("weak-scaling", "layouts", "negatives", "8b"):
        node.PARTS[name].measure(host, 1)
    degrees = {
        (config.training.data_parallel_replicate_degree, config.training.data_parallel_shard_degree)
        for config in configs.values()
    }
    assert degrees == {(1, -1), (2, 4)}
    assert {case.gpus for case in configs} == {1, 2, 4, 8} and {case.shape for case in configs} == {"1B", "8B", "32B"}
    assert len({case.name for case in configs}) == len(configs)


@pytest.mark.parametrize(("shape", "weights"), [("1B", 1.236e9), ("8B", 8.03e9), ("32B", 32.76e9)])
def test_shapes_have_the_sizes_of_their_models(tmp_path: Path, shape: str, weights: float):
    """Qwen2.5-32B's biases of 64 x (5120 + 2 x 1024) are not in it."""
    lm = build_on_meta(load_model_config(str(write_shape(shape, tmp_path))), "cuda", "sdpa")
    assert sum(weight.numel() for weight in lm.parameters()) == pytest.approx(weights, rel=2e-3)


def measure_fake_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Host:
    """`measure_kill` with a script for Python, whose third argument is the folder of the runs."""
    host = build_host(tmp_path, 2)
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nmkdir -p "$3/disturbed/checkpoint"\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(node.sys, "executable", str(program))
    node.measure_kill(host, 10)
    assert not (tmp_path / "kill" / "disturbed" / "checkpoint").exists()
    return host


def test_a_kill_without_result_shows_the_logs_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = measure_fake_kill(tmp_path, monkeypatch, 'echo "RuntimeError: so" > "$3/disturbed.log"; exit 1')
    assert host.problems == {"kill": "ended with 1"}
    assert json.loads((tmp_path / "node.json").read_text())["problems"] == {"kill": "ended with 1"}
    assert "disturbed.log:\n\n```\nRuntimeError: so\n```" in (tmp_path / "node.md").read_text()


def test_the_table_of_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stages = [asdict(Stage(2, 1, 10, 137)), asdict(Stage(1, 11, 20, 0, 4, 1e-3))]
    host = measure_fake_kill(tmp_path, monkeypatch, f"echo '{json.dumps(stages)}' > \"$3/result.json\"")
    first, second = read_cells(tmp_path / "node.md", "kill -9 of one of 2 ranks, twice, against an uninterrupted run")
    assert first["losses and gradient norms"] == "bit-equal" and first["steps"] == "1 to 10"
    assert second["losses and gradient norms"] == "4 steps differ, losses by up to 1.0e-03 of them"
    assert second["tokens and documents"] == "the same" and not host.problems


def fake_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool):
            self.time = 0.0

        def record(self) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return 1000 * (end.time - self.time)

    monkeypatch.setattr(step_worker.torch.cuda, "Event", Event)
    monkeypatch.setattr(step_worker.torch.cuda, "synchronize", lambda: None)


def build_spec(tmp_path: Path, profiled: int) -> step_worker.Spec:
    """Five steps of a tiny model, not compiled, of which three are timed."""
    shape = json.loads((REPO / "configs" / "models" / "llama_1B.json").read_text())
    shape |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    model, corpus = tmp_path / "tiny.json", tmp_path / "corpus.jsonl"
    model.write_text(json.dumps(shape | {"num_key_value_heads": 2, "vocab_size": 320}))
    corpus.write_text('{"text": "some words of some length"}\n' * 400)
    options = step_worker.list_options(tmp_path / "run", model, corpus, 256, ["--objective.name", "future"])
    options += ["--training.num_workers", "0"]
    options[options.index("--training.compile") + 1] = "false"
    return step_worker.Spec(options, str(tmp_path / "result.json"), warmup=2, steps=3, profiled=profiled)


@pytest.mark.gpu
def test_workers_on_gpus(tmp_path: Path):
    """On two, if there are two."""
    gpus = pool.list_gpus()[:2]
    job = step_worker.build_job("tiny", len(gpus), build_spec(tmp_path, profiled=2), tmp_path / "spec.json", 200)
    (ended,) = pool.run_jobs([job], gpus, tmp_path)
    assert ended.problem is None, (tmp_path / "tiny.log").read_text()
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["steps_ms"]) == 3 and result["mfu"] > 0 and result["peak_gib"] > 0
    assert 0 < result["idle"] < 1 and 0 <= result["exposed communication"] < 1
    assert (result["exposed communication"] > 0) == (len(gpus) > 1)


def test_a_worker_times_the_steps_after_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the CPU, without a profile."""
    fake_events(monkeypatch)
    spec = build_spec(tmp_path, profiled=0)
    step_worker.run_worker(spec)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["steps_ms"]) == 3 and min(result["steps_ms"]) > 0
    assert {"anti-causal forward", "causal forward", "predictor and InfoNCE", "backward", "optimizer"} <= result[
        "parts_ms"
    ].keys()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 5]
    assert result["tokens_per_second"] == rows[-1]["tokens_per_second"] and result["peak_gib"] == rows[-1]["peak_memory_gib"]
    assert 3 * 256e3 / sum(result["steps_ms"]) == pytest.approx(result["tokens_per_second"], rel=0.3)


def test_covered_time_is_that_of_the_union():
    """Against each nanosecond, counted."""
    intervals = [(3, 9), (1, 4), (12, 15), (8, 10), (20, 21), (12, 13)]
    assert step_worker.count_covered(intervals) == len({n for start, end in intervals for n in range(start, end)})
    assert step_worker.count_covered([]) == 0


def test_gaps_are_shares_of_the_whole_time():
    """Of 20 units, 2 are idle, and 3 are NCCL's alone."""
    kernels = [(100, 110, False), (104, 113, True), (115, 120, False), (116, 118, True)]
    assert step_worker.sum_gaps(kernels) == {"idle": pytest.approx(2 / 20), "exposed communication": pytest.approx(3 / 20)}
