"""Diagnostics of objectives against plain loops, unsharded gradients, and runs without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from flame.attention.masks import draw_anchors, find_anchors
from flame.config.schema import JobConfig
from flame.data.batch import PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.cadence import Cadence
from flame.objectives.future import representations
from flame.objectives.future.objective import FutureObjective
from flame.objectives.future.options import PredictorOptions
from flame.objectives.future.representations import ProbeSample, measure_representations
from flame.objectives.gradients import GradientComparison, compare_gradients, name_gradients
from flame.objectives.probe import is_probe_step, measure_step
from flame.objectives.step import Requested, compute_losses
from flame.trainer.setup import build_modules
from tests.support.models import build_unsharded, future_config, random_batch, random_cu_seqlens, shard, tiny_llama
from tests.support.paths import REPO
from tests.support.ranks import run_on_ranks
from tests.support.runs import measured, run_here

DOCS = REPO / "docs" / "diagnostics.md"

# ---------------------------------------------------------------- representations


def draw_sample(
    batch: PackedBatch, shift: int, seed: int, rows: int = 0, width: int = 3, prediction_width: int = 2
) -> ProbeSample:
    """Random vectors for all positions, or for `rows` of them, with NaN where there is no anchor, and some equal targets."""
    generator = torch.Generator().manual_seed(seed)
    is_valid = find_anchors(batch.segment_ids[0], shift)
    positions = torch.arange(len(is_valid))
    if rows:
        positions, is_valid = draw_anchors(is_valid, rows, seed, torch.tensor(0))
    n = len(positions)
    hidden, predictions, targets = (
        torch.randn(n, w, generator=generator) + 0.5 for w in (width, prediction_width, prediction_width)
    )
    copied = torch.rand(n, generator=generator) < 0.3
    targets = torch.where(copied[:, None], targets[:1], targets)
    for tensor in (hidden, predictions, targets):
        tensor[~is_valid] = torch.nan
    return ProbeSample(hidden, predictions, targets, positions, is_valid)


def loop_over(
    probe_sample: ProbeSample, batch: PackedBatch, shift: int, anchors: list[int], candidates: list[int]
) -> dict[str, tuple[float, float]]:
    """The definitions, read aloud: row numbers of valid anchors and candidates in, sums and counts out."""
    kinds = {"hidden": probe_sample.hidden_states, "predictions": probe_sample.predictions, "targets": probe_sample.targets}
    vectors = {name: tensor.double().numpy() for name, tensor in kinds.items()}
    units = {
        name: {i: rows[i] / np.linalg.norm(rows[i]) for i in sorted({*anchors, *candidates})} for name, rows in vectors.items()
    }
    found: dict[str, tuple[float, float]] = {}
    for name, rows in vectors.items():
        found[f"rank_{name}"] = (0.0, 0)
        if anchors:
            singular = np.linalg.svd(rows[anchors], compute_uv=False)
            shares = [value / singular.sum() for value in singular if value > 0]
            found[f"rank_{name}"] = (math.exp(-sum(share * math.log(share) for share in shares)), 1)
        pairs = [(i, j) for i in anchors for j in anchors if i != j]
        found[f"cosine_{name}"] = (sum(float(units[name][i] @ units[name][j]) for i, j in pairs), len(pairs))
        if name != "hidden":
            terms = [math.exp(-2 * float(np.sum((units[name][i] - units[name][j]) ** 2))) for i, j in pairs]
            found[f"uniformity_{name}"] = (math.log(sum(terms) / len(terms)), 1) if terms else (0.0, 0)
    found["alignment"] = (sum(float(np.sum((units["predictions"][i] - units["targets"][i]) ** 2)) for i in anchors), len(anchors))

    document = {i: int(batch.segment_ids[0, probe_sample.positions[i]]) for i in candidates}
    token = {i: int(batch.input_ids[0, probe_sample.positions[i] + shift]) for i in candidates}
    among = {
        "": lambda i, j: True,
        "_same_document": lambda i, j: document[i] == document[j],
        "_other_documents": lambda i, j: document[i] != document[j],
        "_same_token": lambda i, j: token[i] == token[j],
    }
    for kind, belongs in among.items():
        places = []
        for i in anchors:
            own = float(units["predictions"][i] @ units["targets"][i])
            others = [float(units["predictions"][i] @ units["targets"][j]) for j in candidates if j != i and belongs(i, j)]
            if others:
                places.append(1 + sum(other >= own - 1e-6 for other in others))
        for top in (1, 10):
            found[f"top{top}{kind}"] = (sum(place <= top for place in places), len(places))
        if kind:
            found[f"has{kind}"] = (len(places), len(anchors))
    return found


def assert_same(found: dict, expected: dict[str, tuple[float, float]], rel: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert found[name][0].ndim == found[name][1].ndim == 0
        assert found[name][1].item() == count, name
        assert found[name][0].item() == pytest.approx(total, rel=rel, abs=1e-5), name


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 3), st.integers(0, 1000), st.booleans())
def test_every_number_equals_a_plain_loop(total, chunks, shift, seed, compacted):
    """Over layouts, shifts, and rows that are not valid, in the pack's order or as a choice of rows. Few token values: some
    are the same."""
    cu = random_cu_seqlens(total, chunks, seed) if total > 1 else torch.tensor([0, 1], dtype=torch.int32)
    batch = random_batch(cu, vocab_size=5, seed=seed)
    probe_sample = draw_sample(batch, shift, seed, rows=max(total // 2, 1) if compacted else 0)
    rows = probe_sample.is_valid.nonzero().flatten().tolist()
    assert_same(measure_representations(probe_sample, batch, shift, seed), loop_over(probe_sample, batch, shift, rows, rows))


def test_top_10_over_many_candidates():
    batch = random_batch(random_cu_seqlens(120, 4, seed=1), vocab_size=5)
    probe_sample = draw_sample(batch, 1, seed=3)
    rows = probe_sample.is_valid.nonzero().flatten().tolist()
    found = measure_representations(probe_sample, batch, 1, seed=0)
    assert_same(found, loop_over(probe_sample, batch, 1, rows, rows))
    for kind in ("", "_same_document", "_other_documents", "_same_token"):
        assert 0 < found[f"top1{kind}"][0] < found[f"top10{kind}"][0] < found[f"top10{kind}"][1]


def test_a_sample_stands_for_the_whole(monkeypatch):
    """With more anchors than are measured: a choice by the seed, of valid ones alone, each against its own target too."""
    monkeypatch.setattr(representations, "MOST_ANCHORS", 8)
    monkeypatch.setattr(representations, "MOST_CANDIDATES", 20)
    batch = random_batch(random_cu_seqlens(80, 5, seed=2), vocab_size=5)
    probe_sample = draw_sample(batch, 1, seed=5)
    choices = set()
    for seed in range(6):
        chosen = representations._draw(probe_sample.is_valid, 20, seed).tolist()
        assert len(set(chosen)) == 20 and probe_sample.is_valid[chosen].all()
        found = measure_representations(probe_sample, batch, 1, seed)
        assert_same(found, loop_over(probe_sample, batch, 1, chosen[:8], chosen))
        assert found == measure_representations(probe_sample, batch, 1, seed)
        choices.add(tuple(sorted(chosen[:8])))
    assert len(choices) == 6
    assert len({row for choice in choices for row in choice}) > 25  # not the first ones of the pack each time


def average(means: representations.Means) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in means.items() if count}


def observe(hidden: Tensor, predictions: Tensor, targets: Tensor) -> tuple[ProbeSample, PackedBatch]:
    n = len(hidden)
    batch = random_batch(torch.tensor([0, n + 1], dtype=torch.int32))
    return ProbeSample(hidden, predictions, targets, torch.arange(n), torch.ones(n, dtype=torch.bool)), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_and_spread_matrices(dtype):
    """All rows the same: rank 1, cosine 1, uniformity 0, nothing found. Orthogonal rows: rank n, cosine 0, all found."""
    n = 128
    same = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).expand(n, n).to(dtype)
    spread = 3.0 * torch.eye(n, dtype=dtype)
    found = average(measure_representations(*observe(spread, spread, same), 1, 0))
    assert found["rank_targets"] == pytest.approx(1.0, abs=0.01)
    assert found["rank_hidden"] == found["rank_predictions"] == pytest.approx(n)
    assert found["cosine_targets"] == pytest.approx(1.0) and found["cosine_hidden"] == pytest.approx(0.0)
    assert found["uniformity_targets"] == pytest.approx(0.0, abs=1e-9)
    assert found["uniformity_predictions"] == pytest.approx(-4.0)  # squared distance 2 everywhere
    assert found["top1"] == found["top10"] == 0.0
    found = average(measure_representations(*observe(same, spread, spread), 1, 0))
    assert found["top1"] == found["top1_same_document"] == 1.0 and found["alignment"] == pytest.approx(0.0)
    assert found["rank_hidden"] == pytest.approx(1.0, abs=0.01)


def test_a_direction_counts_and_its_length_does_not():
    """All but the ranks are the same for vectors of other lengths; ranks are those of the rows as they are."""
    batch = random_batch(random_cu_seqlens(40, 3, seed=2), vocab_size=5)
    probe_sample = draw_sample(batch, 1, seed=5, prediction_width=6)
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) * 10 + 0.1
    scaled = probe_sample._replace(predictions=probe_sample.predictions * lengths, targets=probe_sample.targets * lengths.flip(0))
    found, expected = (measure_representations(each, batch, 1, seed=0) for each in (scaled, probe_sample))
    for name, (total, count) in expected.items():
        if name in ("rank_predictions", "rank_targets"):
            assert abs(found[name][0] - total) > 0.01
        else:
            assert abs(found[name][0] - total) < 1e-4 and found[name][1] == count


def test_numbers_that_are_not_finite_do_not_end_the_run():
    probe_sample, batch = observe(*(torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)))
    probe_sample.predictions[2, 1] = torch.nan
    probe_sample.targets[:] = torch.inf
    found = measure_representations(probe_sample, batch, 1, seed=0)
    assert all(found[name][0].isnan() for name in ("rank_predictions", "rank_targets", "cosine_predictions", "alignment"))
    assert all(found[name][0].isfinite() for name in ("rank_hidden", "cosine_hidden"))
    assert found["top1"] == (0, 6)


def test_measuring_draws_from_its_own_random_state():
    probe_sample, batch = observe(*(torch.randn(6, 4) for _ in range(3)))
    before = torch.get_rng_state()
    measure_representations(probe_sample, batch, 1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_page_has_a_row_for_every_metric():
    probe_sample, batch = observe(*(torch.randn(6, 4) for _ in range(3)))
    one = torch.ones((), dtype=torch.float64)
    names = {*measure_representations(probe_sample, batch, 1, seed=0), *name_gradients(GradientComparison(one, one, one), 0.1)}
    rows = {line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line.startswith("| `future/")}
    assert rows == {f"`future/{name}`" for name in names}


# ---------------------------------------------------------------- gradients


def gradient_config() -> JobConfig:
    """With dropout: the two losses must draw the same random numbers here and in the reference."""
    return future_config(PredictorOptions(dropout=0.5), learnable_temperature=True)


def closures(model: TrainingModel, batch: PackedBatch) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    def run_ce():
        return model(compute_losses, batch, Requested(aux=False)).ce_sum / 100

    def run_aux():
        return model(compute_losses, batch, Requested(aux=True)).aux.loss_sum / 50

    return run_ce, run_aux


def differentiate(model: TrainingModel, batches: list[PackedBatch], which: int) -> Tensor:
    """Brute force: the gradient of a loss, summed over batches, on the backbone; one float64 vector."""
    model.zero_grad()
    for batch in batches:
        torch.manual_seed(7)
        closures(model, batch)[which]().backward()
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in model.lm.parameters()])


def brute_force(model: TrainingModel, batches: list[PackedBatch]) -> list[float]:
    ce, aux = (differentiate(model, batches, which) for which in (0, 1))
    model.zero_grad()
    return [ce.norm().item(), aux.norm().item(), (ce @ aux / (ce.norm() * aux.norm())).item()]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_brute_force_and_leave_no_trace(tied):
    config = gradient_config()
    model = build_unsharded(config, tiny_llama(tie_word_embeddings=tied))
    batch = random_batch(random_cu_seqlens(40, 4, seed=1))
    expected = brute_force(model, [batch])
    kept = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
        kept[name] = (parameter.grad, float(i))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = compare_gradients(model, *closures(model, batch), list(model.lm.parameters()))
    assert [number.item() for number in found] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in model.named_parameters():
        grad, value = kept[name]
        assert parameter.grad is grad, name
        assert grad is None or (grad == value).all(), name


def test_known_gradients():
    """Of w.x and w.y with respect to w; a loss that reaches nothing has norm 0 and no angle."""
    layer = nn.Linear(3, 1, bias=False)
    other = nn.Parameter(torch.ones(2))
    x, y = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 5.0, 12.0])
    found = compare_gradients(layer, lambda: layer(x).sum(), lambda: layer(y).sum(), list(layer.parameters()))
    assert [number.item() for number in found] == pytest.approx([5.0, 13.0, 20 / 65])
    values = average(name_gradients(found, 0.1))
    assert values["grad_ratio"] == pytest.approx(0.1 * 13 / 5) and values["grad_norm_aux"] == pytest.approx(13)
    found = compare_gradients(layer, lambda: layer(x).sum(), lambda: other.sum(), list(layer.parameters()))
    assert [number.item() for number in found] == [5.0, 0.0, 0.0]


def test_gradients_come_back_when_a_loss_fails():
    layer = nn.Linear(2, 1)
    layer.weight.grad = grad = torch.ones(1, 2)

    def fail():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        compare_gradients(layer, lambda: layer(torch.ones(2)).sum(), fail, list(layer.parameters()))
    assert layer.weight.grad is grad and layer.bias.grad is None


WORLD = 2
BATCH_SEEDS = (3, 4)


def rank_batch(rank: int) -> PackedBatch:
    return random_batch(random_cu_seqlens(40, 4, seed=BATCH_SEEDS[rank]), seed=BATCH_SEEDS[rank])


def compare_on_rank(_folder: Path) -> dict[str, list[float]]:
    """Sharded over two ranks, and held twice (HSDP of two replicas); fresh, and after a forward that leaves weights gathered."""
    rank = dist.get_rank()
    meshes = {
        "fsdp": init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",)),
        "hsdp": init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("dp_replicate", "fsdp")),
    }
    config = gradient_config()
    found = {}
    for name, mesh in meshes.items():
        model = shard(build_modules(config, tiny_llama(), "cpu"), config, mesh)
        whole = build_unsharded(config)
        with torch.no_grad():
            for part, weight in zip(model.parameters(), whole.parameters(), strict=True):
                part.copy_(distribute_tensor(weight, part.device_mesh, part.placements, src_data_rank=None))
        parameters = list(model.lm.parameters())
        kept = [parameter.to_local().clone() for parameter in parameters]
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        grads = [parameter.grad for parameter in model.parameters()]
        for time in ("fresh", "gathered"):
            if time == "gathered":
                with torch.no_grad():
                    model(compute_losses, rank_batch(rank), Requested(aux=True))
            torch.manual_seed(7)
            comparison = compare_gradients(model, *closures(model, rank_batch(rank)), parameters)
            found[f"{name} {time}"] = [number.item() for number in comparison]
            assert all(p.grad is grad and (grad.to_local() == 3).all() for p, grad in zip(model.parameters(), grads, strict=True))
        assert all(torch.equal(p.to_local(), before) for p, before in zip(parameters, kept, strict=True))
    return found


def test_two_ranks_equal_one(tmp_path):
    model = build_unsharded(gradient_config())
    expected = brute_force(model, [rank_batch(rank) for rank in range(WORLD)])
    for rank, found in enumerate(run_on_ranks(WORLD, tmp_path, compare_on_rank)):
        assert len(found) == 4
        for name, numbers in found.items():
            assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-6), (rank, name)


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_training_is_the_same_with_and_without_diagnostics(workspace, tmp_path, negatives):
    """To the bit, dropout included; and they are logged at each step, or never. Global negatives leave the weights gathered."""
    common = {"training__steps": 4, "checkpoint__enable_checkpoint": False, "future_encoder__negatives": negatives}
    with_them = run_here(workspace, tmp_path / "on", metrics__diagnostics_interval=1, **common)
    without = run_here(workspace, tmp_path / "off", metrics__diagnostics_interval=0, **common)
    assert measured(with_them) == measured(without)
    assert not [name for row in without for name in row if name.startswith("future/")]
    for row in with_them:
        assert {"future/rank_hidden", "future/top1", "future/grad_norm_ce", "future/grad_ratio"} <= row.keys()
        assert 1 <= row["future/rank_targets"] <= 32 and 0 <= row["future/top1"] <= row["future/top10"] <= 1
        assert row["future/grad_norm_ce"] > 0 and -1 <= row["future/grad_cosine"] <= 1
        assert row["future/grad_ratio"] == pytest.approx(
            row["loss_weight"] * row["future/grad_norm_aux"] / row["future/grad_norm_ce"]
        )


@pytest.mark.parametrize(
    ("start_step", "interval", "expected"), [(0, 0, []), (0, 1, [*range(1, 10)]), (0, 4, [1, 4, 8]), (0, 20, [1]), (5, 4, [5, 8])]
)
def test_the_first_step_and_each_so_many_th_are_measured(start_step, interval, expected):
    cadence = Cadence(start_step=start_step)
    assert [step for step in range(1, 10) if is_probe_step(step, interval, cadence)] == expected


def test_diagnostics_compare_with_the_negatives_of_the_step(workspace, tmp_path, monkeypatch):
    """The gradient of the first pack's loss among the candidates of all micro-steps."""
    norms = []

    real = FutureObjective.prepare_step

    def prepare_step(self, model, batches):
        prepared = real(self, model, batches)
        aux = model(compute_losses, batches[0], Requested(aux=True, ce=False), prepared[0]).aux
        (aux.loss_sum / aux.num_items).backward()
        gradients = [weight.grad.to_local() for weight in model.lm.parameters() if weight.grad is not None]
        norms.append(math.hypot(*(gradient.norm().item() for gradient in gradients)))
        model.zero_grad()
        return prepared

    monkeypatch.setattr(FutureObjective, "prepare_step", prepare_step)
    changes = {"training__steps": 1, "checkpoint__enable_checkpoint": False, "future_predictor__dropout": 0}
    (row,) = run_here(workspace, tmp_path / "run", **changes, future_encoder__negatives="global")
    assert [row["future/grad_norm_aux"]] == pytest.approx(norms, rel=1e-5)


