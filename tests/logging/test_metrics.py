from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.config.run import Metrics as MetricsOptions
from flame.errors import UserError
from flame.logging.console import format_line, init_logging
from flame.logging.metrics import Metrics
from flame.logging.run_log import RunLog
from flame.logging.writers.base import MetricWriter, RunIdentity
from flame.logging.writers.json_lines import METRICS_FILE
from flame.logging.writers.panels import name_panel
from flame.logging.writers.wandb import WandbWriter, _keep_id
from flame.objectives.future.objective import FutureObjective
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")
WORLD = 2

# --- Metrics, one process ---

records = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(-1e6, 1e6, width=32), st.integers(0, 1000), st.booleans()), max_size=12
)


@settings(max_examples=50)
@given(records)
def test_collect_equals_a_plain_loop(records):
    metrics = Metrics(CPU)
    for name, value, count, as_tensor in records:
        wrap = torch.tensor if as_tensor else lambda number: number
        metrics.record_mean(f"mean_{name}", wrap(value), wrap(count))
        metrics.record_sum(f"sum_{name}", wrap(value))
        metrics.record_max(f"max_{name}", wrap(value))
        metrics.record_last(f"last_{name}", wrap(value))
    expected = {}
    for name in {record[0] for record in records}:
        values = [value for other, value, _, _ in records if other == name]
        count = sum(count for other, _, count, _ in records if other == name)
        if count:
            expected[f"mean_{name}"] = pytest.approx(sum(values) / count)
        expected |= {f"sum_{name}": pytest.approx(sum(values)), f"max_{name}": max(values), f"last_{name}": values[-1]}
    assert metrics.collect() == expected
    assert metrics.collect() == {}


def test_small_dtypes_do_not_lose_terms():
    metrics = Metrics(CPU)
    for _ in range(1000):
        metrics.record_sum("a", torch.tensor(1.0, dtype=torch.bfloat16))
    assert metrics.collect() == {"a": 1000.0}


def test_a_record_keeps_neither_the_graph_nor_the_callers_memory():
    metrics = Metrics(CPU)
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    buffer = torch.tensor(5.0, dtype=torch.float64)
    metrics.record_sum("loss", weight * 3)
    metrics.record_last("buffer", buffer)
    metrics.record_max("largest", buffer)
    buffer.fill_(-1)
    assert not getattr(metrics._sums["loss"], "requires_grad", True)
    assert metrics.collect() == {"loss": 6.0, "buffer": 5.0, "largest": 5.0}


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan]])
def test_a_nan_is_never_hidden(values):
    metrics = Metrics(CPU)
    for value in values:
        metrics.record_max("max", value)
        metrics.record_sum("sum", value)
        metrics.record_mean("mean", value, 1)
    assert all(math.isnan(value) for value in metrics.collect().values())


def test_one_name_has_one_reduction():
    metrics = Metrics(CPU)
    metrics.record_sum("a", 1.0)
    metrics.record_max("a", 1.0)
    with pytest.raises(AssertionError, match="two reductions"):
        metrics.collect()


def test_recording_does_not_read_the_value():
    """Reading a value is what waits for a device. A meta tensor has none to read."""
    metrics = Metrics(torch.device("meta"))
    value = torch.tensor(1.0, device="meta")
    for _ in range(2):
        metrics.record_mean("mean", value, value)
        metrics.record_sum("sum", value)
        metrics.record_max("max", value)
        metrics.record_last("last", value)


# --- Metrics, two processes ---


def _record_of(rank: int) -> list[tuple[float, int]]:
    """(sum, count) of each micro-step of a rank; the counts differ between ranks."""
    return [[(12.5, 5), (0.0, 0), (3.25, 2)], [(100.0, 50)]][rank]


