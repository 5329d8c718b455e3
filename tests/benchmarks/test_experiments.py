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
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from flame.compare.outcomes import COMPLETE, Outcome, write_outcome
from flame.compare.results import read_rows
from flame.compare.runs import check_folders, spell, write_record
from flame.data.tasks.generated import is_held_out
from flame.data.tasks.pathstar import PathstarOptions
from flame.data.tasks.siblings import SiblingsOptions, deal_children, hash_pairs
from flame.errors import UserError
from flame.objectives.future.options import FutureOptions
from flame.trainer.options import read_options
from research import pathstar, real_text, siblings
from tests.support.paths import REPO


@pytest.mark.parametrize("group", [*pathstar.GROUPS, *pathstar.LAPTOP_GROUPS])
def test_every_path_star_run_is_possible(group: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    for run in pathstar.list_runs(group, seed=3):
        assert read_options(spell(run.options), 1).training.steps > 0 and run.seed == 3


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
    configs = [read_options(spell(run.options), 1) for run in pathstar.list_runs("laptop", seed=3)]
    assert [config.objective.name for config in configs] == ["future", "next_token"]
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
    (run,) = (run for run in pathstar.list_runs(group, seed=3) if run.name == f"{name}/seed-3")
    config = read_options(spell(run.options), 1)
    future = config.get(FutureOptions)
    assert (future.target, future.target_shift, future.loss_weight) == (target, shift, weight)
    assert config.get(PathstarOptions).labels == labels


def test_what_two_groups_share_is_made_once():
    arguments = argparse.Namespace(seeds=[1], group=["objectives", "controls"], only=["5x3/target self"])
    assert [run.name for run in pathstar.list_all(arguments)] == ["5x3/target self/seed-1"]


def test_some_runs_of_several_groups():
    only = ["2x10/top", "7x7/*small steps"]
    arguments = argparse.Namespace(seeds=[1, 2], group=["hard", "hard_small_steps"], only=only)
    small = [f"7x7/{name}, small steps" for name in pathstar.OBJECTIVES]
    names = [f"{name}/seed-{seed}" for seed in (1, 2) for name in ["2x10/top", *small]]
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
        read_options(spell(run.options), 1)


def test_real_text_goes_on_from_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(REPO)
    (tmp_path / "a.py").write_text("pass\n")
    config = json.loads((REPO / "configs/models/llama_15M.json").read_text())
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path / "hf")
    start = os.path.relpath(tmp_path / "hf")
    arguments = parse_run(real_text, "--data_files", tmp_path / "*.py", "--start", start, "--variants", real_text.BASELINE)
    for run in real_text.list_runs(arguments):
        assert read_options(spell(run.options), 1).checkpoint.initial_load_path == str(tmp_path / "hf")


