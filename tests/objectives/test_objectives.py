"""Every objective, target and estimator in the trainer: what it computes, what it leaves alone, resume and ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as how_often
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame.attention.masks import draw_anchors
from flame.checkpoints.manager import list_checkpoints
from flame.data.batch import PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.future.negatives import LocalCandidates
from flame.objectives.future.options import FutureOptions, PredictorOptions
from flame.objectives.future.summaries import average_ahead, shuffle_valid
from flame.objectives.probe import measure_step
from flame.objectives.schedule import WeightSchedule
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer, main
from flame.trainer.options import read_options
from flame.trainer.setup import build_weight_schedule
from flame.weights.export import name_objective_file
from flame.weights.tensors import read_model_tensors
from tests.support.models import build_unsharded, future_config, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.models import pack as pack_tokens
from tests.support.objectives import OPTIONS, choose
from tests.support.ranks import train_on_ranks
from tests.support.runs import cut_power_after, final_weights, measured, options, read_metrics, run_here

RANKS = 2
STEPS = 3
COMMON = {
    "training__steps": STEPS,
    "training__gradient_accumulation_steps": RANKS,
    "checkpoint__interval": 2,
    "future_encoder__learnable_temperature": None,
    "metrics__diagnostics_interval": 0,
    "objective__name": "future",
}
CASES: dict[str, dict[str, object]] = {
    "mtp": {"objective__name": "mtp", "mtp__tokens": 3},
    "mtp_forward": {"objective__name": "mtp", "mtp__tokens": 3, "mtp__curriculum": "forward"},
    "mtp_sequential": {"objective__name": "mtp_sequential", "mtp_sequential__tokens": 3},
    "top": {"objective__name": "top", "top__window": 8},
    "fsp_bow": {"objective__name": "fsp_bow", "fsp_bow__loss_weight": 0.01},
    "fsp_revlm": {"objective__name": "fsp_revlm", "fsp_revlm__loss_weight": 0.05},
    "nitp": {"objective__name": "nitp"},
    "nextlat": {"objective__name": "nextlat", "nextlat__horizon": 2},
    "regret": {"objective__name": "regret"},
    "stp": {"objective__name": "stp"},
    "random": {"future_encoder__target": "random", "future_encoder__estimator_type": "bilinear", "optimizer__lr": 1e-3},
    "ema": {"future_encoder__target": "ema", "future_encoder__ema_decay": 0.5, "future_encoder__estimator_type": "cosine"},
    "shallow": {"future_encoder__layers": 1},
    "shallow, ema": {"future_encoder__layers": 1, "future_encoder__target": "ema", "future_encoder__ema_decay": 0.5},
    "mean_embedding": {"future_encoder__target": "mean_embedding", "future_encoder__estimator_type": "smooth_l1"},
    "causal": {"future_encoder__target": "causal", "future_encoder__projection_dim": 16},
    "shuffled": {"future_encoder__target": "shuffled", "future_encoder__max_anchors": 20},
    "global": {
        "future_encoder__negatives": "global",
        "future_encoder__exclude_neighbors": 2,
        "future_encoder__exclude_duplicates": True,
        "future_encoder__learnable_temperature": True,
    },
    "embedding": {"future_predictor__input": "embedding"},
    "early prediction": {"future_predictor__layer": 1},
    "action": {"future_action__top_k": 4, "future_action__temperature": 0.1, "future_predictor__layer": 1},
}
BASELINES = ("mtp", "mtp_forward", "mtp_sequential", "top", "fsp_bow", "fsp_revlm", "nitp", "nextlat", "regret", "stp")
WITHOUT_PARAMETERS = ("regret", "stp")
WEIGHTS = {"mtp_sequential": 0.3, "regret": 0.1, "stp": 0.02, "fsp_bow": 0.01, "fsp_revlm": 0.05}
"""Of the baselines, where it is not 1."""
MEASURES = {
    "infonce": {"mi_lower_bound", "infonce_accuracy", "positive_cosine", "negative_cosine"},
    "bilinear": {"mi_lower_bound", "infonce_accuracy"},
    "cosine": {"positive_cosine", "negative_cosine"},
    "smooth_l1": {"positive_cosine", "negative_cosine"},
}
every_case = pytest.mark.parametrize("name", CASES)


def list_options(workspace: Path, run: Path, name: str, **changes: object) -> list[str]:
    return options(workspace, run, **COMMON | CASES[name] | changes)


@pytest.fixture(scope="module")
def whole_runs(workspace, tmp_path_factory) -> Callable[[str], Path]:
    """The run of a case on one rank with two micro-steps, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            main(list_options(workspace, folder / name, name, checkpoint__export_hf=name in ("mtp", "random", "ema")))
        return folder / name

    return get


