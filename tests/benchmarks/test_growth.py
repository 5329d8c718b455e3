"""What the benchmarks of growth and of objectives measure with: the step in this process, tables."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import growth, growth_report, objectives
from benchmarks.growth import CHEAP, FUTURE, NEXT_TOKEN, Plan, Point, Worker
from benchmarks.packs import draw_batch, draw_cu_seqlens
from benchmarks.timing import Timing
from benchmarks.training_step import OUT_OF_MEMORY, TrainingStep, launch_for, read_step_options
from flame.attention import flash
from flame.config.schema import Training
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import set_single_process_defaults, start_processes
from flame.trainer.setup import build_modules
from tests.support.models import build_unsharded, tiny_llama

EXACT = ["--objective.name", "future"]


def read_toy(toy, *words):
    return read_step_options(toy, 96, [*EXACT, *words], compiled=False)


def test_steps_have_the_losses_of_the_objective(toy, mesh):
    model_config, batch = tiny_llama(num_hidden_layers=6, initializer_range=0.3), draw_batch(96, 61, mean=30)
    config, early = read_toy(toy), read_toy(toy, "--future_encoder.layers", "2")

    def expect(own, with_aux: bool) -> torch.Tensor:
        model = build_unsharded(own, model_config)
        model.load_state_dict({name: value.full_tensor() for name, value in step.model.state_dict().items()})
        losses = model(compute_losses, batch, Requested(aux=with_aux))
        loss = losses.ce_sum / (96 - (len(batch.cu_seqlens) - 1))
        return loss + 0.03 * losses.aux.loss_sum / losses.aux.num_items if with_aux else loss

    step = TrainingStep(model_config, config, mesh)
    step.take(batch)
    plain, exact, cheap = expect(config, False), expect(config, True), expect(early, True)
    assert abs(exact - cheap) > 1e-5
    step.step(with_aux=False, with_optimizer=False)
    torch.testing.assert_close(step.loss, plain)
    step.step(with_optimizer=False)
    torch.testing.assert_close(step.loss, exact)
    step.choose(next(iter(early.extensions.values())))
    step.step()
    torch.testing.assert_close(step.loss, cheap)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    step.step()
    assert abs(step.loss - cheap) > 1e-6  # the weights have changed


def test_held_are_weights_and_moments(toy, mesh):
    model_config, config = tiny_llama(num_hidden_layers=6), read_toy(toy)
    model = build_modules(config, model_config, "cpu")
    lm, everything = (4 * sum(p.numel() for p in part.parameters()) / 2**30 for part in (model.lm, model))
    step = TrainingStep(model_config, config, mesh)
    assert step.count_held_gib(False, False) == lm < everything
    assert step.count_held_gib() == pytest.approx(3 * everything)


def test_kernels_are_launched_for_another_length(monkeypatch):
    calls = []
    monkeypatch.setattr(flash, "run_forward", lambda q, k, v, cu, length, window, scale: calls.append((cu, length, window)))
    monkeypatch.setattr(flash, "run_backward", lambda *given: calls.append(given[-4:]))
    with launch_for(77):
        flash.run_forward("q", "k", "v", "cu", 4096, -1, 0.5)
        flash.run_backward("grad", "q", "k", "v", "out", "lse", "cu", 4096, -1, 0.5)
    flash.run_forward("q", "k", "v", "cu", 4096, -1, 0.5)
    assert calls == [("cu", 77, -1), ("cu", 77, -1, 0.5), ("cu", 4096, -1)]


def measure(toy, mesh, points, **changes):
    worker = Worker(Plan("toy", str(toy), points, 1, compiled=False, **changes), mesh)
    return [worker.measure(point) for point in points]


def test_a_point_has_three_steps(toy, mesh):
    (row,) = measure(toy, mesh, [Point("documents", "toy", 96, 96)])
    assert row["documents"] == 1 and list(row["cells"]) == [NEXT_TOKEN, FUTURE, CHEAP]
    flops = [cell["flops"] for cell in row["cells"].values()]
    assert flops[1] > flops[2] > flops[0] and all(cell["is_finite"] for cell in row["cells"].values())


def run_out_of_memory(monkeypatch, runs_out):
    own = TrainingStep.step

    def step(self, with_aux=True, with_optimizer=True):
        kind = NEXT_TOKEN if not with_aux else CHEAP if self.objective.options.layers else FUTURE
        if runs_out(kind, self.batch.input_ids.shape[1]):
            raise torch.OutOfMemoryError
        own(self, with_aux, with_optimizer)

    monkeypatch.setattr(TrainingStep, "step", step)


def test_others_go_on_where_memory_runs_out(toy, mesh, monkeypatch):
    run_out_of_memory(monkeypatch, lambda kind, tokens: kind == FUTURE)
    (row,) = measure(toy, mesh, [Point("tokens", "toy", 96)])
    assert row["cells"][FUTURE] == OUT_OF_MEMORY
    assert row["cells"][NEXT_TOKEN]["timing"]["median_ms"] > 0 and row["cells"][CHEAP]["timing"]["median_ms"] > 0


def test_what_needs_more_than_fits_is_not_tried(toy, mesh, monkeypatch):
    tried = []

    def runs_out(kind, tokens):
        tried.append((kind, tokens))
        return tokens > 64

    run_out_of_memory(monkeypatch, runs_out)
    rows = measure(toy, mesh, [Point("tokens", "toy", tokens) for tokens in (64, 80, 96)])
    assert [set(map(type, row["cells"].values())) for row in rows] == [{dict}, {str}, {str}]
    assert [each for each in tried if each[1] > 64] == [(NEXT_TOKEN, 80)]


def test_no_point_begins_after_the_deadline(toy, mesh):
    (row,) = measure(toy, mesh, [Point("tokens", "toy", 96)], deadline=time.time() - 1)
    assert set(row["cells"].values()) == {growth.NO_TIME}


def test_plans_survive_their_file(tmp_path):
    plans = growth.list_plans(tmp_path, growth.PARTS)
    for plan in plans:
        plan.write(tmp_path)
        assert Plan.read(tmp_path, plan.name) == plan
    assert len({plan.name for plan in plans}) == len(plans)
    assert {point.model for plan in growth.list_plans(tmp_path, ["models"]) for point in plan.points} == {
        "15M",
        "125M",
        "340M",
        "1B",
    }


def test_documents_are_as_many_as_their_mean_length_says(tmp_path):
    (plan,) = growth.list_plans(tmp_path, ["documents"])
    for point in plan.points:
        layout = draw_cu_seqlens(point.tokens, point.mean_length, point.longest, growth.find_seed(point))
        assert len(layout) - 1 == point.tokens / point.mean_length


def test_the_point_that_two_parts_share_is_in_both(tmp_path):
    plans = growth.list_plans(tmp_path, ["tokens", "models"])
    row = {"part": "tokens", "model": "1B", "tokens": 16_384, "cells": {}}
    (tmp_path / "tokens.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"tokens": 4096}) + "\n")
    assert [(each["part"], each["tokens"]) for each in growth.read_results(tmp_path, plans)] == [
        *[("tokens", 16_384), ("tokens", 4096), ("models", 16_384)]
    ]


def cell(ms: float, flops: float, peak: float = 1.0, is_finite: bool = True):
    return {"timing": Timing(ms, ms - 1, ms + 1, 0, 0)._asdict(), "peak_gib": peak, "flops": flops, "is_finite": is_finite}


def test_tables_and_pictures_with_gaps(tmp_path):
    cells = {NEXT_TOKEN: cell(100, 2.0), FUTURE: cell(125, 3.0, 2.25, False), CHEAP: OUT_OF_MEMORY}
    row = {"part": "tokens", "model": "1B", "tokens": 4096, "documents": 4, "cells": cells}
    late = {"part": "documents", "model": "1B", "tokens": 4096, "cells": dict.fromkeys(cells, "no time was left")}
    growth_report.write_tables([row, late], ["x: failed"], "title", tmp_path / "growth.md")
    text = (tmp_path / "growth.md").read_text()
    assert "| 1B | 4,096 | 4 | next token | 100.0 [99.0, 101.0] | 1.000 | 1.000 | 40,960 | 1.0 |" in text
    assert "| 125.0 [124.0, 126.0], a loss that is not finite | 1.250 | 1.500 | 32,768 | 2.2 |" in text
    assert f"| {CHEAP} | out of memory | - | - | - | - |" in text
    assert "| 1B | 4,096 | - | future | no time was left |" in text and text.endswith("- x: failed\n")
    growth_report.draw([row, late], tmp_path / "growth.png", "title")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    growth_report.draw([], tmp_path / "empty.png", "title")


def test_row_of_an_objective():
    row = {"objective": "top", "tokens": 16_384, "next_token": cell(100, 2e12, 30), "top": cell(150, 3e12, 31.5)}
    assert objectives.list_cells(row)[1:] == [
        *("16,384", "150.0 [149.0, 151.0]", "100.0 [99.0, 101.0]", "1.500", "1.500", "3", "1.5")
    ]
    assert objectives.list_cells({"objective": "top", "tokens": 1, "top": "KeyError: x"})[2:4] == ["KeyError: x", "-"]


@pytest.mark.parametrize("name", ["mtp", "fsp_revlm"])
def test_an_objective_beside_next_token(toy, mesh, name):
    row = objectives.Comparison(name, toy, 96, mesh, compiled=False).measure(64)
    assert row[name]["flops"] > row["next_token"]["flops"] > 0
    assert row[name]["timing"]["median_ms"] > 0 and row["next_token"]["is_finite"]


@pytest.mark.gpu
def test_points_on_a_gpu(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_llama(**shape, num_hidden_layers=6, head_dim=64).to_json_file(tmp_path / "toy.json")
    set_single_process_defaults()
    _, mesh = start_processes(Training(), 60)
    try:
        points = [Point("documents", "toy", 2048, 128), Point("documents", "toy", 2048, 2048)]
        worker = Worker(Plan("toy", str(tmp_path / "toy.json"), points, 1), mesh)
        rows = [worker.measure(point) for point in points]
        cells = [one for row in rows for one in row["cells"].values()]
        assert all(one["is_finite"] and one["peak_gib"] > 0 for one in cells)
        top = objectives.Comparison("regret", tmp_path / "toy.json", 1024, mesh, compiled=True).measure(1024)
        assert all(top[name]["timing"]["median_ms"] > 0 for name in ("regret", "next_token"))
    finally:
        torch.distributed.destroy_process_group()
