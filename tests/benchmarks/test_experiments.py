"""The experiments of research/: every run they list is possible, and their reports say what the folders hold."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from flame.config.help import write_config
from flame.data.tasks.generated import is_held_out
from flame.data.tasks.pathstar import PathstarOptions, parse_sizes
from flame.data.tasks.siblings import SiblingsOptions, deal_children, hash_pairs
from flame.objectives.future.options import FutureOptions
from flame.trainer.options import read_options
from research import pathstar, real_text, siblings
from research.pathstar_report import read_outcomes, write_report
from research.run_folder import Row, read_rows
from research.run_queue import Run, find_other_run, never, run_all, run_command
from tests.support.paths import REPO


@pytest.mark.parametrize("group", [*pathstar.GROUPS, *pathstar.LAPTOP_GROUPS])
def test_every_path_star_run_is_possible(group: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    for run in pathstar.list_runs(group, seed=3):
        assert read_options(run.spell_options(), 1).training.seed == 3


@pytest.mark.long
@pytest.mark.parametrize(("name", "lowest", "highest"), [("future", 0.99, 1.0), ("next_token", 0.0, 0.6)])
def test_the_laptop_task_needs_the_future_loss(tmp_path: Path, name: str, lowest: float, highest: float):
    """Both commands of the README, half as long: the plan is there by step 300."""
    options = ["--objective.name", name, "--job.dump_folder", str(tmp_path), "--training.steps", "500"]
    command = ["bash", "train.sh", "--job.config_file", "configs/pathstar_cpu.toml", *options]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    matches = [row["validation_exact_match"] for row in read_rows(tmp_path) if "validation_exact_match" in row]
    assert lowest <= matches[-1] and max(matches) <= highest


def test_laptop_runs_are_those_of_the_readme(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    configs = [read_options(run.spell_options(), 1) for run in pathstar.list_runs("laptop", seed=3)]
    assert [(config.objective.name, config.training.seed) for config in configs] == [("future", 3), ("next_token", 3)]
    assert all(config.training.dataset_name == "2x3" for config in configs)


def test_a_folder_stands_for_the_same_run_in_every_group():
    options: dict[str, dict[str, object]] = {}
    for group in (*pathstar.GROUPS, *pathstar.LAPTOP_GROUPS):
        for run in pathstar.list_runs(group, seed=3):
            made = {key: value for key, value in run.options.items() if key != "job.description"}
            assert options.setdefault(run.name, made) == made, (group, run.name)
    assert len({repr(sorted(made.items(), key=str)) for made in options.values()}) == len(options)


@pytest.mark.parametrize(
    ("group", "name", "target", "shift", "weight", "labels"),
    [
        ("objectives", "5x5/future", "random", 0, 3.0, 30),
        ("objectives", "5x5/target self", "self", 1, 1.0, 30),
        ("hard", "10x10/future", "random", 0, 3.0, 100),
        ("hard_mixed", "7x7+10x10/future, smaller graphs too", "random", 0, 3.0, 100),
        ("controls", "5x3/target ema", "ema", 1, 1.0, 30),
        ("settings", "5x5/target_shift 2", "self", 2, 1.0, 30),
        ("laptop", "2x3/future", "random", 0, 3.0, 7),
        ("laptop_targets", "2x3/target self, target_shift 1", "self", 1, 0.3, 7),
        ("laptop_labels", "2x3/target self, 40 labels", "self", 0, 3.0, 40),
    ],
)
def test_a_variant_is_what_its_name_says(group, name, target, shift, weight, labels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    (run,) = (run for run in pathstar.list_runs(group, seed=3) if run.name == f"{name}/seed 3")
    config = read_options(run.spell_options(), 1)
    future = config.get(FutureOptions)
    assert (future.target, future.target_shift, future.loss_weight) == (target, shift, weight)
    assert config.get(PathstarOptions).labels == labels and config.training.seed == 3


def test_what_two_groups_share_is_made_once():
    arguments = argparse.Namespace(seeds=[1], group=["objectives", "controls"], only=["5x3/target self"])
    assert [run.name for run in pathstar.list_all(arguments)] == ["5x3/target self/seed 1"]


def test_some_runs_of_several_groups():
    only = ["2x10/top", "7x7/*small steps"]
    arguments = argparse.Namespace(seeds=[1, 2], group=["hard", "hard_small_steps"], only=only)
    small = [f"7x7/{name}, small steps" for name in pathstar.OBJECTIVES]
    names = [f"{name}/seed {seed}" for seed in (1, 2) for name in ["2x10/top", *small]]
    assert [run.name for run in pathstar.list_all(arguments)] == names


def parse_run(experiment, *options: object) -> argparse.Namespace:
    """What `run` is given of an experiment's own options, and two seeds."""
    parser = argparse.ArgumentParser()
    experiment.add_options(parser)
    return parser.parse_args([str(option) for option in options], argparse.Namespace(seeds=[1, 2]))