# ---------------------------------------------------------------- whole runs


@every_case
def test_each_objective_trains(whole_runs, name):
    run = whole_runs(name)
    rows, is_baseline = read_metrics(run), name in BASELINES
    assert rows[-1]["ce_loss"] < rows[0]["ce_loss"]
    assert not is_baseline or name in (*WITHOUT_PARAMETERS, "mtp_forward") or rows[-1]["aux_loss"] < rows[0]["aux_loss"]
    estimator = str(CASES[name].get("future_encoder__estimator_type", "infonce"))
    expected = set() if is_baseline else MEASURES[estimator]
    weight = WEIGHTS.get(name, 1.0) if is_baseline else FutureOptions().loss_weight
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce_loss"] + weight * row["aux_loss"], rel=1e-5)
        assert row.keys() & set().union(*MEASURES.values()) == expected and ("anchors" in row) == (not is_baseline)
    first, last = (read_model_tensors(path) for path in list_checkpoints(run / "checkpoint"))
    heads = {
        key
        for key in first
        if key.startswith("objective." if is_baseline else ("objective.predictor.", "objective.estimator.weight"))
    }
    assert bool(heads) == (name not in WITHOUT_PARAMETERS) and all(not torch.equal(first[key], last[key]) for key in heads)


@every_case
def test_an_interrupted_run_equals_the_uninterrupted_one(workspace, tmp_path, whole_runs, name):
    """Stopped one step after the checkpoint of step 2: a teacher and a projection go on too."""
    argv = list_options(workspace, tmp_path / "run", name)
    cut_power_after(3, argv)
    main(argv)
    assert measured(read_metrics(tmp_path / "run")) == measured(read_metrics(whole_runs(name)))
    found, expected = final_weights(tmp_path / "run"), final_weights(whole_runs(name))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