def collect_on_rank(folder: Path) -> list:
    rank = torch.distributed.get_rank()
    metrics = Metrics(CPU)
    for total, count in _record_of(rank):
        metrics.record_mean("ce_loss", torch.tensor(total), torch.tensor(count))
        metrics.record_mean("never", torch.tensor(0.0), 0)
        metrics.record_sum("tokens", count)
        metrics.record_max("peak", torch.tensor(total))
    metrics.record_max("nan_on_0", math.nan if rank == 0 else 1.0)
    metrics.record_max("nan_on_1", math.nan if rank == 1 else 1.0)
    metrics.record_last("lr", 10.0 + rank)
    first = metrics.collect()
    metrics.record_max("only", -1.0 - rank)
    second = metrics.collect()
    third = metrics.collect()

    names = ["loss", f"extra_{rank}"]
    for name in names:
        metrics.record_sum(name, 1.0)
    try:
        metrics.collect()
        mismatch = "unnoticed"
    except AssertionError as error:
        mismatch = str(error)
    return [first, second, third, mismatch]


@pytest.fixture(scope="module")
def collected_by_rank(tmp_path_factory):
    return run_on_ranks(WORLD, tmp_path_factory.mktemp("ranks") / "run", collect_on_rank)


def test_collect_over_ranks_equals_a_plain_loop(collected_by_rank):
    everything = [record for rank in range(WORLD) for record in _record_of(rank)]
    total, count = sum(total for total, _ in everything), sum(count for _, count in everything)
    for rank, (first, second, third, _) in enumerate(collected_by_rank):
        assert math.isnan(first.pop("nan_on_0"))
        assert math.isnan(first.pop("nan_on_1"))
        assert first == {"ce_loss": total / count, "tokens": count, "peak": 100.0, "lr": 10.0 + rank}
        assert second == {"only": -1.0}
        assert third == {}


def test_ranks_with_different_names_are_stopped(collected_by_rank):
    for rank, (*_, mismatch) in enumerate(collected_by_rank):
        assert f"extra_{rank}" in mismatch


# --- RunLog ---


def open_log(folder: Path, start_step: int = 0, is_main: bool = True, **services: bool) -> RunLog:
    options = MetricsOptions(**{f"enable_{name}": value for name, value in services.items()})
    return RunLog(options, describe_run(folder, start_step) if is_main else None)


def describe_run(folder: Path, start_step: int = 0) -> RunIdentity:
    return RunIdentity(folder, start_step, "a test", {"optimizer": {"lr": 1e-3}}, None)


def write_steps(log: RunLog, steps: range, value: float) -> None:
    for step in steps:
        log.log(step, {"loss": value})
    log.close()


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_lines_are_on_disk_before_close(tmp_path):
    log = open_log(tmp_path / "new")
    log.log(1, {"loss": 0.5})
    assert (tmp_path / "new" / METRICS_FILE).read_text() == '{"step": 1, "loss": 0.5}\n'
    log.close()


def test_every_line_is_strict_json(tmp_path):
    log = open_log(tmp_path)
    log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}


LAST_LINE = b'{"step": 4, "loss": 1.0}\n'


@pytest.mark.parametrize("kept_bytes", range(len(LAST_LINE) + 1))
def test_a_resumed_curve_has_each_step_once_wherever_the_file_was_torn(tmp_path, kept_bytes):
    write_steps(open_log(tmp_path), range(1, 5), value=1.0)
    path = tmp_path / METRICS_FILE
    assert path.read_bytes().endswith(LAST_LINE)
    os.truncate(path, path.stat().st_size - len(LAST_LINE) + kept_bytes)

    write_steps(open_log(tmp_path, start_step=2), range(3, 7), value=2.0)
    assert read_rows(tmp_path) == [{"step": step, "loss": 1.0 if step <= 2 else 2.0} for step in range(1, 7)]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize("torn", [LAST_LINE.rstrip(), b'{"step": 4, "lo', b"\0\0\0", b"\xff"])
def test_a_torn_line_does_not_spoil_the_next(tmp_path, torn):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 3, "loss": 1.0}\n' + torn)
    write_steps(open_log(tmp_path, start_step=4), range(5, 6), value=2.0)
    assert [row["step"] for row in read_rows(tmp_path)] == ([3, 4, 5] if torn == LAST_LINE.rstrip() else [3, 5])


def test_other_ranks_write_nothing(tmp_path):
    write_steps(open_log(tmp_path / "run", is_main=False, tensorboard=True, wandb=True), range(1, 3), value=1.0)
    assert not (tmp_path / "run").exists()