def read_tables(path: Path) -> list[list[str]]:
    """The cells of each line of a report."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()]


def write_run(folder: Path, matches: list[float], *, step_tflops: float = 2.0, has_ended: bool = True, length: int = 30) -> None:
    """A run of 100 tokens a step that is logged and validated every 10 steps."""
    folder.mkdir(parents=True)
    lines = []
    for turn, match in enumerate(matches, start=1):
        step = 10 * turn
        lines.append({"step": step, "step_tflops": step_tflops, "tokens_seen": 100 * step, "step_seconds": 0.5})
        shown = {"validation_exact_match": match, "validation_first_branch": match, "validation_ce_loss": 1 - match}
        lines.append({"step": step} | shown)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    first = {"step": 1, "weights": folder.name, "data": folder.name, "device": "a chip"}
    (folder / "first_step.jsonl").write_text(json.dumps(first) + "\n")
    (folder / "compare.json").write_text(json.dumps({"options": {}, "budget": ["tokens", 100 * length], "steps": None}))
    if has_ended:
        write_outcome(folder, Outcome(COMPLETE))


def test_a_path_star_report_is_one_for_each_size_and_length(tmp_path: Path):
    for seed, (own, other) in enumerate([([0.2, 0.992, 0.98], [0.3, 0.5]), ([0.2, 0.4, 0.991], [0.3, 0.4])], start=1):
        write_run(tmp_path / "3x3" / "future" / f"seed-{seed}", own)
        write_run(tmp_path / "3x3" / "next_token" / f"seed-{seed}", other)
        write_run(tmp_path / "3x3" / "longer" / f"seed-{seed}", other, length=60)
    write_run(tmp_path / "5x3" / "top" / "seed-1", [0.3, 0.99])
    pathstar.write_report(tmp_path, tmp_path / "out")
    assert sorted(path.parent.name for path in tmp_path.glob("out/*/report.md")) == [
        "3x3, 3,000 tokens",
        "3x3, 6,000 tokens",
        "5x3, 3,000 tokens",
    ]
    rows = read_tables(tmp_path / "out" / "3x3, 3,000 tokens" / "report.md")
    # Solved after 2,000 and 3,000 tokens; 0.98 - 0.5 and 0.991 - 0.4.
    future = next(row for row in rows if row and row[0] == "future")
    assert future[1:4] == ["2/2", "0.9855 ± 0.0078", "+0.5355"] and future[9:] == ["2/2", "0.0025"]


def test_sizes_that_are_told_apart_are_reported_apart(tmp_path: Path):
    folder = tmp_path / "7x7+10x10" / "future" / "seed-1"
    write_run(folder, [])
    per_size = [(0.7, 0.2), (0.992, 0.98), (0.998, 0.996)]
    names = ("validation_exact_match/7x7", "validation_exact_match/10x10")
    rows = [
        {"step": 10 * turn, "validation_exact_match": sum(matches) / 2, **dict(zip(names, matches, strict=True))}
        for turn, matches in enumerate(per_size, start=1)
    ]
    logged = [{"step": 30, "step_tflops": 2.0, "tokens_seen": 3000, "step_seconds": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *logged]))
    assert [pathstar.SOLVED.should_stop(rows[:count]) for count in range(4)] == [False, False, False, True]
    pathstar.write_report(tmp_path, tmp_path / "out")
    (report,) = tmp_path.glob("out/*/report.md")
    ends = [row[9:] for row in read_tables(report) if row and row[0] == "future" and len(row) == 11]
    assert ends == [["1/1", "0.003"], ["1/1", "0.003"], ["1/1", "0.002"]]  # together, 10x10, 7x7


def test_text_is_compared_at_all_lengths_with_next_token_training(tmp_path: Path):
    for seed, (base, more, future) in enumerate([(0.6, 0.7, 0.58), (0.5, 0.6, 0.55)], start=1):
        write_run(tmp_path / "text" / "next token" / f"seed-{seed}", [0.5, base])
        write_run(tmp_path / "text" / "next token, more steps" / f"seed-{seed}", [0.5, more, more], length=40)
        write_run(tmp_path / "text" / "future, weight 0.1" / f"seed-{seed}", [0.5, future], has_ended=seed == 1)
    real_text.write_report(tmp_path, tmp_path / "out")
    rows = {row[0]: row for row in reversed(read_tables(tmp_path / "out/text/report.md")) if row}
    assert rows["future, weight 0.1"][1:4] == ["1/2", "0.4200", "+0.0200"]
    assert rows["next token, more steps"][1:4] == ["2/2", "0.3500 ± 0.0707", "-0.1000"]
    assert rows["next token, more steps"][6] == "2/2"
    assert "future, weight 0.1, seed 2: unfinished" in (tmp_path / "out/text/report.md").read_text()


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
    folder = tmp_path / "siblings" / "next_token" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[siblings]\nparents = 2\nchildren = 20\nseed = 3\n")
    (folder / "compare.json").write_text("{}")
    write_outcome(folder, Outcome(COMPLETE))
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
    write_run(tmp_path / "runs" / "3x3" / "future" / "seed-1", [0.2], has_ended=False)
    assert run_main(monkeypatch, f"research.{experiment}", "report", tmp_path / "runs", tmp_path / "out") == 2
    assert "holds no run that has ended" in capsys.readouterr().err.splitlines()[-1]


def test_a_report_names_what_has_not_ended(tmp_path: Path, monkeypatch, capsys):
    write_run(tmp_path / "runs" / "text" / "next token" / "seed-1", [0.2])
    write_run(tmp_path / "runs" / "text" / "future, weight 0.1" / "seed-1", [0.2], has_ended=False)
    assert run_main(monkeypatch, "research.real_text", "report", tmp_path / "runs", tmp_path / "out") == 0
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}/runs/text/future, weight 0.1/seed-1: it has not ended"]


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


def test_a_folder_of_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    (planned, _) = pathstar.list_runs("laptop", seed=1)
    run = planned.build(tmp_path)
    assert run.budget.amount == 1000 * 4864 and run.options["training.seed"] == 1
    write_record(run)
    check_folders([run])
    with pytest.raises(UserError, match="a budget of 4,864,000 tokens"):
        check_folders([planned._replace(options=planned.options | {"training.steps": 500}).build(tmp_path)])
    with pytest.raises(UserError, match="no such option"):
        planned._replace(options=planned.options | {"training.no_such_key": 1}).build(tmp_path)