ALIKE = ("top", "fsp_bow", "mean_embedding", "causal", "shuffled", "embedding", "shallow, ema", "stp", "nitp")
"""Cases whose ranks exchange nothing that another case's do not."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [[name for name in CASES if name not in ALIKE], pytest.param(ALIKE, marks=pytest.mark.long)],
    ids=["different", "alike"],
)
def test_ranks_and_accumulation_are_interchangeable(workspace, tmp_path, whole_runs, names):
    """1 rank x 2 micro-steps = 2 ranks x 1, dropout included."""
    changes = {"training__gradient_accumulation_steps": 1, "checkpoint__enable_checkpoint": False}
    argvs = [list_options(workspace, tmp_path / name, name, **changes) for name in names]
    train_on_ranks(RANKS, argvs)
    for name in names:
        rows = zip(measured(read_metrics(tmp_path / name)), measured(read_metrics(whole_runs(name))), strict=True)
        for found, expected in rows:
            assert found == pytest.approx(expected, rel=2e-4), (name, found, expected)


def test_loss_weight_zero_is_next_token_prediction(workspace, tmp_path):
    changes = COMMON | {"training__steps": 2}
    plain = run_here(workspace, tmp_path / "plain", **changes | {"objective__name": "next_token"})
    for target in ("self", "ema"):
        further = {"future_encoder__loss_weight": 0.0, "future_encoder__target": target}
        run = tmp_path / target
        assert measured(run_here(workspace, run, **changes | further)) == measured(plain)
        weights, expected = final_weights(run), final_weights(tmp_path / "plain")
        assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "weight"), [("fsp_bow", 0.01), ("global", 0.03)])
def test_validation_has_both_losses(workspace, tmp_path, name, weight):
    """Global negatives are those of a training step: one held-out sequence is compared within itself."""
    held_out = {"validation__interval": 1, "validation__holdout_every": 5, "validation__num_sequences": 2}
    changes = held_out | {"training__steps": 1, "checkpoint__enable_checkpoint": False}
    main(list_options(workspace, tmp_path / "run", name, **changes))
    _, row = read_metrics(tmp_path / "run")
    ce, aux = row["validation_ce_loss"], row["validation_aux_loss"]
    assert aux > 0 and row["validation_loss"] == pytest.approx(ce + weight * aux, rel=1e-6)
    assert row.get("validation_mi_lower_bound", 0.0) < math.log(64)


@pytest.mark.parametrize(
    ("before", "changes", "expected"),
    [
        ("mtp", {"objective__name": "top", "mtp__tokens": None}, 'objective.name = "top"'),
        ("mtp", {"mtp__tokens": 4}, "mtp.tokens = 4, but the run in"),
        ("random", {"future_encoder__target": "ema"}, 'future_encoder.target = "ema", but the run in'),
        ("random", {"future_action__top_k": 4}, "future_action.top_k = 4, but the run in"),
        ("ema", {"future_encoder__estimator_type": "smooth_l1"}, 'future_encoder.estimator_type = "smooth_l1", but the run in'),
    ],
)
def test_a_run_is_not_continued_as_another_one(workspace, whole_runs, capsys, before, changes, expected):
    run = whole_runs(before)
    rows = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(list_options(workspace, run, before, **changes))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith(expected) and "\n" not in error
    assert (run / "metrics.jsonl").read_bytes() == rows


UNSET = {"future_encoder__learnable_temperature": None, "future_predictor__dropout": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"future_encoder__target_shift": 9}, "no position has a target, so the future loss teaches nothing."),
        (UNSET | {"objective__name": "stp"}, "no document counts for the stp loss"),
        (UNSET | {"objective__name": "fsp_revlm"}, "no position counts for the fsp_revlm loss"),
    ],
    ids=["future", "stp", "fsp_revlm"],
)
def test_a_run_in_which_nothing_counts_says_so(workspace, tmp_path, caplog, changes, expected):
    """Documents of one letter: none has what the objective looks for."""
    corpus = tmp_path / "short.jsonl"
    corpus.write_text('{"text": "a"}\n' * 20)
    run = {"training__data_files": corpus, "checkpoint__enable_checkpoint": False}
    rows = run_here(workspace, tmp_path / "run", **COMMON | run | changes)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith(expected)]
    assert len(told) == 1 and all(row.get("anchors", 0) == 0 and "aux_loss" not in row for row in rows)


def test_steps_without_the_loss_are_not_taken_for_such_a_run(workspace, tmp_path, caplog):
    """Every line of the log is of one step, and every second step has the loss."""
    run = {"checkpoint__enable_checkpoint": False, "future_encoder__every": 2, "training__steps": 4, "metrics__log_freq": 1}
    run_here(workspace, tmp_path / "run", **COMMON | run)
    assert not any("no position has a target" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("name", "kept"), [("mtp", "layers."), ("random", "predictor."), ("ema", "predictor.")])
def test_only_what_was_trained_is_exported(whole_runs, name, kept):
    run = whole_runs(name)
    has_teacher = any(key.startswith("objective.teacher.") for key in final_weights(run))
    assert has_teacher == (name != "mtp")
    names: dict[str, set[str]] = {}
    for path in (run / "hf").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names[path.name] = set(file.keys())
    own = names.pop(name_objective_file("mtp" if name == "mtp" else "future"))
    assert {key.partition(".")[0] + "." for key in own} - {"estimator."} == {kept}
    assert len(names) == 1 and not any("teacher" in key or "objective" in key for key in next(iter(names.values())))


# ---------------------------------------------------------------- teachers


def copy_parts(model: TrainingModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    def copy(part: torch.nn.Module) -> dict[str, Tensor]:
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in part.named_parameters()}
        return {name: tensor.detach().clone() for name, tensor in whole.items()}

    assert model.objective.teacher is not None
    return copy(model.lm), copy(model.objective.teacher)


class KeepsParts(Trainer):
    """Keeps the weights of both networks before the first step and after each."""

    def _open_run(self):
        super()._open_run()
        self.kept = [copy_parts(self.model)]

    def train_step(self):
        super().train_step()
        assert all(
            parameter.grad is None and not parameter.requires_grad for parameter in self.model.objective.teacher.parameters()
        )
        self.kept.append(copy_parts(self.model))


def keep_parts(workspace: Path, run: Path, name: str, **changes: object) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    set_single_process_defaults()
    argv = list_options(workspace, run, name, checkpoint__enable_checkpoint=False, **changes)
    trainer = KeepsParts(read_options(argv, 1))
    trainer.train()
    return trainer.kept


def test_an_ema_teacher_is_the_average_of_the_weights(workspace, tmp_path, monkeypatch):
    """Against its definition written out; a step that is left out leaves the teacher alone."""
    import flame.models.output_head

    real, calls = flame.models.output_head.linear_cross_entropy, []

    def cross_entropy(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 * RANKS else 1.0)

    monkeypatch.setattr(flame.models.output_head, "linear_cross_entropy", cross_entropy)
    kept = keep_parts(workspace, tmp_path / "run", "ema", future_encoder__ema_decay=0.75)
    start, teacher = kept[0]
    assert all(torch.equal(teacher[name], weight) for name, weight in start.items()) and teacher.keys() == start.keys()
    average = {name: weight.double() for name, weight in start.items()}
    for step, (weights, teacher) in enumerate(kept[1:], start=1):
        for name, weight in weights.items() if step != 2 else ():
            average[name] = 0.75 * average[name] + 0.25 * weight.double()
        for name, weight in average.items():
            torch.testing.assert_close(teacher[name].double(), weight, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(kept[-1][0][name], kept[-1][1][name]) for name in start)


def test_a_random_teacher_never_changes(workspace, tmp_path):
    kept = keep_parts(workspace, tmp_path / "run", "random", training__steps=2)
    weights, teacher = kept[0]
    matrices = [name for name, weight in weights.items() if weight.ndim > 1]
    assert matrices and not any(torch.equal(weights[name], teacher[name]) for name in matrices)
    for later, still in kept[1:]:
        assert all(torch.equal(still[name], weight) for name, weight in teacher.items())
        assert any(not torch.equal(later[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("target", ["random", "ema"])
def test_a_teacher_makes_the_summaries_and_gets_no_gradient(target):
    """With the teacher's weights those of another network, the loss is that of its anti-causal pass."""
    config = future_config(target=target)
    model, other = build_unsharded(config).double(), build_unsharded(future_config(), seed=9).double()
    model.objective.teacher.load_state_dict(other.lm.state_dict())
    batch = random_batch(random_cu_seqlens(30, 3, seed=5))
    losses = model(compute_losses, batch, Requested(aux=True))
    with torch.no_grad():
        expected = contrast_by_loop(model, [batch], [other.encode_future(batch, 0)])
    assert losses.aux.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    losses.aux.loss_sum.backward()
    assert all(parameter.grad is None for parameter in model.objective.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.objective.predictor.parameters())


