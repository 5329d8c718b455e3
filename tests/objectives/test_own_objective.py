"""What the class `Objective` does by default, and what the trainer makes of an objective in a user's file."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flame.checkpoints.resume import list_used_sections
from flame.config.run import ObjectiveChoice
from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.logging.metrics import Metrics
from flame.models.wrapper import TrainingModel
from flame.objectives.base import ParameterGroup
from flame.objectives.options import ObjectiveOptions
from flame.objectives.registry import load_user_objective
from flame.objectives.step import Requested, compute_losses
from flame.trainer.loss_metrics import record_losses
from flame.trainer.options import list_idle_options, read_options
from flame.trainer.setup import build_run_optimizer
from tests.support.models import CPU, build_unsharded, get_own, random_batch, random_cu_seqlens
from tests.support.objectives import choose_file
from tests.support.options import MODEL, read_mistakes
from tests.support.ranks import run_on_ranks
from tests.support.refusals import expect_one_line

HEADER = """
import torch
from torch import nn

from flame.objectives.base import AuxLoss, Objective, ParameterGroup
from flame.runtime.measures import Last, Max, Mean, Sum
"""
LOSS = """
    def loss(self, backbone, hidden_states, batch, prepared, *, with_sample=False):
        zero = hidden_states.sum() * 0.0
        return AuxLoss(zero, zero.detach() + batch.num_labels, zero.detach(), {})
"""
PARTS = """
class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.empty(5, 4))
        self.register_buffer("offset", torch.empty(4))

    def init_weights(self):
        nn.init.normal_(self.table)
        nn.init.ones_(self.offset)


class Mine(Objective):
    name = "mine"

    def __init__(self, setup):
        super().__init__(setup)
        width = setup.lm.config.hidden_size
        self.first = nn.Sequential(nn.Linear(width, width), nn.ModuleList([nn.LayerNorm(width)]))
        self.second = nn.ModuleDict({"drawn": Drawn(), "code": nn.Embedding(3, width)})
"""


def write(folder: Path, name: str, source: str) -> Path:
    """A file with an objective. Python imports a file of a name once, so each has another."""
    path = folder / f"{name}.py"
    path.write_text(HEADER + textwrap.dedent(source))
    return path


def build(path: Path, seed: int = 0) -> TrainingModel:
    return build_unsharded(choose_file(path), seed=seed)


# ---------------------------------------------------------------- defaults


def test_weights_are_drawn_by_the_children_from_the_seed_alone(tmp_path):
    """By `init_weights` where a module has it, and by torch's `reset_parameters`; the language model draws before."""
    path = write(tmp_path, "objective_parts", PARTS + LOSS)
    model, again, other = (build(path, seed) for seed in (1, 1, 2))
    weights = get_own(model).state_dict()
    assert set(weights) == {
        "first.0.weight",
        "first.0.bias",
        "first.1.0.weight",
        "first.1.0.bias",
        "second.drawn.table",
        "second.drawn.offset",
        "second.code.weight",
    }
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(torch.equal(tensor, again.state_dict()[f"objective.{key}"]) for key, tensor in weights.items())
    assert not torch.equal(weights["first.0.weight"], get_own(other).state_dict()["first.0.weight"])
    assert (weights["second.drawn.offset"] == 1).all() and (weights["first.1.0.weight"] == 1).all()
    assert weights["first.0.weight"].abs().max() <= 32**-0.5 < weights["second.drawn.table"].abs().max()

    plain = build_unsharded(JobConfig(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.lm.parameters(), plain.lm.parameters(), strict=True))


def test_a_weight_that_nobody_draws_is_refused(tmp_path):
    source = """
    class Mine(Objective):
        name = "mine"

        def __init__(self, setup):
            super().__init__(setup)
            self.scale = nn.Parameter(torch.empty(3))
    """
    with pytest.raises(UserError) as refusal:
        build(write(tmp_path, "objective_undrawn", textwrap.dedent(source) + LOSS))
    expect_one_line(refusal.value, "Mine", "scale")