@pytest.mark.parametrize("size", [[], ["--laptop"]], ids=["gpu", "laptop"])
@pytest.mark.parametrize("experiment", [siblings, real_text])
def test_every_other_run_is_possible(experiment, size: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(REPO)
    (tmp_path / "a.py").write_text("pass\n")
    data = ["--data_files", tmp_path / "*.py"] if experiment is real_text else []
    runs = experiment.list_runs(parse_run(experiment, *size, *data))
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        read_options(run.spell_options(), 1)


def test_real_text_goes_on_from_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(REPO)
    (tmp_path / "a.py").write_text("pass\n")
    config = json.loads((REPO / "configs/models/llama_15M.json").read_text())
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path / "hf")
    start = os.path.relpath(tmp_path / "hf")
    arguments = parse_run(real_text, "--data_files", tmp_path / "*.py", "--start", start, "--variants", real_text.BASELINE)
    for run in real_text.list_runs(arguments):
        assert read_options(run.spell_options(), 1).checkpoint.initial_load_path == str(tmp_path / "hf")


def read_tables(path: Path) -> list[list[str]]:
    """The cells of each line of a report."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()]


def write_run(folder: Path, matches: list[float], size: str = "3x3", step_tflops: float = 2.0, judged: str = "") -> None:
    """A run of 100 graphs a step that is logged and validated every 10 steps, on what it is trained on unless said otherwise."""
    folder.mkdir(parents=True)
    sizes = parse_sizes(size)
    tokens = 100 * sum(each.num_tokens for each in sizes) // len(sizes)
    training = f'[training]\nseq_len = {tokens}\ndataset_name = "{size}"\n'
    (folder / "config.toml").write_text(f'{training}[validation]\ndataset_name = "{judged or size}"\n')
    lines = []
    for turn, match in enumerate(matches, start=1):
        step = 10 * turn
        diagnostics = {"future/top1": 0.1 * turn, "future/rank_targets": None if turn == 3 else 10.0 * turn}
        lines.append({"step": step, "step_tflops": step_tflops, "tokens_seen": step * tokens} | diagnostics)
        lines.append(
            {"step": step, "validation_exact_match": match, "validation_first_branch": match, "validation_ce_loss": 1 - match}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    (folder / "ended").write_text("done\n")


def test_a_report_counts_graphs_flops_and_success(tmp_path: Path):
    write_run(tmp_path / "3x3" / "future" / "seed 1", [0.2, 0.992, 0.98])
    write_run(tmp_path / "3x3" / "future" / "seed 2", [0.2, 0.4, 0.991, 0.996])
    write_run(tmp_path / "3x3" / "next_token" / "seed 1", [0.3, 0.989])
    write_run(tmp_path / "5x3" / "top" / "seed 1", [0.3, 0.3, 0.3, 0.3, 0.3], "5x3")
    write_run(tmp_path / "5x3" / "top" / "seed 2", [0.3, 0.99], "5x3")
    write_run(tmp_path / "5x3" / "top" / "seed 3", [0.3, 0.99], "5x3")
    (tmp_path / "5x3" / "top" / "seed 3" / "ended").unlink()  # still under way
    write_run(tmp_path / "3x3+3x5" / "top" / "seed 1", [0.3, 0.3], "3x3,3x5")
    write_run(tmp_path / "5x5" / "top" / "seed 1", [0.3, 0.99], "3x3,5x5", judged="5x5")
    (outcome,) = read_outcomes(tmp_path / "3x3" / "future" / "seed 2")
    assert outcome.graphs == [1000, 2000, 3000, 4000] and outcome.solved_at == 2
    assert outcome.petaflops == pytest.approx([0.02, 0.04, 0.06, 0.08]) and outcome.diagnostics["future/top1"] == 0.4
    assert outcome.early["future/top1"] == 0.2
    out = tmp_path / "out"
    out.mkdir()
    write_report(tmp_path, out)
    rows = read_tables(out / "pathstar.md")
    assert ["3x3", "future", "2/2", "2 [2, 3]", "2 [2, 3]", "2", "0.05", "98.8 [98.0, 99.6]", "98.8"] in rows
    assert ["3x3", "next_token", "0/1", "2", "- (1 not within 2)", "-", "-", "98.9", "98.9"] in rows
    assert ["5x3", "top", "1/2", "2 (1 not within 5)", "2 (1 not within 5)", "7", "0.14", "64.5 [30.0, 99.0]", "64.5"] in rows
    assert ["5x5", "top", "1/1", "2", "2", "2", "0.04", "99.0", "99.0"] in rows
    assert ["3x3,3x5", "top", "0/1", "- (1 not within 2)", "- (1 not within 2)", "-", "-", "30.0", "30.0"] in rows
    short = rows[: rows.index([])]
    assert short[0][1:] == ["G(3, 3)", "G(3, 3) and G(3, 5)", "G(5, 3)", "G(5, 5)"]
    assert ["top", "", "0/1, 30.0 %, -", "1/2, 64.5 %, 7", "1/1, 99.0 %, 2"] in short
    assert ["future", "2/2, 98.8 %, 2", "", "", ""] in short
    columns = next(row for row in reversed(rows) if "top1" in row)
    by_variant = {tuple(row[:2]): dict(zip(columns, row, strict=True)) for row in rows[rows.index(columns) + 2 :]}
    assert by_variant["3x3", "future"]["top1"] == "0.35" and by_variant["3x3", "future"]["rank_targets"] == "nan"
    assert by_variant["5x3", "top"]["rank_targets, second measurement"] == "20"
    assert (out / "pathstar.png").stat().st_size > 1000


def test_sizes_that_are_told_apart_are_reported_apart(tmp_path: Path):
    folder = tmp_path / "7x7+10x10" / "future" / "seed 1"
    write_run(folder, [], "3x3,7x7,10x10", judged="7x7,10x10")
    per_size = [(0.7, 0.2), (0.992, 0.98), (0.998, 0.996)]
    rows = [
        {
            "step": 10 * turn,
            "validation_exact_match": (small + large) / 2,
            "validation_exact_match/7x7": small,
            "validation_exact_match/10x10": large,
            "validation_first_branch": 0.5,
        }
        for turn, (small, large) in enumerate(per_size, start=1)
    ]
    logged = [{"step": 30, "step_tflops": 2.0, "tokens_seen": 30 * 100 * 149, "future/top1": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *logged]))
    assert [pathstar.is_enough(rows[:count]) for count in range(4)] == [False, False, False, True]
    write_report(tmp_path, tmp_path)
    table = read_tables(tmp_path / "pathstar.md")
    mean_tokens = sum(size.num_tokens for size in parse_sizes("3x3,7x7,10x10")) / 3
    part = "future (one of 7x7,10x10)"
    second, third = (f"{turn * 10 * 100 * 149 / mean_tokens / 1000:,.0f}" for turn in (2, 3))
    assert ["7x7", part, "1/1", second, second, second, "0.04", "99.8", "-"] in table
    assert ["10x10", part, "1/1", second, third, third, "0.06", "99.6", "-"] in table
    assert ["7x7,10x10", "future", "1/1", second, third, third, "0.06", "99.7", "50.0"] in table
    assert sum(row[:2] == ["7x7", part] for row in table) == 1  # diagnostics are of all sizes together


def test_harm_is_counted_over_ended_runs_of_a_seed(tmp_path: Path):
    write_run(tmp_path / "next token" / "seed 1", [0.5, 0.6], "10x10")
    write_run(tmp_path / "next token" / "seed 2", [0.5, 0.5], "10x10")
    write_run(tmp_path / "future, weight 0.1" / "seed 1", [0.5, 0.9, 0.58], "10x10", step_tflops=3.0)
    write_run(tmp_path / "future, weight 0.1" / "seed 2", [0.1])
    (tmp_path / "future, weight 0.1" / "seed 2" / "ended").unlink()  # cut off early, at a high loss
    real_text.write_report(tmp_path, tmp_path)
    rows = read_tables(tmp_path / "real_text.md")
    tokens = 100 * parse_sizes("10x10")[0].num_tokens / 1e6
    assert ["future, weight 0.1", "1", f"{30 * tokens:.1f}", "2.25", "0.4200", "0.4000", "+5.00", "1/1", "-", "nan", "-"] in rows
    assert [
        "next token",
        "2",
        f"{20 * tokens:.1f}",
        "1.00",
        *2 * ["0.4500 [0.4000, 0.5000]"],
        "+0.00",
        "0/2",
        "-",
        "20.00",
        "-",
    ] in rows


RESULT = re.compile(r"(\d/\d), (?:([\d.]+ %), )?([\d,]*\d|-)")
"""Runs that solved it, mean exact match, which the README leaves out, and thousands of graphs a solved run."""


@pytest.mark.parametrize("prose", ["README.md", "docs/experiments.md", "research/experiments.md"])
def test_results_in_the_prose_are_those_of_the_reports(prose: str):
    reports = (REPO / "research/experiments").glob("*/pathstar.md")
    reported = {result for path in reports for result in RESULT.findall(path.read_text())}
    reported |= {(rate, "", graphs) for rate, _, graphs in reported}
    told = RESULT.findall((REPO / prose).read_text().replace("*", ""))
    assert told and set(told) <= reported


def test_siblings_are_judged_by_the_families_of_their_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = tmp_path / "next_token" / "seed 1"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[siblings]\nparents = 2\nchildren = 20\nseed = 3\n")
    (folder / "ended").write_text("out of steps\n")
    losses = {20: 3.0, 40: 2.5, 60: 2.75}
    lines = [json.dumps({"step": step, "validation_ce_loss": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = json.loads((REPO / "configs/models/siblings_cpu.json").read_text()) | {"vocab_size": 44, "eos_token_id": 43}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder / "hf")
    options = SiblingsOptions(parents=2, children=20, seed=3)
    first, second = deal_children(options).tolist()
    samples = siblings.draw_samples(folder / "hf", options)
    assert len(samples) == siblings.NUM_SAMPLES and {len(sample) for sample in samples} == {4} and max(map(max, samples)) < 44

    pairs = [(one, other) for one in first for other in first if one != other]
    is_new = is_held_out(hash_pairs(*np.asarray(pairs).T)).tolist()
    new = next(pair for pair, flag in zip(pairs, is_new, strict=True) if flag)
    old = next(pair for pair, flag in zip(pairs, is_new, strict=True) if not flag)
    drawn = [[*new, 40, 43], [*new[::-1], 40, 43], [*old, 40, 43], [first[0], second[0], 40, 43]]
    monkeypatch.setattr(siblings, "draw_samples", lambda *_: drawn)
    siblings.write_report(tmp_path, tmp_path)
    shutil.rmtree(folder / "hf")
    monkeypatch.undo()
    for again in (False, True):  # what has been judged needs no model
        if again:
            siblings.write_report(tmp_path, tmp_path)
        assert read_tables(tmp_path / "siblings.md")[-1] == ["next_token", "1", "75.00", "50.00", "25.00", "2.750", "2.500", "40"]


def run_main(monkeypatch: pytest.MonkeyPatch, module: str, *arguments: object) -> int:
    """Exit code of `python -m module ...`, in this process."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of one that is there
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("experiment", ["pathstar", "siblings", "real_text"])
def test_a_report_of_nothing_says_so(experiment: str, tmp_path: Path, monkeypatch, capsys):
    write_run(tmp_path / "runs" / "3x3" / "future" / "seed 1", [0.2])
    (tmp_path / "runs" / "3x3" / "future" / "seed 1" / "ended").unlink()
    assert run_main(monkeypatch, f"research.{experiment}", "report", tmp_path / "runs", tmp_path / "out") == 2
    assert "holds no run that has ended" in capsys.readouterr().err.splitlines()[-1]