# ---------------------------------------------------------------- targets and negatives, in float64


def find_span(batch: PackedBatch, t: int, horizon: int) -> range:
    """Token t and those behind it in its document, `horizon` of them where not 0."""
    ends = batch.cu_seqlens[1:].tolist()
    end = min(end for end in ends if end > t)
    return range(t, min(end, t + horizon) if horizon else end)


class Row(NamedTuple):
    """An anchor, and its own candidate."""

    document: tuple[int, int]
    """Pack, and document in it."""
    position: int
    prediction: Tensor
    summary: Tensor
    tokens: tuple[int, ...]
    """That the summary is of."""


def get_options(model: TrainingModel) -> FutureOptions:
    """Options of [future_encoder] that a model was built from."""
    options = get_own(model).setup.options
    assert isinstance(options, FutureOptions)
    return options


def list_rows(model: TrainingModel, batches: list[PackedBatch], summaries: list[Tensor], seen: list[Tensor] | None) -> list[Row]:
    future, rows = get_options(model), []
    horizon = future.future_k * model.lm.config.num_hidden_layers + 1 if future.future_k else 0
    for pack, batch in enumerate(batches):
        segments = [*batch.segment_ids[0].tolist(), None]
        anchors = [segments[t + 1] == segments[t] for t in range(len(segments) - 1)]
        if future.max_anchors:
            number = torch.tensor(batch.sequence_index)
            positions, valid = draw_anchors(torch.tensor(anchors), future.max_anchors, model.objective.setup.seed, number)
            anchors = [t in positions[valid] for t in range(len(anchors))]
        predictions = model.objective.predictor(model.encode_past(batch) if seen is None else seen[pack])
        for t in (t for t, is_anchor in enumerate(anchors) if is_anchor):
            tokens = tuple(batch.input_ids[0, list(find_span(batch, t + 1, horizon))].tolist())
            rows.append(Row((pack, segments[t]), t, predictions[t], summaries[pack][t + 1], tokens))
    return rows