def list_settings(config: JobConfig, model: TrainingModel) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter, of which each must be in one group."""
    found = [
        (name, (group["lr"], group["weight_decay"]))
        for optimizer in build_run_optimizer(config, model)
        for group in optimizer.param_groups
        for name in group["param_names"]
    ]
    assert len(found) == len(dict(found)) == len(list(model.parameters()))
    return dict(found)


def test_parameters_are_optimised_like_the_language_model_by_default(tmp_path):
    config = choose_file(write(tmp_path, "objective_groups", PARTS + LOSS))
    model, base = build_unsharded(config), config.optimizer
    settings = list_settings(config, model)
    assert get_own(model).list_parameter_groups() == [ParameterGroup("")]
    assert {key: value for key, value in settings.items() if key.startswith("objective.")} == {
        "objective.first.0.weight": (base.lr, base.weight_decay),
        "objective.first.0.bias": (base.lr, 0.0),
        "objective.first.1.0.weight": (base.lr, 0.0),
        "objective.first.1.0.bias": (base.lr, 0.0),
        "objective.second.drawn.table": (base.lr, base.weight_decay),
        "objective.second.code.weight": (base.lr, 0.0),  # an embedding
    }


def test_the_first_group_that_fits_a_parameter_wins(tmp_path):
    groups = """
    def list_parameter_groups(self):
        return [ParameterGroup("first.0.", 0.5, 0.25), ParameterGroup("second.", 2.0), ParameterGroup("", 1.0, 0.0)]
    """
    config = choose_file(write(tmp_path, "objective_prefixes", PARTS + textwrap.indent(textwrap.dedent(groups), "    ") + LOSS))
    settings, base = list_settings(config, build_unsharded(config)), config.optimizer
    assert settings["objective.first.0.weight"] == (base.lr * 0.5, 0.25)
    assert settings["objective.first.0.bias"] == (base.lr * 0.5, 0.0)
    assert settings["objective.first.1.0.weight"] == (base.lr, 0.0)
    assert settings["objective.second.drawn.table"] == (base.lr * 2.0, base.weight_decay)
    assert settings["lm.model.layers.0.mlp.up_proj.weight"] == (base.lr, base.weight_decay)


def test_the_other_defaults(tmp_path):
    """Labels are counted, all weights exported, and nothing else is told."""
    objective = get_own(build(write(tmp_path, "objective_defaults", PARTS + LOSS)))
    batch = random_batch(random_cu_seqlens(30, 4, seed=0))
    assert objective.count(batch) == batch.num_labels
    assert list(objective.prepare_step(None, [batch, batch])) == [None, None] and objective.prepare(None, batch, 7) == 7
    assert objective.list_exported() == [""] and not objective.list_layer_stacks() and not objective.list_compiled()
    assert objective.read_metrics(torch.float32) == objective.measure_sample(None, batch, 0) == {}
    assert objective.describe_metrics({"aux_loss": 1.0}) == "" and '"mine"' in objective.describe_training()


@pytest.fixture
def in_model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text('{"model_type": "llama"}')


OPTIONS = """
from dataclasses import dataclass

from flame.config.types import When, option
from flame.objectives.base import ObjectiveOptions


@dataclass(kw_only=True)
class MyOptions(ObjectiveOptions):
    depth: int = option(3, applies=When("{when}"))

    def find_conflicts(self, job, name):
        {rule}