def test_services_that_are_off_are_not_imported(tmp_path):
    script = (
        "import sys, pathlib\nfrom flame.logging.run_log import RunLog\nfrom flame.config.schema import Metrics\n"
        "from flame.logging.writers.base import RunIdentity\n"
        "RunLog(Metrics(), RunIdentity(pathlib.Path(sys.argv[1]), 0, '', {}, None)).close()\n"
        "assert not {'wandb', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_tensorboard_shows_the_resumed_curve(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_steps(open_log(tmp_path, tensorboard=True), range(1, 5), value=1.0)
    log = open_log(tmp_path, start_step=2, tensorboard=True)
    log.log(3, {"loss": 2.0})

    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    log.close()


def test_tensorboard_shows_texts(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = open_log(tmp_path, tensorboard=True)
    log.log_texts(3, "completions", [{"prompt": "a", "completion": "b\nc"}])
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (event,) = events.Tensors("evaluation/completions/0/text_summary")
    (text,) = event.tensor_proto.string_val
    assert event.step == 3 and text.decode() == "**prompt**\n\n    a\n\n**completion**\n\n    b\n    c"
    log.close()


@pytest.mark.parametrize(
    ("name", "panel"),
    [
        ("ce_loss", "train/ce_loss"),
        ("ce_loss/web", "train/ce_loss/web"),
        ("tokens_seen", "train/tokens_seen"),
        ("validation_ce_loss", "val/ce_loss"),
        ("validation_exact_match/5x5", "val/exact_match/5x5"),
        ("tokens_per_second", "perf/tokens_per_second"),
        ("mfu_heads", "perf/mfu_heads"),
        ("future/rank_predictions", "future/rank_predictions"),
        ("my_objective/own", "my_objective/own"),
        ("evaluation/web/bits_per_byte", "evaluation/web/bits_per_byte"),
    ],
)
def test_panels_are_grouped_by_what_they_show(name, panel):
    assert name_panel(name) == panel


class FakeWandb:
    """What the writer uses of the package."""

    def __init__(self, offline: bool):
        self.offline, self.url, self.logged = offline, "https://wandb.example/run", []
        self.Settings = dict
        self.Table = lambda columns, data: ("table", columns, data)

    def init(self, **options):
        self.options = options
        return self

    def define_metric(self, *_args, **_options):
        pass

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_is_named_shown_and_grouped(tmp_path, monkeypatch, caplog, offline):
    fake = FakeWandb(offline)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_NAME", "given")
    monkeypatch.delenv("WANDB_RUN_NAME", raising=False)
    caplog.set_level("INFO", "flame")
    WandbWriter(describe_run(tmp_path)).log(3, {"loss": 1.0, "mfu": 0.5})
    assert fake.options["name"] == "given" and fake.logged == [{"step": 3, "train/loss": 1.0, "perf/mfu": 0.5}]
    (line,) = caplog.messages
    WandbWriter(describe_run(tmp_path)).log_texts(4, "completions", [{"prompt": "a", "completion": "b"}])
    assert fake.logged[1] == {"step": 4, "evaluation/completions": ("table", ["prompt", "completion"], [["a", "b"]])}
    assert line == f"Weights & Biases: {f'offline, in {tmp_path}/wandb' if offline else fake.url}"


@pytest.fixture
def clean_wandb(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return monkeypatch


WANDB_SCRIPT = """
import sys, pathlib, wandb
from flame.logging.run_log import RunLog
from flame.logging.writers.base import RunIdentity
from flame.config.schema import Metrics
folder, start = pathlib.Path(sys.argv[1]), int(sys.argv[2])
stdin = sys.stdin
run = RunIdentity(folder, start, "a test", {"optimizer": {"lr": 1e-3}}, None)
log = RunLog(Metrics(enable_wandb=True), run)
assert sys.stdin is stdin
run = wandb.run
for step in range(start + 1, start + 4):
    log.log(step, {"loss": float(step)})
facts = [run.id, run.project, run.name, run.notes, run.config["optimizer"]["lr"], run.offline, dict(run.summary)["train/loss"]]
print("hello")
log.close()
(folder / f"facts_{start}").write_text(repr(facts))
"""


@pytest.mark.slow
def test_wandb_offline_continues_the_same_run(tmp_path, clean_wandb):
    clean_wandb.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "my_run"
    facts = []
    for start, name in ((0, None), (2, "given")):
        if name:
            clean_wandb.setenv("WANDB_NAME", name)
            clean_wandb.setenv("WANDB_PROJECT", "mine")
        process = subprocess.run(
            [sys.executable, "-c", WANDB_SCRIPT, str(folder), str(start)], capture_output=True, text=True, check=True
        )
        assert (process.stdout, process.stderr) == ("hello\n", ""), "wandb chats"
        facts.append((folder / f"facts_{start}").read_text())
    known = (folder / "wandb_id.txt").read_text().strip()
    assert facts == [
        repr([known, "flame", "my_run", "a test", 1e-3, True, 3]),
        repr([known, "mine", "given", "a test", 1e-3, True, 5]),
    ]
    assert not list((folder / "wandb").rglob("output.log")), "wandb captures the console"
    # In wandb's protocol: the metrics of the glob "*" are drawn over "step".
    (written, *_) = (folder / "wandb").glob(f"offline-run-*/run-{known}.wandb")
    assert b'\x12\x01*"\x04step' in written.read_bytes()


@pytest.mark.slow
def test_wandb_without_a_login_is_one_line_and_does_not_ask(tmp_path, clean_wandb):
    pty = pytest.importorskip("pty")
    script = (
        "import sys, pathlib\nfrom flame.logging.run_log import RunLog\nfrom flame.config.schema import Metrics\n"
        "from flame.errors import UserError\nfrom flame.logging.writers.base import RunIdentity\n"
        "run = RunIdentity(pathlib.Path(sys.argv[1]), 0, '', {}, None)\n"
        "assert sys.stdin.isatty() and sys.stderr.isatty()\n"
        "try:\n    RunLog(Metrics(enable_wandb=True), run)\n"
        "except UserError as error:\n    print(error)\n"
    )
    terminal, end = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=end, stderr=end, stdout=subprocess.PIPE, text=True, timeout=30, check=True, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    os.close(end)
    assert process.stdout.count("\n") == 1
    assert "WANDB_MODE=offline" in process.stdout
    assert "metrics.enable_wandb = false" in process.stdout


@pytest.mark.parametrize(("service", "package"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_the_users_to_install(tmp_path, monkeypatch, service, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {service}, or set metrics.enable_{service} = false"):
        open_log(tmp_path, **{service: True})


# --- the console ---

EVERYTHING = {
    "loss": 2.4134, "ce_loss": 2.31, "aux_loss": 1.034, "mi_lower_bound": 7.976, "infonce_accuracy": 0.41, "grad_norm": 0.87,
    "lr": 3e-4, "tokens_per_second": 12_400.0, "mfu": 0.412, "peak_memory_gib": 3.1, "data_wait_fraction": 0.01,
}  # fmt: skip


def describe_future(values: Mapping[str, float], prefix: str = "") -> str:
    """What the future loss says of itself behind its value."""
    return FutureObjective.describe_metrics(None, values, prefix)  # type: ignore[arg-type]  # it has no state to say


def test_the_line_shows_every_field():
    line = format_line(120, 300, EVERYTHING, 133, describe_future)
    assert line == (
        "step 120/300 · loss  2.413 · ce  2.310 · aux  1.034 (ln N  9.01) · top-1  41.0% · grad   0.87 · lr 3.0e-04 · "
        " 12.4k tok/s · mfu 41.2% ·   3.1 GiB · waiting   1% · eta 2m 13s"
    )


def test_absent_fields_are_left_out():
    assert format_line(7, 10, {"loss": 1.0, "tokens_seen": 4.0}, 5) == "step  7/10 · loss  1.000 · eta 5s"
    assert format_line(7, 10, {"aux_loss": 1.0}, 5) == "step  7/10 · aux  1.000 · eta 5s"


def test_rare_troubles_are_shown_only_when_there_are_some():
    assert "skipped" not in format_line(1, 1, {"skipped_steps": 0.0, "bad_rows": 0.0}, 0)
    assert format_line(1, 1, {"skipped_steps": 2.0, "bad_rows": 3.0}, 0).endswith("eta 0s · skipped 2 · bad rows 3")


ranges = {
    "loss": st.floats(0, 99), "ce_loss": st.floats(0, 99), "aux_loss": st.floats(0, 40), "mi_lower_bound": st.floats(0, 40),
    "infonce_accuracy": st.floats(0, 1), "grad_norm": st.floats(0, 1e30), "lr": st.floats(1e-9, 1),
    "tokens_per_second": st.floats(0, 9e11), "mfu": st.floats(0, 0.99), "peak_memory_gib": st.floats(0, 999),
    "data_wait_fraction": st.floats(0, 1),
}  # fmt: skip


@settings(max_examples=50)
@given(st.fixed_dictionaries({name: numbers | st.sampled_from([math.nan, math.inf]) for name, numbers in ranges.items()}))
def test_successive_lines_line_up(values):
    def find_separators(line: str) -> list[int]:
        return [index for index, character in enumerate(line) if character == "·"]

    line = format_line(9, 1000, values, 60, describe_future)
    assert find_separators(line) == find_separators(format_line(1000, 1000, EVERYTHING, 0, describe_future))
    for field, name in (("loss", "loss"), ("grad", "grad_norm")):
        if not math.isfinite(values[name]):
            assert f"{field} {values[name]:>6}" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m"), (86399, "23h 59m"), (90000, "1d 01h"),
     (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_eta(seconds, text):
    assert format_line(1, 1, {}, seconds).endswith(f"eta {text}")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0"), (999.94, "999.9"), (999.96, "1.0k"), (999_960, "1.0M"), (2.5e9, "2.5G"), (math.nan, "nan")]
)
def test_tokens_per_second(count, text):
    assert f" {text:>6} tok/s " in format_line(1, 1, {"tokens_per_second": count}, 0)


@pytest.fixture
def restore_logging():
    loggers = [logging.getLogger(), logging.getLogger("flame")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.parametrize("is_main", [True, False])
def test_who_prints_what(is_main, capsys, monkeypatch, restore_logging):
    monkeypatch.setenv("RANK", "3")
    init_logging(not is_main)
    init_logging(is_main)
    for logger in (logging.getLogger("flame.train"), logging.getLogger("library")):
        logger.info("from %s", logger.name)
        logger.warning("careful")
    printed = capsys.readouterr().out.splitlines()
    times, messages = zip(*(line.split(" ", 1) for line in printed), strict=True)
    assert all(len(time) == 8 and time.count(":") == 2 for time in times)
    assert list(messages) == ["from flame.train"] * is_main + ["warning (rank 3): careful"] * 2


@pytest.mark.parametrize("moment", ["log", "sync", "close"])
def test_a_service_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog, moment):
    def fail(*_):
        raise ConnectionResetError("gone")

    methods = {name: lambda *_: None for name in ("log", "sync", "close")} | {moment: fail}
    broken = type("Broken", (MetricWriter,), {"name": "broken", **methods})
    monkeypatch.setattr("flame.logging.run_log.choose_writers", lambda metrics: [broken])
    log = RunLog(MetricsOptions(), describe_run(tmp_path))
    log.log(1, {"loss": 2.0})
    log.sync()
    log.log(2, {"loss": 1.0})
    log.close()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["broken has failed and is switched off for this process: gone"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_wandb_identity_is_the_folders_else_the_checkpoints_else_new(tmp_path):
    assert _keep_id(tmp_path, "saved") == "saved" == _keep_id(tmp_path, None) == _keep_id(tmp_path, "other")
    (tmp_path / "moved").mkdir()
    new = _keep_id(tmp_path / "moved", None)
    assert len(new) == 12 and _keep_id(tmp_path / "moved", "saved") == new


def test_a_service_that_does_not_start_closes_those_before_it(tmp_path, monkeypatch):
    """And leaves no metrics file behind."""
    closed = []

    class Fine(MetricWriter):
        def close(self):
            closed.append(self)

    class Refuses(MetricWriter):
        def __init__(self, run):
            raise UserError("does not start")

    monkeypatch.setattr("flame.logging.run_log.choose_writers", lambda metrics: [Fine, Refuses])
    with pytest.raises(UserError, match="does not start"):
        RunLog(MetricsOptions(), describe_run(tmp_path))
    assert len(closed) == 1 and not (tmp_path / METRICS_FILE).exists()