def contrast_by_loop(
    model: TrainingModel, batches: list[PackedBatch], summaries: list[Tensor], seen: list[Tensor] | None = None
) -> float:
    """InfoNCE over all pairs (t, t + 1) of all packs. seen: what predictions are made from; the hidden states unless given."""
    future = get_options(model)

    def is_negative(one: Row, other: Row) -> bool:
        is_near = one.document == other.document and abs(one.position - other.position) <= future.exclude_neighbors
        return not is_near and not (future.exclude_duplicates and one.tokens == other.tokens)

    rows, total = list_rows(model, batches, summaries, seen), 0.0
    for one in rows:
        own, *others = (
            torch.cosine_similarity(one.prediction, row.summary, dim=0).item() / future.temperature
            for row in (one, *(row for row in rows if is_negative(one, row)))
        )
        total += math.log(sum(map(math.exp, (own, *others)))) - own
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exclude_neighbors": 2, "max_anchors": 11},
        {"exclude_duplicates": True, "future_k": 1},
        {"exclude_neighbors": 1, "exclude_duplicates": True},
    ],
    ids=str,
)
def test_global_negatives_are_those_of_all_packs(one_process, changes):
    """Over packs of few different tokens, so that futures are the same across packs."""
    config = future_config(negatives="global", **changes)
    model = build_unsharded(config).double()
    batches = [random_batch(random_cu_seqlens(24, 5, seed), vocab_size=3, seed=seed) for seed in (1, 2, 3)]
    prepared = get_own(model).prepare_step(model, batches)
    found = [model(compute_losses, batch, Requested(aux=True), own).aux for batch, own in zip(batches, prepared, strict=True)]
    with torch.no_grad():
        expected = contrast_by_loop(model, batches, [model.encode_future(b, get_options(model).future_k) for b in batches])
    assert sum(aux.loss_sum.item() for aux in found) == pytest.approx(expected, rel=1e-9)
    bound, count = (sum(aux.measures["mi_lower_bound"][i].item() for aux in found) for i in range(2))
    assert bound / count < math.log(count)


def test_diagnostics_do_not_depend_on_what_was_drawn_before(one_process):
    """The dropout of the head is that of the sequence: the same after a resume."""
    model = build_unsharded(future_config(PredictorOptions(dropout=0.5)))
    batch = random_batch(random_cu_seqlens(24, 3, seed=4))

    def look(seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        means = measure_step(model, batch, 42, 0.1, None)
        assert torch.initial_seed() == seed
        return {name: (total / count).item() for name, (total, count) in means.items()}

    means = look(1)
    assert means == pytest.approx(look(2), nan_ok=True)
    model.eval()
    assert means["future/alignment"] != look(1)["future/alignment"]


def test_the_causal_pass_as_target():
    config = future_config(target="causal")
    model = build_unsharded(config).double()
    batch = random_batch(random_cu_seqlens(30, 3, seed=6))
    losses = model(compute_losses, batch, Requested(aux=True))
    with torch.no_grad():
        expected = contrast_by_loop(model, [batch], [model.encode_past(batch)])
    assert losses.aux.loss_sum.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("window", [0, 3])
def test_the_mean_embedding_as_target(window):
    config = future_config(target="mean_embedding", future_k=window)
    model = build_unsharded(config).double()
    batch = random_batch(random_cu_seqlens(30, 4, seed=7))
    with torch.no_grad():
        embeddings = model.lm.get_input_embeddings()(batch.input_ids)[0]
        means = torch.stack([embeddings[list(find_span(batch, t, window and window + 1))].mean(0) for t in range(30)])
        expected = contrast_by_loop(model, [batch], [means])
    losses = model(compute_losses, batch, Requested(aux=True))
    assert losses.aux.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(average_ahead(embeddings, batch.segment_ids[0], window), means, rtol=1e-9, atol=1e-12)


def test_a_prediction_from_an_early_layer():
    """Its input is that layer's states, of each document alone, and its loss trains that layer and those before it."""
    config = future_config(PredictorOptions(layer=1))
    model = build_unsharded(config, tiny_llama(num_hidden_layers=3)).double()
    batch = random_batch(random_cu_seqlens(30, 4, seed=7))
    states = []
    with torch.no_grad():
        for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
            outputs = model.lm.model(batch.input_ids[:, a:b], output_hidden_states=True, use_cache=False)
            states.append(outputs.hidden_states[1][0])
        expected = contrast_by_loop(model, [batch], [model.encode_future(batch, 0)], [torch.cat(states)])
    losses = model(compute_losses, batch, Requested(aux=True))
    assert losses.aux.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    losses.aux.loss_sum.backward()
    trained = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in model.lm.model.layers]
    assert trained == [True, False, False]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_running_average(workspace, tmp_path, whole_runs, mode):
    changes = {"activation_checkpoint__mode": mode, "training__compile": True}
    with torch.compiler.set_stance("force_eager"):
        main(list_options(workspace, tmp_path / "run", "ema", **changes))
    assert measured(read_metrics(tmp_path / "run")) == measured(read_metrics(whole_runs("ema")))


