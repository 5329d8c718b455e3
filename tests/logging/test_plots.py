from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from flame.config.run import Metrics
from flame.errors import UserError
from flame.logging.plots import draw, main, plot_run, read_metrics
from flame.logging.run_log import RunLog
from flame.logging.writers.base import RunIdentity
from tests.support.paths import REPO

CE = {"ce_loss": 3.0}
FUTURE = {"aux_loss": 4.0, "mi_lower_bound": 2.0, "infonce_accuracy": 0.25, "positive_cosine": 0.5, "negative_cosine": -0.1}


def write_run(folder: Path, *rows: dict[str, float]) -> Path:
    log = RunLog(Metrics(), RunIdentity(folder, 0, "", {}, None))
    for step, row in enumerate(rows, start=1):
        log.log(step, row)
    log.close()
    return folder


def get_panels(figure: Figure) -> list[Any]:
    return figure.axes


def read_titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def read_curves(axes: Any) -> dict[str, list[float | None]]:
    return {line.get_label(): [None if math.isnan(y) else y for y in line.get_ydata()] for line in axes.lines}


def test_chance_is_that_of_the_summaries_alone(tmp_path):
    """`aux_loss` also holds the action loss."""
    figure = draw({"a": read_metrics(write_run(tmp_path / "a", CE | FUTURE | {"action_loss": 0.5}, CE | FUTURE))})
    assert read_curves(get_panels(figure)[1])["ln N (chance)"] == [5.5, 6.0]


def test_three_panels_hold_the_numbers_of_the_file(tmp_path):
    rows = read_metrics(write_run(tmp_path / "a", CE | FUTURE, {"ce_loss": 2.5, "aux_loss": 3.0, "mi_lower_bound": 3.5}))
    figure = draw({"a": rows})
    assert read_titles(figure) == ["Next-token loss", "Auxiliary loss", "Predictions of the future"]
    left, middle, right = get_panels(figure)
    assert read_curves(left) == {"cross entropy": [3.0, 2.5]}
    assert read_curves(middle) == {"training": [4.0, 3.0], "ln N (chance)": [6.0, 6.5]}
    assert read_curves(right) == {
        "accuracy": [0.25, None], "cosine, own future": [0.5, None], "cosine, others": [-0.1, None],
    }  # fmt: skip
    assert middle.lines[1].get_linestyle() == "--"
    for axes in get_panels(figure):
        assert axes.get_xlabel() == "step" and axes.get_ylabel()
        assert list(axes.lines[0].get_xdata()) == [1, 2]


@pytest.mark.parametrize(
    ("row", "titles"),
    [(CE, ["Next-token loss"]), (FUTURE, ["Auxiliary loss", "Predictions of the future"]),
     (CE | {"infonce_accuracy": math.nan}, ["Next-token loss"])],
)  # fmt: skip
def test_panels_without_numbers_are_left_out(tmp_path, row, titles):
    assert read_titles(draw({"a": read_metrics(write_run(tmp_path, row, row))})) == titles


def test_a_number_that_is_not_finite_leaves_a_gap(tmp_path):
    rows = read_metrics(write_run(tmp_path, CE, CE, {"ce_loss": math.inf}, CE))
    (line,) = get_panels(draw({"a": rows}))[0].lines
    assert [math.isfinite(y) for y in line.get_ydata()] == [True, True, False, True]
    assert line.get_marker() == "o", "the point after the gap stands alone, and a line would not show it"


def test_runs_are_told_apart_by_colour_and_curves_by_style(tmp_path):
    both, plain = write_run(tmp_path / "both", *[CE | FUTURE] * 2), write_run(tmp_path / "plain", *[{"ce_loss": 2.0}] * 2)
    figure = draw({"both": read_metrics(both), "plain": read_metrics(plain)})
    (legend,) = figure.legends
    entries = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    left, _, right = get_panels(figure)
    assert [line.get_color() for line in left.lines] == [entries["both"], entries["plain"]]
    assert entries.keys() == {"both", "plain"} and entries["both"] != entries["plain"]
    assert {line.get_color() for line in right.lines} == {entries["both"]}
    assert len({line.get_linestyle() for line in right.lines}) == 3
    quantities = right.get_legend()
    assert [text.get_text() for text in quantities.get_texts()] == [line.get_label() for line in right.lines]


