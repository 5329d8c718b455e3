"""A comparison's file: what it comes to, and one line for each mistake before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame.compare.command import main
from flame.compare.metrics import find_meant
from flame.compare.runs import list_runs, read_spec, resolve
from flame.compare.spec import Budget
from flame.errors import UserError
from flame.trainer.options import read_options
from tests.support.comparisons import write_spec
from tests.support.paths import REPO
from tests.support.refusals import expect_one_line


def test_each_task_is_trained_under_each_arm_with_each_seed(tmp_path: Path):
    spec = read_spec(write_spec(tmp_path, old="tokens = 20_000", new='tokens = 20_000\nseeded = ["pathstar.seed"]'))
    runs = list_runs(spec)
    assert [(run.arm, run.seed) for run in runs[:4]] == [("next_token", 1), ("mtp", 1), ("future", 1), ("next_token", 2)]
    assert len({run.folder for run in runs}) == len(runs) == 9 and spec.baseline == "next_token"
    config = read_options(runs[4].spell_options(), 1)
    assert (config.objective.name, config.training.seed, config.training.tokens) == ("mtp", 2, 20_000)
    assert config.extensions["pathstar"].seed == 2 and config.training.budget == "tokens"  # type: ignore[attr-defined]
    assert config.job.dump_folder == str(tmp_path / "out/graphs/mtp/seed-2")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("seeds = [1, 2, 3]", "seed = [1, 2, 3]", ("compare.seed (", "did you mean seeds?")),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", ("compare.seeds = [1, 1]", "different integers")),
        ("seeds = [1, 2, 3]", "seeds = [true]", ("compare.seeds = [true]",)),
        ("tokens = 20_000", "tokens = 0", ("compare.tokens = 0", "an integer > 0")),
        ("tokens = 20_000", "tokens = 20_000\nflops = 1e12", ("one budget", "compare.tokens and compare.flops")),
        ("tokens = 20_000", "", ("one budget", "given is none")),
        ("tokens = 20_000", 'tokens = 20_000\nbaseline = "mpt"', ('compare.baseline = "mpt"', "did you mean mtp?")),
        ("[arms.mtp]", '[arms."a/b"]', ('arms."a/b"', "a name is a folder")),
        ("[arms.mtp]", "[arm.mtp]", ("[arm]", "did you mean arms?")),
        ('name = "mtp"', 'name = "mtp"\ntraining.steps = 3', ("training.steps = 3 ([arms.mtp]", "budget is set in [compare]")),
        ('name = "mtp"', 'name = "mtp"\ntraining.seed = 3', ("training.seed = 3 ([arms.mtp]", "seeds are set in [compare]")),
        ("validation_exact_match", "validation_exact_mach", ("did you mean validation_exact_match?", 'better = "lower"')),
        (
            "validation_exact_match]",
            'validation_exact_mach]\nbetter = "higher"',
            ("metrics.validation_exact_mach", "no such metric, did you mean validation_exact_match?"),
        ),
        (
            "[metrics.validation_exact_match]",
            '[metrics."validaton_exact_match/5x5"]\nbetter = "higher"',
            ("metrics.validaton_exact_match/5x5", "did you mean validation_exact_match/5x5?"),
        ),
        (
            "[arms.mtp]",
            '[arms.mtp]\ntraining.loss_on = "all"',
            ("[arms.mtp]", 'training.loss_on = "all", and metrics.validation_exact_match is compared', 'set it to "answer"'),
        ),
        (
            "model.config",
            'training.loss_on = "all"\nmodel.config',
            ("[tasks.graphs]", 'training.loss_on = "all", and metrics.validation_exact_match is compared'),
        ),
        (
            "tokens = 20_000",
            'tokens = 20_000\nseeded = ["pathstar.sead"]',
            ("compare.seeded of", "pathstar.sead = 1: no such option, did you mean pathstar.seed?"),
        ),
        (
            "tokens = 20_000",
            'tokens = 20_000\nseeded = ["objective.name"]',
            ("compare.seeded of", "objective.name = "),
        ),
        ("goal = 0.9", "goals = 0.9", ("metrics.validation_exact_match.goals", "did you mean goal?")),
        ("goal = 0.9", 'better = "more"', ('better = "more"', '"lower" or "higher"')),
        (
            "goal = 0.9",
            "goal = 0.9\nstop_at = 0.8",
            ("metrics.validation_exact_match.goal = 0.9", "runs end at stop_at = 0.8", "a goal <= 0.8"),
        ),
        (
            "[metrics.validation_exact_match]",
            "[metrics.validation_ce_loss]\nstop_at = 3.0\ngoal = 1\n[metrics.validation_exact_match]",
            ("metrics.validation_ce_loss.goal = 1 ", "runs end at stop_at = 3.0", "a goal >= 3.0"),
        ),
        (
            'name = "mtp"',
            'name = "mtp"\ncheckpoint.export_to = "memory://runs"',
            ("[arms.mtp]", 'checkpoint.export_to = "memory://runs"', "upload to one folder", 'set it to ""'),
        ),
        (
            "[arms.next_token]",
            'checkpoint.export_to = "memory://runs"\n[arms.next_token]',
            ("[tasks.graphs]", 'checkpoint.export_to = "memory://runs"', "upload to one folder"),
        ),
        ('name = "mtp"', 'name = "mpt"', ("[arms.mtp]", 'objective.name = "mpt"')),
        ('name = "mtp"', 'nam = "mtp"', ("[arms.mtp]", "objective.nam", "did you mean objective.name?")),
        ('name = "mtp"', 'name = "mtp"\nmtp.tokens = "x"', ("[arms.mtp]", "mtp.tokens = x: allowed is an integer")),
        ("[arms.next_token]", "validation.interval = 0\n[arms.next_token]", ("validation.interval = 0", "is compared")),
        ("validation_exact_match", '"evaluation/facts/accuracy"', ("evaluation.interval = 0", "is compared")),
        (
            "tokens = 20_000",
            'seconds = 60\n[arms.reverse]\nobjective.name = "mtp"\nmtp.curriculum = "reverse"',
            ('mtp.curriculum = "reverse"', "compare.seconds", "[arms.reverse]"),
        ),
    ],
)
def test_a_mistake_is_a_line(tmp_path: Path, old: str, new: str, parts: tuple[str, ...]):
    path = write_spec(tmp_path, old=old, new=new)
    with pytest.raises(UserError) as caught:
        read_spec(path)
    for part in (path, *parts):
        assert part in str(caught.value)
    assert len([line for line in caught.value.lines if parts[0] in line]) == 1
    assert parts[0] != "compare.seeded of" or len(caught.value.lines) == 1


def test_a_value_that_is_no_toml_says_what_is(tmp_path: Path):
    path = write_spec(tmp_path, old='name = "mtp"', new="name = mtp")
    with pytest.raises(UserError) as caught:
        read_spec(path)
    expect_one_line(caught.value, f"{path}: not a readable TOML file: Invalid value (at line ", "texts need quotes")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ('export_to = "memory://runs"', ('checkpoint.export_to = "memory://runs"', "upload to one folder", 'set it to ""')),
        ("load_step = 3", ("checkpoint.load_step = 3", "a run of a comparison goes on from its newest checkpoint")),
    ],
)
def test_what_a_configuration_file_may_not_set_is_a_line(tmp_path: Path, option: str, parts: tuple[str, ...]):
    config = REPO / "configs/pathstar_cpu.toml"
    text = config.read_text()
    assert "\n[checkpoint]\n" in text
    (tmp_path / "run.toml").write_text(text.replace("[checkpoint]", f"[checkpoint]\n{option}"))
    path = write_spec(tmp_path, old=str(config), new=str(tmp_path / "run.toml"))
    with pytest.raises(UserError) as caught:
        read_spec(path)
    expect_one_line(caught.value, f"[tasks.graphs] of {path}: ", *parts)


@pytest.mark.parametrize("text", ["goal = 0.9\nstop_at = 0.9", "goal = 0.9\nstop_at = 1", "stop_at = 0.5"])
def test_a_goal_may_be_where_runs_end_or_before(tmp_path: Path, text: str):
    read_spec(write_spec(tmp_path, old="goal = 0.9", new=text))


def test_an_upload_of_the_configuration_file_can_be_turned_off(tmp_path: Path):
    config = REPO / "configs/pathstar_cpu.toml"
    text = config.read_text().replace("[checkpoint]", '[checkpoint]\nexport_to = "memory://runs"')
    (tmp_path / "run.toml").write_text(text)
    path = write_spec(tmp_path, old=str(config), new=str(tmp_path / "run.toml"))
    Path(path).write_text(Path(path).read_text().replace("[arms.next_token]", 'checkpoint.export_to = ""\n[arms.next_token]'))
    assert {resolve(run).checkpoint.export_to for run in list_runs(read_spec(path))} == {""}


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("facts/accuracy", "higher"),
        ("facts/accuracy_per_byte", "higher"),
        ("facts/exact_match", "higher"),
        ("facts/bits_per_byte", "lower"),
        ("books/bits_per_byte", "lower"),
        ("books/ce_loss", "lower"),
    ],
)
def test_metrics_of_an_evaluation(tmp_path: Path, metric: str, better: str):
    (tmp_path / "facts.jsonl").write_text("{}\n")
    options = f"""