def test_the_layer_of_a_prediction_must_exist(workspace, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", future_predictor__layer=2)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in line
    assert line.startswith("future_predictor.layer = 2 is no less than the model's num_hidden_layers = 2: set it to 0")


def test_a_mean_embedding_is_the_same_to_the_bit_wherever_its_document_is():
    """Sums of floats are not, and on GPUs do not even repeat."""
    generator = torch.Generator().manual_seed(0)
    document, others = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (9, 400))
    alone = average_ahead(document, torch.zeros(9, dtype=torch.int32), 0)
    segments = torch.cat([torch.zeros(400), torch.ones(9)]).to(torch.int32)
    assert torch.equal(average_ahead(torch.cat([others, document]), segments, 0)[400:], alone)


def collect_candidates(model: TrainingModel, batch: PackedBatch) -> LocalCandidates:
    """What the anchors of a packed sequence are compared with."""
    candidates = get_own(model).prepare(model, batch, None).candidates
    assert isinstance(candidates, LocalCandidates)
    return candidates


def test_duplicates_of_a_mean_embedding_are_those_of_the_tokens_in_it():
    """Its window is not that of several layers."""
    config = future_config(target="mean_embedding", future_k=1, exclude_duplicates=True)
    model = build_unsharded(config)
    batch = pack_tokens(torch.tensor([9, 1, 2, 3, 9, 1, 2, 4]), torch.tensor([0, 4, 8]).int())
    keys = collect_candidates(model, batch).keys
    assert keys[0] == keys[4] and keys[1] != keys[5]  # means of (1, 2); of (2, 3) and (2, 4)


@how_often(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 2**40))
def test_shuffled_places(marks, seed):
    valid = torch.tensor(marks)
    order = shuffle_valid(valid, seed)
    assert sorted(order.tolist()) == list(range(len(marks)))
    assert torch.equal(valid[order], valid)
    assert torch.equal(order, shuffle_valid(valid, seed))


def test_shuffled_targets_are_the_same_ones_elsewhere():
    batch = random_batch(random_cu_seqlens(40, 4, seed=8))
    shuffled = future_config(exclude_duplicates=True, target="shuffled")
    own = collect_candidates(build_unsharded(future_config(exclude_duplicates=True)), batch)
    dealt = collect_candidates(build_unsharded(shuffled), batch)
    assert torch.equal(own.is_valid, dealt.is_valid)
    valid = own.is_valid

    def count(share) -> Counter:
        return Counter(map(tuple, torch.cat([share.summaries[valid].double(), share.keys[valid, None].double()], dim=1).tolist()))

    assert count(own) == count(dealt)  # each summary, with its key
    stayed = (own.summaries[valid] == dealt.summaries[valid]).all(dim=1)
    assert stayed.sum() < valid.sum() / 4
    shuffled.training.seed += 1
    assert not torch.equal(collect_candidates(build_unsharded(shuffled), batch).summaries, dealt.summaries)


