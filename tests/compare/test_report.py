"""The report, from made-up folders of runs: figures by hand, pairs that are none, runs that failed."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flame.cli.compare import main
from flame.compare.analysis import analyse, read_results
from flame.compare.curves import find_band
from flame.compare.metrics import Metric
from flame.compare.outcomes import FAILED, STOPPED, Outcome
from flame.compare.report import show_p, write_report
from flame.compare.results import read_result
from flame.compare.runs import Run, list_runs, read_spec
from flame.compare.spec import Spec
from tests.support.comparisons import write_result, write_spec

ENDS = {"next_token": [0.50, 0.60, 0.70], "mtp": [0.65, 0.70, 0.75], "future": [0.95, 0.92, 0.97]}
"""Exact match at the end, with seeds 1 to 3."""


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return read_spec(write_spec(tmp_path))


def write_all(spec: Spec, without: tuple[tuple[str, int], ...] = ()) -> list[Run]:
    """Runs that begin at 0.1 and end at `ENDS`."""
    runs = list_runs(spec)
    for run in runs:
        if (run.arm, run.seed) not in without:
            write_result(run, [0.1, ENDS[run.arm][run.seed - 1]], data=f"d{run.seed}", weights=f"w{run.seed}")
    return runs


def read_tables(path: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines() if "|" in line]


def test_a_report_by_hand(spec: Spec):
    write_report(spec, write_all(spec))
    rows = read_tables(spec.out / "report.md")
    # mtp less next_token: 0.15, 0.10, 0.05; mean 0.1, sd 0.05, error 0.028868, t = 3.4641, p = 0.074180; 4.30265 errors: 0.12421.
    mtp = ["mtp", "3/3", "0.7000 ± 0.0500", "+0.1000", "[-0.0242, +0.2242]", "+16.67", "3/3", "0.074", "0.074", "0/3", "-"]
    assert mtp in rows
    # future less next_token: 0.45, 0.32, 0.27; mean 0.346667, sd 0.092916; t = 6.46219, p = 0.0231, times 2 by Holm: 0.0462.
    future = next(row for row in rows if row[:2] == ["future", "3/3"])
    assert future[2:9] == ["0.9467 ± 0.0252", "+0.3467", "[+0.1159, +0.5775]", "+57.78", "3/3", "0.023", "0.046"]
    assert future[9:] == ["3/3", "0.02"]  # each reaches 0.9 at step 20, after 20,000 tokens
    assert rows[1 + rows.index(next(row for row in rows if row[0] == "arm")) + 1][:4] == [
        "next_token",
        "3/3",
        "0.6000 ± 0.1000",
        "-",
    ]
    assert ["mtp", "20", "0.02", "0.04", "0.5", "10", "1.50", "a chip"] in rows
    text = (spec.out / "report.md").read_text()
    assert "fewer than five" in text and "Not counted" not in text
    assert (spec.out / "report.png").stat().st_size > 5000
    with (spec.out / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9 and lines[1]["arm"] == "mtp" and float(lines[1]["validation_exact_match"]) == 0.65
    assert float(lines[1]["tokens"]) == 20_000 and lines[1]["outcome"] == "complete"


def test_a_run_that_failed_is_counted_and_named(spec: Spec):
    runs = write_all(spec, without=(("mtp", 1), ("future", 2), ("future", 3)))
    by_name = {(run.arm, run.seed): run for run in runs}
    write_result(by_name["mtp", 1], [0.1], outcome=Outcome(FAILED, "exit code 1: out of memory"))
    write_result(by_name["future", 2], [0.1, None])  # not finite
    write_report(spec, runs)  # future 3 was never started
    text = (spec.out / "report.md").read_text()
    for line in (
        "graphs: mtp, seed 1: failed, exit code 1: out of memory",
        "future, seed 2: validation_exact_match is not finite",
    ):
        assert line in text
    assert "graphs: future, seed 3: unfinished" in text and "7 of 9 runs have ended" in text
    rows = read_tables(spec.out / "report.md")
    assert next(row[1] for row in rows if row[0] == "mtp") == "2/3"
    future = next(row for row in rows if row[0] == "future")
    assert future[1:9] == ["1/3", "0.9500", "+0.4500", "-", "+90.00", "1/1", "-", "-"]
    # The goal was reached once; all three count: 20,000, 20,000 and nothing of the one that never began.
    assert future[9:] == ["1/3", "0.04"]


def test_a_start_that_came_to_nothing_does_not_count(spec: Spec):
    """It failed before its first checkpoint, on other data; then the run began again. Later starts go on from a checkpoint."""
    run = write_all(spec)[0]
    path = run.folder / "first_step.jsonl"
    begun = json.loads(path.read_text())
    lines = [begun | {"data": "old", "device": "old chip"}, begun, begun | {"step": 11, "data": "later", "device": "new chip"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = read_result(run.folder)
    assert result.first_step == begun and result.device == "a chip and new chip"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": "other"}, "the first batches differ"),
        ({"weights": "other"}, "initial weights differ"),
    ],
)
def test_a_pair_that_is_none_is_left_out_and_named(spec: Spec, change: dict[str, str], reason: str):
    runs = write_all(spec, without=(("mtp", 2),))
    run = next(run for run in runs if (run.arm, run.seed) == ("mtp", 2))
    write_result(run, [0.1, 0.7], **({"data": "d2", "weights": "w2"} | change))
    found = analyse(spec, read_results(runs))
    assert found.uncounted == (f"graphs: mtp and next_token are no pair with seed 2: {reason}",)
    row = next(row for row in found.rows if row.arm == "mtp")
    assert row.paired is not None and row.paired.pairs == 2 and len(row.values) == 3
    assert row.paired.mean == pytest.approx(0.1)


def test_runs_of_different_seeds_are_no_pair(spec: Spec):
    """As if the file of a run had been copied into the folder of another seed."""
    runs = write_all(spec)
    one, other = (next(run for run in runs if (run.arm, run.seed) == ("mtp", seed)) for seed in (1, 2))
    (one.folder / "first_step.jsonl").write_text((other.folder / "first_step.jsonl").read_text())
    assert any("mtp and next_token are no pair with seed 1" in line for line in analyse(spec, read_results(runs)).uncounted)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("training.num_streams = 2", "training.num_streams = 1 and 2"),
        ("pathstar.graphs = 1000", "pathstar.graphs = 0 and 1000"),
        ("validation.num_sequences = 9", "validation.num_sequences = 4 and 9"),
        ('training.answer_separator = "?"', "training.answer_separator"),
    ],
)
def test_an_option_that_decides_the_data_breaks_a_pair(tmp_path: Path, option: str, told: str):
    spec = read_spec(write_spec(tmp_path, old='name = "mtp"', new=f'name = "mtp"\n{option}'))
    found = analyse(spec, read_results(write_all(spec)))
    assert len(found.uncounted) == 3 and told in found.uncounted[0]
    assert next(row for row in found.rows if row.arm == "mtp").paired is None


@pytest.mark.parametrize(
    ("option", "metric", "told"),
    [
        ('training.loss_on = "all"', "validation_ce_loss", "training.loss_on = answer and all"),
        ("evaluation.num_questions = 5", "evaluation/books/ce_loss", "evaluation.num_questions = 1000 and 5"),
        ("held_out.books.num_documents = 5", "evaluation/books/ce_loss", "held_out.books.num_documents = 1000 and 5"),
    ],
)
def test_what_one_metric_is_measured_on_breaks_its_pairs_alone(tmp_path: Path, option: str, metric: str, told: str):
    path = Path(write_spec(tmp_path, old='name = "mtp"', new=f'name = "mtp"\n{option}'))
    held_out = 'evaluation.interval = 10\nheld_out.books.dataset = "pathstar"\nheld_out.books.dataset_name = "3x3"\n'
    text = path.read_text().replace("[arms.next_token]", held_out + "[arms.next_token]")
    path.write_text(text.partition("[metrics")[0] + '[metrics.validation_ce_loss]\n[metrics."evaluation/books/ce_loss"]\n')
    spec = read_spec(str(path))
    for run in list_runs(spec):
        write_result(run, [0.1, 0.2])
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('\n{"step": 20, "validation_ce_loss": 1.0, "evaluation/books/ce_loss": 2.0}\n')
    found = analyse(spec, read_results(list_runs(spec)))
    assert found.uncounted[0] == f"graphs: mtp and next_token are no pair with seed 1 for {metric}: {told}"
    assert len(found.uncounted) == 3
    paired = {row.metric.name: row.paired is not None for row in found.rows if row.arm == "mtp"}
    assert paired == {name: name != metric for name in ("validation_ce_loss", "evaluation/books/ce_loss")}


def test_what_a_reader_is_warned_of(spec: Spec):
    runs = write_all(spec)
    first = runs[0].folder / "first_step.jsonl"
    first.write_text(json.dumps(json.loads(first.read_text()) | {"device": "another chip"}) + "\n")
    (runs[1].folder / "starts.jsonl").write_text(json.dumps({"git_revision": "def"}) + "\n")
    for run, state in zip(runs[2:4], ("1", "2"), strict=True):
        (run.folder / "starts.jsonl").write_text(json.dumps({"git_revision": f"{'c' * 40}-dirty-{state}"}) + "\n")
    stopping = replace(spec, parallel=2, metrics=(Metric("validation_exact_match", True, stop_at=1.0),))
    notes = " ".join(analyse(stopping, read_results(runs)).notes)
    for part in (
        "3 seeds are fewer",
        "different devices (a chip; another chip)",
        "4 revisions of the code: abc, cccccccc-dirty-1, cccccccc-dirty-2, def",
        "shared a device",
    ):
        assert part in notes
    assert "end early" in notes


def test_five_seeds_are_enough(tmp_path: Path):
    spec = read_spec(write_spec(tmp_path, old="[1, 2, 3]", new="[1, 2, 3, 4, 5]"))
    assert not any("seeds" in note for note in analyse(spec, read_results(list_runs(spec))).notes)


def test_a_band_is_mean_and_deviation_and_keeps_who_stopped(tmp_path: Path, spec: Spec):
    runs = list_runs(spec)[:4]
    curves = [[0.1, 0.5, 0.6], [0.3, 0.9], [0.2, 0.1, 0.3], [0.9, 0.9]]
    for run, curve, state in zip(runs, curves, ("complete", STOPPED, "complete", FAILED), strict=True):
        write_result(run, curve, outcome=Outcome(state), step_seconds=1.0 if state == STOPPED else 0.5)
    band = find_band([read_result(run.folder) for run in runs], "validation_exact_match", "tokens")
    full = np.array([[0.1, 0.5, 0.6], [0.3, 0.9, 0.9], [0.2, 0.1, 0.3]])
    assert band.at == [10_000, 20_000, 30_000]
    slow = json.loads((runs[0].folder / "metrics.jsonl").read_text().splitlines()[0])["step_seconds"]
    seconds = find_band([read_result(run.folder) for run in runs], "validation_exact_match", "seconds")
    assert seconds.at == pytest.approx([slow * step * 4 / 3 for step in (10, 20, 30)])
    assert band.mean == pytest.approx(full.mean(0).tolist()) and band.deviation == pytest.approx(full.std(0, ddof=1).tolist())


def test_a_name_with_dollars_is_no_formula(tmp_path: Path):
    path = write_spec(tmp_path, old="[arms.mtp]", new='[arms."$x_$ 3$"]')
    text = Path(path).read_text().replace("[tasks.graphs]", '[tasks."$a_$ b"]')
    Path(path).write_text(text.replace("[metrics.validation_exact_match]", '[metrics."$m^$"]\nbetter = "lower"'))
    spec = read_spec(path)
    runs = list_runs(spec)
    for run in runs:
        write_result(run, [0.1, 0.2])
    write_report(spec, runs)
    assert (spec.out / "report.png").stat().st_size > 5000


def test_equal_differences_have_no_interval_and_still_count_for_holm(spec: Spec):
    runs = list_runs(spec)
    ends = {"next_token": [0.50, 0.60, 0.70], "mtp": [0.75, 0.85, 0.95], "future": [0.95, 0.92, 0.97]}
    for run in runs:
        write_result(run, [0.1, ends[run.arm][run.seed - 1]], data=f"d{run.seed}", weights=f"w{run.seed}")
    write_report(spec, runs)
    rows = read_tables(spec.out / "report.md")
    assert next(row[3:9] for row in rows if row[0] == "mtp") == ["+0.2500", "-", "+41.67", "3/3", "-", "-"]
    assert next(row[7:9] for row in rows if row[0] == "future") == ["0.023", "0.046"]  # still one of two
    assert "differ by the same on all seeds" in " ".join((spec.out / "report.md").read_text().split())


def test_wall_clock_is_the_time_that_the_steps_took(spec: Spec):
    """10 steps of 3 s, in which layers compile, then 10 of 1 s and 20 of 0.5 s."""
    folder = list_runs(spec)[0].folder
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "step_tflops": 2.0, "tokens_seen": 1000 * step, "step_seconds": seconds}
        for step, seconds in ((10, 3.0), (20, 1.0), (40, 0.5))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_result(folder).wall_seconds == 50.0


def test_costs_between_two_log_lines(spec: Spec):
    run = list_runs(spec)[0]
    write_result(run, [0.1, 0.2])
    progress = read_result(run.folder).progress
    assert progress.find("tokens", 15) == 15_000 and progress.find("tflops", 5) == 10 and progress.find("seconds", 20) == 10
    assert progress.find("tokens", 99) == 20_000


@pytest.mark.parametrize(("p", "shown"), [(0.5, "0.500"), (0.0012, "0.0012"), (1e-9, "< 0.0001")])
def test_a_p_value_is_shown(p: float, shown: str):
    assert show_p(p) == shown


def test_the_command_reports_and_says_how_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write_spec(tmp_path)
    runs = write_all(read_spec(path), without=(("mtp", 3),))
    assert main([path, "--report"]) == 75
    assert "graphs: mtp, seed 3: unfinished" in capsys.readouterr().err
    write_result(runs[7], [0.1], outcome=Outcome(FAILED, "exit code 1: no"))
    assert main([path, "--report"]) == 1
    assert main([path, "--count"]) == 0 and capsys.readouterr().out.splitlines()[-1] == "9"
    assert main([path, "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[7].split() == ["7", "failed", "graphs/mtp/seed", "3"]
    assert main([path, "--element", "9"]) == 2
    assert capsys.readouterr().err == "--element 9: allowed is 0 to 8\n"
    assert main([path, "--element", "0"]) == 0  # it is done: nothing is started


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write_spec(tmp_path)
    (tmp_path / "out").write_text("a file")
    for options in (["--report"], []):
        assert main([path, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'"{tmp_path}/out') and line.endswith("choose another compare.out")


def test_nothing_to_report_is_a_report(spec: Spec):
    spec.out.mkdir()
    write_report(spec, list_runs(spec))
    assert "0 of 9 runs have ended" in (spec.out / "report.md").read_text()
    assert math.isnan(read_result(list_runs(spec)[0].folder).wall_seconds)