evaluation.interval = 10
evaluation.tasks = "{tmp_path}/facts.jsonl"
held_out.books.dataset = "pathstar"
held_out.books.dataset_name = "3x3"
[arms.next_token]"""
    path = Path(write_spec(tmp_path, old="[arms.next_token]", new=options))
    text = path.read_text()
    path.write_text(text.replace("validation_exact_match", f'"evaluation/{metric}"'))
    (found,) = read_spec(str(path)).metrics
    assert found.better == better
    path.write_text(text.replace("validation_exact_match", f'"evaluation/x{metric}"'))
    with pytest.raises(UserError) as caught:
        read_spec(str(path))
    assert all("nothing of that name is evaluated, there are facts, books" in line for line in caught.value.lines)


@pytest.mark.parametrize("metric", ["loss", "validation_loss", "aux_loss", "validation_aux_loss"])
def test_a_loss_of_different_objectives_is_not_compared(tmp_path: Path, metric: str):
    with pytest.raises(UserError) as caught:
        read_spec(write_spec(tmp_path, old="validation_exact_match", new=metric))
    told = f"metrics.{metric} ({tmp_path}/spec.toml, task graphs)"
    expect_one_line(caught.value, told, "(next_token, mtp, future)", "use validation_ce_loss")


def test_a_loss_of_one_objective_is_compared(tmp_path: Path):
    """Its weight is a factor of the sum alone."""
    path = Path(write_spec(tmp_path, old="[arms.future]", new='[arms.future]\nobjective.name = "mtp"\nmtp.loss_weight = 0.5'))
    text = path.read_text().replace('objective.name = "next_token"', 'objective.name = "mtp"')
    path.write_text(text.replace("validation_exact_match", "validation_aux_loss"))
    assert read_spec(str(path)).metrics[0].name == "validation_aux_loss"
    path.write_text(text.replace("validation_exact_match", "validation_loss"))
    with pytest.raises(UserError) as caught:
        read_spec(str(path))
    expect_one_line(caught.value, "metrics.validation_loss", "(next_token, future)", "loss_weight")
    path.write_text(text.replace("validation_exact_match", "validation_loss").replace("mtp.loss_weight = 0.5", ""))
    assert read_spec(str(path)).metrics[0].name == "validation_loss"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("validation_exact_mach", "validation_exact_match"),
        ("validation_cel_oss", "validation_ce_loss"),
        ("validaton_ce_loss/web", "validation_ce_loss/web"),
        ("aux_los", "aux_loss"),
        ("evaluation/facts/acuracy", "evaluation/facts/accuracy"),
        ("evaluation/facts/accuracy_per_bite", "evaluation/facts/accuracy_per_byte"),
        ("validation_ce_loss/web", None),
        ("evaluation/facts/accuracy_per_char", None),
        ("validation_kl_loss", None),
        ("validation_nitp_cosine", None),
        ("negative_cosine", None),
        ("action_loss", None),
        ("mtp_ce_2", None),
        ("tokens_seen", None),
    ],
)
def test_a_slip_is_told_from_a_metric_of_ones_own(name: str, meant: str | None):
    assert find_meant(name) == meant


def test_what_all_arms_set_right_is_no_mistake_of_the_task(tmp_path: Path):
    path = Path(write_spec(tmp_path, old="model.config", new='training.loss_on = "all"\nmodel.config'))
    text = path.read_text()
    for arm in ("next_token", "mtp", "future"):
        text = text.replace(f"[arms.{arm}]", f'[arms.{arm}]\ntraining.loss_on = "answer"')
    path.write_text(text)
    assert len(read_spec(str(path)).arms) == 3


def test_a_value_may_begin_with_dashes(tmp_path: Path):
    path = write_spec(tmp_path, old="[arms.next_token]", new='job.description = "--fast and = so"\n[arms.next_token]')
    config = read_options(list_runs(read_spec(path))[0].spell_options(), 1)
    assert config.job.description == "--fast and = so"


def test_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = read_spec(write_spec(tmp_path, old=f'out = "{tmp_path}/out"', new='out = "~/runs"'))
    assert spec.out == tmp_path / "runs"


def test_all_mistakes_come_at_once_and_none_twice(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write_spec(tmp_path, old='name = "mtp"', new='name = "mpt"\ntraining.sequence_len = 3')
    text = Path(path).read_text().replace("[arms.future]", "[arms.future]\noptimizer.lr = -1")
    text = text.replace("seeds", "seads")
    Path(path).write_text(text.replace("model.config", "trainin.compile = true\nmodel.config"))
    assert main([path]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[0] for line in lines[:2]] == ["compare.seads", "compare.seeds"]
    assert [line.split("]")[0] for line in lines[2:]] == ["[tasks.graphs", "[arms.mtp", "[arms.mtp", "[arms.future"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(REPO.glob("configs/compare_*.toml")), ids=lambda path: path.stem)
def test_shipped_comparisons_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    spec = read_spec(str(path))
    assert not spec.out.is_absolute() and len(spec.arms) > 2


@pytest.mark.parametrize("content", [None, "[compare", "\x00"])
def test_a_file_that_is_none(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "spec.toml").write_text(content)
    with pytest.raises(UserError) as caught:
        read_spec(str(tmp_path / "spec.toml"))
    expect_one_line(caught.value, "spec.toml: not a readable TOML file")


def test_a_budget_of_seconds_is_one_of_steps(tmp_path: Path):
    spec = read_spec(write_spec(tmp_path, old="tokens = 20_000", new="seconds = 60"))
    assert spec.budget == Budget("seconds", 60)
    assert resolve(list_runs(spec)[0]).training.budget is None