# ---------------------------------------------------------------- the shortcut baseline


def test_predictions_from_the_embedding_leave_the_backbone_alone():
    model = build_unsharded(future_config(PredictorOptions(input="embedding"))).double()
    batch = random_batch(random_cu_seqlens(30, 3, seed=9))
    losses = model(compute_losses, batch, Requested(aux=True))
    with torch.no_grad():
        embeddings = model.lm.get_input_embeddings()(batch.input_ids)[0]
        expected = contrast_by_loop(model, [batch], [model.encode_future(batch, 0)], [embeddings])
    assert losses.aux.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    losses.aux.loss_sum.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.lm.parameters())
    assert all(parameter.grad.any() for parameter in model.objective.predictor.parameters())


def test_the_backbone_of_an_embedding_run_is_that_of_next_token_prediction(workspace, tmp_path):
    """To the bit, with diagnostics that ask for the gradient there. Clipping goes by all gradients, and is off."""
    changes = {"training__steps": 2, "training__max_norm": 1e9, "metrics__diagnostics_interval": 1}
    main(list_options(workspace, tmp_path / "run", "embedding", **changes))
    dist.destroy_process_group() if dist.is_initialized() else None
    main(list_options(workspace, tmp_path / "plain", "embedding", **changes, objective__name="next_token"))
    found, expected = final_weights(tmp_path / "run"), final_weights(tmp_path / "plain")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert all(row["future/grad_norm_aux"] == 0 and row["future/grad_cosine"] == 0 for row in read_metrics(tmp_path / "run"))


# ---------------------------------------------------------------- the factor


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5] * 6),
        ({"start_step": 3}, [0, 0, 0.5, 0.5, 0.5, 0.5]),
        ({"warmup_steps": 4}, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]),
        ({"start_step": 3, "warmup_steps": 2}, [0, 0, 0.25, 0.5, 0.5, 0.5]),
        ({"decay_steps": 3}, [0.5, 0.5, 0.5, 0.375, 0.25, 0.125]),
        ({"start_step": 2, "warmup_steps": 2, "decay_steps": 1}, [0, 0.25, 0.5, 0.5, 0.5, 0.25]),
        ({"warmup_steps": 6, "decay_steps": 5}, [0.5 * n / 6 * (7 - n) / 6 for n in range(1, 7)]),
        ({"loss_weight": 0.0}, [0] * 6),
    ],
    ids=str,
)
def test_the_factor_step_by_step(changes, expected):
    weight, chosen = changes.get("loss_weight", 0.5), {key: value for key, value in changes.items() if key != "loss_weight"}
    for name in OPTIONS:
        config = choose(name, loss_weight=weight)
        config.objective, config.training.steps = replace(config.objective, **chosen), 6
        schedule = build_weight_schedule(config)
        assert [schedule.find_weight(step) for step in range(1, 7)] == pytest.approx(expected)


@given(steps=st.integers(1, 6), start=st.integers(0, 6), warmup=st.integers(0, 7), decay=st.integers(0, 7))
def test_whether_the_factor_becomes_the_loss_weight(steps, start, warmup, decay):
    schedule = WeightSchedule(0.5, min(start, steps), warmup, decay, total_steps=steps)
    assert schedule.reaches_weight() == any(schedule.find_weight(step) == 0.5 for step in range(1, steps + 1))


@pytest.mark.parametrize(("name", "section"), [("causal", "future_encoder"), ("top", "top")])
def test_the_factor_is_the_one_that_is_applied(workspace, tmp_path, name, section):
    schedule = {"objective__start_step": 2, "objective__warmup_steps": 2, "objective__decay_steps": 1}
    main(list_options(workspace, tmp_path / "run", name, **schedule, **{f"{section}__loss_weight": 0.5}))
    rows = read_metrics(tmp_path / "run")
    assert [row.get("loss_weight") for row in rows] == [None, 0.25, 0.25]
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce_loss"] + row.get("loss_weight", 0) * row.get("aux_loss", 0), rel=1e-5)
    assert ["aux_loss" in row for row in rows] == [False, True, True]