def test_a_report_names_what_has_not_ended(tmp_path: Path, monkeypatch, capsys):
    for name in ("next token", "future, weight 0.1"):
        write_run(tmp_path / "runs" / name / "seed 1", [0.2])
    (tmp_path / "runs" / "future, weight 0.1" / "seed 1" / "ended").unlink()
    assert run_main(monkeypatch, "research.real_text", "report", tmp_path / "runs", tmp_path / "out") == 0
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}/runs/future, weight 0.1/seed 1: not counted, it has not ended"]


def test_options_that_leave_no_run_are_said(tmp_path: Path, monkeypatch, capsys):
    assert run_main(monkeypatch, "research.pathstar", "run", tmp_path, "--group", "mixed", "--only", "7x7") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("the options leave no run to make")


PROGRAMS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("benchmarks", "research")
    for path in (REPO / folder).glob("*.py")
    if "__main__" in path.read_text()
)


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_program_has_a_help(module: str, monkeypatch, capsys):
    """Also on a machine without a GPU."""
    assert run_main(monkeypatch, module, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_validation_between_two_log_lines_counts_the_steps_before_it(tmp_path: Path):
    folder = tmp_path / "3x3" / "future" / "seed 1"
    write_run(folder, [])
    logged = [{"step": step, "step_tflops": 2.0, "tokens_seen": 2500 * step} for step in (20, 40, 60)]
    validated = [{"step": step, "validation_exact_match": 0.5, "validation_first_branch": 0.5} for step in (10, 25, 50)]
    rows = sorted([*logged, *validated], key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (outcome,) = read_outcomes(folder)
    assert outcome.graphs == [1000, 2500, 5000] and outcome.petaflops == pytest.approx([0.02, 0.05, 0.1])


def test_a_line_that_is_still_written_is_left_out(tmp_path: Path):
    write_run(tmp_path / "run", [0.5])
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [10, 10]


SHORT: dict[str, object] = {
    "job.config_file": "configs/pathstar_cpu.toml",
    "training.seq_len": 190,
    "training.steps": 400,
    "validation.interval": 1,
    "validation.num_sequences": 1,
    "checkpoint.enable_checkpoint": False,
    "metrics.log_freq": 1,
}


def is_validated_twice(validations: list[Row]) -> bool:
    return len(validations) >= 2


def test_a_folder_of_other_options_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    run, other = (Run("a/seed 1", SHORT | {"training.steps": steps}, never) for steps in (400, 500))
    assert find_other_run(run, tmp_path) is None
    folder = tmp_path / run.name
    folder.mkdir(parents=True)
    write_config(read_options([*run.spell_options(), "--job.dump_folder", str(folder)], 1), folder / "config.toml")
    assert find_other_run(run, tmp_path) is None
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "a", moved / "a")
    assert find_other_run(run, moved) is None

    monkeypatch.setattr(sys, "argv", ["experiment", "run", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        run_command("", lambda _: [other], lambda *_: None, "*/*")
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and "a/seed 1 holds a run with training.steps = 400 (now 500)" in line


@pytest.mark.slow
def test_runs_share_a_process_end_early_and_are_made_once(tmp_path: Path, capfd: pytest.CaptureFixture):
    runs = [
        Run("a/early", SHORT, is_validated_twice),
        Run("b/wrong", SHORT | {"training.no_such_key": 1}, never),
        Run("c/whole", SHORT | {"training.steps": 2}, never),
    ]
    assert not run_all(runs, tmp_path, per_gpu=1, seconds=300)
    steps = [row["step"] for row in read_rows(tmp_path / "a" / "early")]
    assert (tmp_path / "a" / "early" / "ended").read_text() == "done\n" and steps[-1] < 400
    assert (tmp_path / "c" / "whole" / "ended").read_text() == "out of steps\n"
    assert "training.no_such_key" in (tmp_path / "b" / "wrong" / "log").read_text()
    assert "b/wrong: failed" in capfd.readouterr().out

    stamps = {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in ("a/early", "c/whole")}
    assert run_all([runs[0], runs[2]], tmp_path, per_gpu=1, seconds=300)
    assert stamps == {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in stamps}


START_ONE_RUN = """
from pathlib import Path
from research.run_queue import Run, never, run_all
if __name__ == "__main__":
    run_all([Run("a/long", {options}, never)], Path({folder!r}), per_gpu=1, seconds=300)
"""


@pytest.mark.slow
def test_a_run_ends_with_the_process_that_asked_for_it(tmp_path: Path):
    (tmp_path / "start.py").write_text(START_ONE_RUN.format(options=SHORT | {"training.steps": 1_000_000}, folder=str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, tmp_path / "start.py"], cwd=REPO, env=environment)
    folder = tmp_path / "a" / "long"
    wait_until(lambda: len(list(read_rows(folder))) > 3)
    parent.kill()
    parent.wait()

    def has_stopped() -> bool:
        before = len(list(read_rows(folder)))
        time.sleep(2)
        return len(list(read_rows(folder))) == before

    wait_until(has_stopped)
    assert not (folder / "ended").exists()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.time() + 120
    while not is_so():
        assert time.time() < deadline
        time.sleep(0.5)