SHIFT = 2  # so that there are fewer anchors than labels
UNTIED = tiny_llama(tie_word_embeddings=False)  # starts from the same weights sharded and not


def measure_on_rank(_folder: Path) -> dict[str, float]:
    config = future_config(target_shift=SHIFT)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    model = shard(build_modules(config, UNTIED, "cpu"), config, mesh)
    return average(measure_step(model, rank_batch(dist.get_rank()), config.training.seed, 0.3, None))


def test_gradients_are_of_means_over_all_ranks(tmp_path):
    config = future_config(target_shift=SHIFT)
    batches = [rank_batch(rank) for rank in range(WORLD)]
    labels = sum(batch.num_labels for batch in batches)
    anchors = sum(int(find_anchors(batch.segment_ids[0], SHIFT).sum()) for batch in batches)
    ce_norm, aux_norm, cosine = brute_force(build_unsharded(config, UNTIED), batches)
    ce_norm, aux_norm = ce_norm * 100 / labels, aux_norm * 50 / anchors  # what `closures` divide by
    expected = {"norm_ce": ce_norm, "norm_aux": aux_norm, "cosine": cosine, "ratio": 0.3 * aux_norm / ce_norm}
    for found in run_on_ranks(WORLD, tmp_path, measure_on_rank):
        assert {name: found[f"future/grad_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