"""


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("objective_lossless", PARTS, "Mine does not define loss()"),
        ("objective_when", (OPTIONS, "nosuch", "yield from ()"), 'mine.depth applies When("nosuch"), which is no option'),
        ("objective_where", (OPTIONS, "training.nosuch", "yield from ()"), 'mine.depth applies When("training.nosuch")'),
        ("objective_raises", (OPTIONS, "loss_weight", "yield 1 / 0"), "MyOptions.find_conflicts() fails: ZeroDivisionError"),
        ("objective_silent", (OPTIONS, "loss_weight", "return None"), "MyOptions.find_conflicts() fails: TypeError"),
    ],
)
def test_a_wrong_class_is_one_line(in_model_folder, tmp_path, name, source, expected):
    if isinstance(source, tuple):
        options, when, rule = source
        source = options.replace("{when}", when).replace("{rule}", rule) + PARTS + "    Options = MyOptions\n" + LOSS
    lines = read_mistakes([*MODEL, "--objective.path", str(write(tmp_path, name, source))])
    assert len(lines) == 1 and expected in lines[0], lines


def test_a_weight_of_zero_switches_off_and_is_told_as_nothing_else(in_model_folder, tmp_path):
    path = str(write(tmp_path, "objective_off", PARTS + LOSS))
    argv = [*MODEL, "--objective.path", path, "--mine.loss_weight", "0", "--objective.start_step", "5"]
    assert list_idle_options(read_options(argv, 1)) == ["objective.start_step"]
    next_token = read_options([*MODEL, "--objective.path", path, "--objective.name", "next_token"], 1)
    assert list_idle_options(next_token) == ["objective.path"]


def test_options_of_an_objective_that_does_not_train_may_change_at_a_resume(in_model_folder, tmp_path):
    argv = [*MODEL, "--objective.path", str(write(tmp_path, "objective_unused", PARTS + LOSS))]
    used, unused = (
        list_used_sections(read_options(argv, 1)),
        list_used_sections(read_options([*argv, "--objective.name", "mtp"], 1)),
    )
    assert "mine" in used and "mine" not in unused and "mtp" in unused


@pytest.mark.parametrize("name", ["tokens_seen", "step_seconds", "peak_memory_gib", "ce_loss"])
def test_a_metric_cannot_take_the_name_of_one_of_the_trainer(one_process, tmp_path, name):
    source = REDUCTIONS.replace("sum_of_tokens", name)
    model, batch = build(write(tmp_path, f"objective_takes_{name}", source)), random_batch(random_cu_seqlens(30, 4, seed=0))
    with pytest.raises(UserError, match=f'measures "{name}", which is a metric of the trainer'):
        record_losses(Metrics(CPU), model(compute_losses, batch, Requested(aux=True)), batch, ["text"])


# ---------------------------------------------------------------- its section


def test_an_objective_without_options_has_a_section_of_its_name(tmp_path, capsys, monkeypatch):
    """With the weight that every objective has; on the command line, in help and among the resolved options."""
    path = write(tmp_path, "objective_plain", PARTS + LOSS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text('{"model_type": "llama"}')
    argv = [*MODEL, "--objective.path", str(path)]
    job = read_options([*argv, "--mine.loss_weight", "0.25"], 1)
    kind = load_user_objective(None, str(path))
    assert kind is not None and kind.name == kind.options.section == "mine" and job.get(kind.options).loss_weight == 0.25
    assert kind.options is not ObjectiveOptions and ObjectiveOptions.section == ""
    assert read_options(argv, 1).get(kind.options).loss_weight == 1.0
    assert load_user_objective(None, str(path)).options is kind.options  # one class, however often it is asked for

    for asked in (["--help", "mine"], ["--print-config"]):
        with pytest.raises(SystemExit) as stop:
            read_options([*argv, *asked], 1)
        assert stop.value.code == 0 and "loss_weight" in capsys.readouterr().out

    (line,) = read_mistakes([*argv, "--mine.loss_weight", "-1"])
    assert "mine.loss_weight = -1" in line
    (line,) = read_mistakes([*argv, "--mine.los_weight", "1"])
    assert "mine.los_weight" in line and "mine.loss_weight" in line


def test_two_objectives_without_options_do_not_share_a_section(tmp_path):
    kinds = []
    for name in ("mine", "yours"):
        path = write(tmp_path, f"objective_{name}_alone", (PARTS + LOSS).replace('"mine"', f'"{name}"'))
        kinds.append(load_user_objective(None, str(path)))
    assert [kind.options.section for kind in kinds] == ["mine", "yours"]


def test_a_weight_of_zero_builds_no_objective(tmp_path):
    config = choose_file(write(tmp_path, "objective_weightless", PARTS + LOSS), loss_weight=0.0)
    assert build_unsharded(config).objective is None
    chosen = JobConfig(objective=ObjectiveChoice(name="next_token", path=config.objective.path))
    assert build_unsharded(chosen).objective is None  # a name wins over the file


# ---------------------------------------------------------------- its metrics

REDUCTIONS = """
class Reductions(Objective):
    name = "reductions"

    def loss(self, backbone, hidden_states, batch, prepared, *, with_sample=False):
        zero = hidden_states.sum() * 0.0
        tokens = batch.input_ids[0]
        measures = {
            "mean_token": Mean(tokens.sum(), len(tokens)),
            "sum_of_tokens": Sum(tokens.sum()),
            "largest_token": Max(tokens.max()),
            "last_token": Last(tokens[-1]),
        }
        return AuxLoss(zero + batch.num_labels, zero.detach() + batch.num_labels, zero.detach(), measures)
"""
SEEDS = (3, 4, 5, 6)


def collect_on_rank(folder: Path) -> dict[str, float]:
    """Metrics of this rank's sequences, of which all ranks together have `SEEDS`, and of one that does not count."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, metrics = build(folder / "objective_reductions.py"), Metrics(CPU)
    batches = [random_batch(random_cu_seqlens(40, 4, seed), seed=seed) for seed in SEEDS]
    share = len(SEEDS) // ranks
    for batch in batches[rank * share : (rank + 1) * share]:
        record_losses(metrics, model(compute_losses, batch, Requested(aux=True)), batch, ["text"])
    uncounted = model(compute_losses, batches[0], Requested(aux=True))
    measures = {name: each for name, each in uncounted.aux.measures.items() if name != "last_token"}
    uncounted = uncounted._replace(aux=uncounted.aux._replace(measures=measures))
    record_losses(metrics, uncounted, batches[0], ["text"], counts=False)
    return metrics.collect()


def test_every_reduction_is_the_same_over_ranks_and_micro_steps(one_process, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder, "objective_reductions", REDUCTIONS)
    tokens = [random_batch(random_cu_seqlens(40, 4, seed), seed=seed).input_ids[0] for seed in SEEDS]
    every = torch.cat(tokens)
    expected = {
        "aux_loss": 1.0,
        "mean_token": every.double().mean().item(),
        "sum_of_tokens": every.sum().item(),
        "largest_token": every.max().item(),
    }
    alone, two = collect_on_rank(folder), run_on_ranks(2, folder, collect_on_rank)
    lasts = [tokens[-1][-1].item(), tokens[1][-1].item(), tokens[3][-1].item()]
    for found, last in zip((alone, *two), lasts, strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        assert found["last_token"] == last  # not reduced
    assert [row["ce_loss"] for row in two] == pytest.approx([alone["ce_loss"]] * 2)