def test_plot_run_writes_a_png_of_the_proportions_3_to_1(tmp_path):
    out = plot_run(write_run(tmp_path / "a", *[CE | FUTURE] * 3))
    assert out == tmp_path / "a" / "curves.png"
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width == 3 * height >= 1200


def test_a_line_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path, CE)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ce_l')
    assert read_metrics(folder) == [{"step": 1, "ce_loss": 3.0}]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("", "no metrics in it yet"), (json.dumps({"step": 1, "lr": 0.1}), "no finite loss")],
)
def test_nothing_to_draw_is_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(("out", "message"), [("x.jpg", "png"), ("missing/x.png", "cannot be written")])
def test_a_picture_that_cannot_be_written_is_the_users_mistake(tmp_path, out, message):
    with pytest.raises(UserError, match=message):
        plot_run(write_run(tmp_path, CE), tmp_path / out)


def test_command_line_tells_runs_of_the_same_name_apart(tmp_path):
    folders = [write_run(tmp_path / parent / "run", CE, CE) for parent in "ab"]
    out = tmp_path / "both.png"
    command = [sys.executable, "-m", "flame.logging.plots", *map(str, folders), "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    assert process.stdout == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_validation_is_a_curve_of_its_own() -> None:
    """Its rows stand between those of the training and leave no gap in their curve."""
    rows: list[dict[str, float | None]] = [
        {"step": 1, "ce_loss": 3.0},
        {"step": 2, "ce_loss": 2.0},
        {"step": 2, "validation_ce_loss": 2.5, "validation_loss": 2.6},
        {"step": 3, "ce_loss": 1.5},
        {"step": 4, "validation_ce_loss": 1.75, "validation_loss": 1.9},
    ]
    (axes,) = draw({"run": rows}).axes
    curves = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert curves == {"cross entropy": ([1, 2, 3], [3.0, 2.0, 1.5]), "validation": ([2, 4], [2.5, 1.75])}


def test_time_and_memory_have_a_row_below(tmp_path):
    speed = {"step_seconds": 0.5, "data_wait_fraction": 0.2, "tokens_per_second": 128.0, "peak_memory_gib": 2.5}
    rows = read_metrics(write_run(tmp_path / "a", CE | FUTURE | speed, CE | FUTURE | speed | {"step_seconds": 0.25}))
    figure = draw({"a": rows})
    assert read_titles(figure)[3:] == ["Time of a step", "Speed", "Memory"]
    time, speed_panel, memory = get_panels(figure)[3:]
    assert read_curves(time) == {"whole step": [0.5, 0.25], "waiting for data": [0.1, 0.05]}
    assert read_curves(speed_panel) == {"all GPUs": [128.0, 128.0]} and read_curves(memory) == {"peak": [2.5, 2.5]}
    assert [axes.get_subplotspec().rowspan.start for axes in get_panels(figure)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.slow
def test_a_start_does_not_wait_for_the_library_that_draws():
    program = "import sys, flame.train; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO)


@pytest.mark.parametrize("names", [["$^$"], ["$^$", "lr$_{$"]])
def test_a_folder_with_dollars_is_no_formula(tmp_path, names):
    folders = [write_run(tmp_path / name, CE, CE) for name in names]
    assert main([*map(str, folders), "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize("count", [2, 10, 11, 24])
def test_each_run_has_a_color_of_its_own(count):
    figure = draw({f"run {number}": [{"step": 1.0, **CE}, {"step": 2.0, **CE}] for number in range(count)})
    shown = [to_hex(line.get_color()) for line in figure.legends[0].get_lines()]
    assert shown == [to_hex(line.get_color()) for line in get_panels(figure)[0].lines]
    assert len(set(shown)) == count and (count > 10 or shown == [to_hex(f"C{index}") for index in range(count)])
