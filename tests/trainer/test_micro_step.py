"""Micro-steps as CUDA graphs: the same losses and weights as without, and nothing of one packed sequence in another's."""

from __future__ import annotations

import logging
import random
import threading
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from flame.attention.varlen import DocumentLayout, attend
from flame.config.training import Training
from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.models.causal_lm import find_decoder_layers
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import set_single_process_defaults, start_processes
from flame.trainer import micro_step as module
from flame.trainer.micro_step import (
    TRIED,
    Divisors,
    GraphedMicroStep,
    MicroStep,
    _find_kind,
    _fits_graph,
    _Kind,
    _watch_for_waits,
    choose_micro_step,
    list_obstacles,
    pad_documents,
)
from flame.trainer.options import read_options
from flame.trainer.setup import build_model, build_modules, materialize
from tests.support.answers import answer_config, build_pack
from tests.support.families import build_toy
from tests.support.models import WIDE, build_unsharded, future_config, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.objectives import OPTIONS, build_objective, choose
from tests.support.refusals import expect_one_line
from tests.support.runs import MEASURED, final_weights, options, run_ranks

TOTAL = 60
COMPARED = (*MEASURED, "step", "temperature")


@given(seed=st.integers(0, 1000), chunks=st.integers(1, 20))
def test_empty_documents_change_nothing(seed: int, chunks: int) -> None:
    """In both passes, and in the gradients."""
    batch = random_batch(random_cu_seqlens(TOTAL, chunks, seed))
    padded = pad_documents(batch).cu_seqlens
    count = len(batch.cu_seqlens)
    assert len(padded) == 16 * -(-count // 16) and torch.equal(padded[-count:], batch.cu_seqlens) and not padded[:-count].any()
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(1, 2, TOTAL, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    for is_strict in (False, True):
        found = []
        for cu in (batch.cu_seqlens, padded):
            inputs = [each.clone().requires_grad_() for each in states]
            layout = DocumentLayout((TOTAL - cu.flip(0)) if is_strict else cu, TOTAL, is_strict)
            out = attend(None, *inputs, None, documents=layout)[0]  # type: ignore[arg-type]
            gradients = () if is_strict else torch.autograd.grad(out.square().sum(), inputs)
            found.append((out, *gradients))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


USES = (
    lambda each: each + 1,
    lambda each: max(each, 1),
    lambda each: each.sum(),
    lambda each: each == "json",
    lambda each: each != 0,
)


def test_numbers_of_a_packed_sequence_cannot_be_read_inside_a_graph() -> None:
    model = build_unsharded(future_config())
    batch = random_batch(random_cu_seqlens(TOTAL, 5, 0))
    inside = GraphedMicroStep(model)._find_inputs(batch)
    for field in fields(batch):
        value = getattr(inside, field.name)
        if isinstance(getattr(batch, field.name), torch.Tensor):
            assert value is not getattr(batch, field.name) and torch.equal(value, getattr(batch, field.name))
        elif value is not None and field.name not in ("answers_only", "num_predicted"):
            for use in (int, len, str, hash, *USES):
                with pytest.raises(AssertionError, match=f"PackedBatch.{field.name} is read inside a CUDA graph"):
                    use(value)


@pytest.mark.parametrize("changes", [{}, {"max_anchors": 7}, {"target": "random"}, {"exclude_duplicates": True}], ids=str)
def test_the_future_loss_reads_tensors_alone(changes: dict[str, object]) -> None:
    expect_the_same_without_numbers(build_unsharded(future_config(**changes)))


GRAPHED = [name for name in OPTIONS if name not in ("stp", "skip_token")]
"""Objectives that say that they fit."""


@pytest.mark.parametrize("name", GRAPHED)
def test_objectives_that_fit_read_tensors_alone(name: str) -> None:
    expect_the_same_without_numbers(build_objective(name))


@pytest.mark.parametrize("changes", [{}, {"max_anchors": 7}, {"exclude_duplicates": True}], ids=str)
def test_of_answers_the_future_loss_reads_tensors_alone(changes: dict[str, object]) -> None:
    batch = build_pack([(17, 3), (30, 2), (4, 0), (9, 5)])
    assert batch.suffix_positions is not None
    expect_the_same_without_numbers(build_unsharded(answer_config(**changes)), batch)


@pytest.mark.parametrize("name", GRAPHED)
def test_of_answers_objectives_that_fit_read_tensors_alone(name: str) -> None:
    expect_the_same_without_numbers(build_objective(name), build_pack([(17, 3), (30, 2), (4, 0), (9, 5)]))


def draw_documents(draw: st.DrawFn) -> list[tuple[int, int]]:
    return draw(st.lists(st.tuples(st.integers(2, 19), st.integers(1, 20)), min_size=1, max_size=4))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["future", *GRAPHED]))
def test_a_kind_holds_for_other_answers(data: st.DataObject, name: str) -> None:
    """What a graph keeps of one packed sequence, with another one's tensors in it. Sequences of other sizes are another kind."""
    one, other = (pad_documents(build_pack(data.draw(st.composite(draw_documents)()), seed)) for seed in range(2))
    sizes = [{key: value.shape for key, value in list_tensors(each)} | {"rows": each.num_predicted} for each in (one, other)]
    same = _find_kind(one, Requested(aux=True)) == _find_kind(other, Requested(aux=True))
    event(f"same kind: {same}")
    assert same == (sizes[0] == sizes[1])
    if not same:
        return
    model = build_unsharded(answer_config(exclude_duplicates=True)) if name == "future" else build_objective(name)
    inside, divisors = GraphedMicroStep(model)._find_inputs(one), Divisors(50, 40, 0.5)
    for key, value in list_tensors(other):
        getattr(inside, key).copy_(value)
    (_, loss), (_, expected) = (MicroStep(model).run(each, Requested(aux=True), None, divisors) for each in (inside, other))
    assert torch.equal(loss, expected)


def list_tensors(batch: PackedBatch) -> list[tuple[str, torch.Tensor]]:
    values = [(field.name, getattr(batch, field.name)) for field in fields(batch)]
    return [(name, value) for name, value in values if isinstance(value, torch.Tensor)]


def test_padding_leaves_few_kinds() -> None:
    """Of answers too, whose suffixes have bounds of their own."""
    batches = [build_pack([(4, 1 + seed % 3), (3 + seed % 5, 2)], seed) for seed in range(60)]
    padded = list(map(pad_documents, batches))
    for name in ("cu_seqlens", "suffix_cu_seqlens"):
        sizes = [{len(getattr(each, name)) for each in of if getattr(each, name) is not None} for of in (batches, padded)]
        assert len(sizes[0]) > 5 > len(sizes[1]) and all(size % 16 == 0 for size in sizes[1])
    for one, other in zip(batches, padded, strict=True):
        if one.suffix_cu_seqlens is not None:
            count = len(one.suffix_cu_seqlens)
            assert torch.equal(other.suffix_cu_seqlens[-count:], one.suffix_cu_seqlens)
            assert not other.suffix_cu_seqlens[:-count].any()
    assert len({_find_kind(each, Requested(aux=True)) for each in padded}) < 10


def expect_the_same_without_numbers(model: TrainingModel, batch: PackedBatch | None = None) -> None:
    assert get_own(model).fits_graph
    batch = random_batch(random_cu_seqlens(TOTAL, 5, 0)) if batch is None else batch
    graphed, divisors = GraphedMicroStep(model), Divisors(50, 40, 0.5)
    expected, loss = MicroStep(model).run(batch, Requested(aux=True), None, divisors)
    found, again = MicroStep(model).run(graphed._find_inputs(pad_documents(batch)), Requested(aux=True), None, divisors)
    assert torch.equal(loss, again) and expected.aux.num_items > 0
    assert torch.equal(found.aux.loss_sum, expected.aux.loss_sum) and torch.equal(found.aux.num_items, expected.aux.num_items)


def test_others_do_not_fit() -> None:
    """One that reads cu_seqlens beside the numbers of the documents, one of a user's own, and one that changes by steps."""
    for model in (build_objective("stp"), build_objective("skip_token"), build_objective("mtp", curriculum="forward")):
        assert not get_own(model).fits_graph


@pytest.mark.parametrize("changes", [{"negatives": "global"}, {"target": "shuffled"}, {"target_shift_max": 3}], ids=str)
def test_what_depends_on_numbers_does_not_fit(changes: dict[str, object]) -> None:
    assert not build_unsharded(future_config(**changes)).objective.fits_graph


def test_a_class_derived_from_one_that_fits_says_so_again() -> None:
    objective = get_own(build_objective("nextlat"))

    class Changed(type(objective)):  # type: ignore[misc]
        def begin_step(self, step: int, total_steps: int) -> None:
            self.factor = step

    class Same(Changed):
        fits_graph = True

    assert _fits_graph(objective)
    objective.__class__ = Changed
    assert objective.fits_graph and not _fits_graph(objective)
    objective.__class__ = Same
    assert _fits_graph(objective)


def test_a_forward_without_a_backward_before_it_changes_nothing() -> None:
    """As in validation: FSDP then shows the gathered weights, which a graph would take for those that are trained."""
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=60)
    model = build_model(future_config(), tiny_llama(), torch.device("cpu"), mesh)
    batch, graphed = random_batch(random_cu_seqlens(TOTAL, 5, 0)), GraphedMicroStep(model)
    for _ in range(2):
        with torch.no_grad():
            model(compute_losses, batch, Requested(aux=True))
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        graphed.run(batch, Requested(aux=True), None, Divisors(50, 40, 0.5))
        assert all(isinstance(parameter, DTensor) and parameter.grad is not None for parameter in model.parameters())
    (trained,) = graphed._trained.values()
    assert len(trained) == len(list(model.parameters()))


def test_a_first_launch_adds_to_the_gradients_of_the_step() -> None:
    """Micro-steps before it in the step have left some. It also notes whose weights it trains."""
    model = build_unsharded(future_config())
    batches = [random_batch(random_cu_seqlens(TOTAL, 5, seed), seed=seed) for seed in range(2)]
    divisors = Divisors(100, 90, 0.5)
    for batch in batches:
        MicroStep(model).run(batch, Requested(aux=True), None, divisors)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    graphed = GraphedMicroStep(model)
    MicroStep(model).run(batches[0], Requested(aux=True), None, divisors)
    graphed.run(batches[1], Requested(aux=True), None, divisors)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    model.zero_grad()
    graphed.run(batches[0], Requested(aux=False), None, divisors)
    ((_, trained),) = [(kind, each) for kind, each in graphed._trained.items() if not kind.requested.aux]
    assert {id(each) for each in trained} == {id(each) for each in model.lm.parameters()}
    assert all(parameter.grad is None for parameter in model.objective.parameters())


@pytest.mark.parametrize(("free", "has_room"), [(200, True), (199, False)])
def test_a_graph_needs_room_beside_what_is_launched(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, free: int, has_room: bool
) -> None:
    graphed = GraphedMicroStep(build_unsharded(future_config()))
    graphed._working_bytes = 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1000))
    assert graphed._may_capture() == graphed._may_capture() == has_room
    assert len([line for line in caplog.messages if line.startswith("no CUDA graphs: 0.0 GiB are free")]) == (not has_room)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (torch.OutOfMemoryError("x"), "memory has run out while a micro-step became a CUDA graph"),
        (RuntimeError("no such thing\nin a capture"), "step cannot become a CUDA graph (no such thing): set it to false"),
    ],
)
def test_a_capture_that_fails_ends_the_run_and_names_the_option(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str
) -> None:
    for name in ("CUDAGraph", "graph", "synchronize", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    graphed = GraphedMicroStep(build_unsharded(future_config()))
    monkeypatch.setattr(graphed, "_record", MagicMock(side_effect=fault))
    batch, kind = random_batch(random_cu_seqlens(TOTAL, 5, 0)), _Kind((), Requested(aux=True))
    graphed._trained[kind] = []
    torch.cuda.graph.return_value.__exit__.return_value = False  # type: ignore[attr-defined]
    with pytest.raises(UserError) as caught:
        graphed._capture(kind, batch)
    expect_one_line(caught.value, "training.cuda_graphs = true", told, "set it to false")


def test_only_waits_of_the_own_thread_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may save a checkpoint. Other warnings are shown as ever."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x)", stacklevel=1)

    with pytest.warns(UserWarning, match="of something else") as shown, _watch_for_waits() as waits:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert not waits
        wait()
        wait()
        warnings.warn("of something else", stacklevel=1)
    assert len(waits) == 2 and all(line.startswith("test_micro_step.py, line ") for line in waits) and len(shown) == 1


def test_why_there_are_no_graphs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flame")
    config = future_config()
    model = build_unsharded(config)
    for compiled, asked in ((False, True), (True, False), (True, True)):
        config.training.compile, config.training.cuda_graphs = compiled, asked
        assert type(choose_micro_step(config, model, torch.device("cpu"))) is MicroStep
    assert caplog.messages == ["no CUDA graphs (training.cuda_graphs): there is no GPU"]


def test_only_models_like_those_that_were_tried_get_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose_attention", lambda *_: "varlen")
    for name in ("qwen3", "llama"):
        config = future_config()
        model = build_unsharded(config, build_toy(name))
        told = " ".join(list_obstacles(config, model, torch.device("cuda")))
        assert told == (
            "" if name in TRIED else 'they were not tried with models like this one (model_type "qwen3"), but with llama'
        )
    config.experimental.custom_model_path = "own.py"
    assert "like this one" in " ".join(list_obstacles(config, model, torch.device("cuda")))


PROFILES = "profiling.trace_steps or profiling.memory_history"


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("training", "dropout", 0.1, "training.dropout is used"),
        ("training", "cpu_offload", True, "training.cpu_offload is used"),
        ("training", "float8", "rowwise", "training.float8 is used"),
        ("training", "float8_head", True, "training.float8_head is used"),
        ("training", "loss_on", "answer", 'they were not tried with training.loss_on = "answer"'),
        ("profiling", "trace_steps", "5", "kernels in one have no names for profiling.trace_steps or profiling.memory_history"),
        (
            "profiling",
            "memory_history",
            True,
            "kernels in one have no names for profiling.trace_steps or profiling.memory_history",
        ),
        ("activation_checkpoint", "mode", "full", 'activation_checkpoint.mode = "full"'),
        ("experimental", "freeze_lm_for_infonce", True, "experimental.freeze_lm_for_infonce = true"),
    ],
)
def test_each_obstacle_is_named(monkeypatch: pytest.MonkeyPatch, section: str, name: str, value: object, told: str) -> None:
    monkeypatch.setattr(module, "choose_attention", lambda *_: "varlen")
    config = future_config()
    model = build_unsharded(config)
    assert list(list_obstacles(config, model, torch.device("cuda"))) == []
    setattr(getattr(config, section), name, value)
    assert list(list_obstacles(config, model, torch.device("cuda"))) == [told]


COMPILED = {
    "training__compile": True,
    "training__deterministic": True,
    "training__steps": 14,
    "training__gradient_accumulation_steps": 4,  # graphs are captured in the middle of a step
    "checkpoint__interval": 7,
    "validation__holdout_every": 4,
    "validation__interval": 3,  # a forward without a backward
    "future_predictor__dropout": 0.0,
}


HELD_OUT = {"evaluation__interval": 4, "held_out__code__dataset": "stdlib", "held_out__code__num_documents": 2}
RUNS: dict[str, dict[str, object]] = {
    "next token": {"objective__name": "next_token", "training__gradient_accumulation_steps": 2},
    "learned temperature": {"future_encoder__max_anchors": 24, "future_encoder__learnable_temperature": True},
    "later": {
        "objective__start_step": 5,
        "training__gradient_accumulation_steps": 3,
        "future_encoder__target": "random",
    },
    "averaged weights": {"future_encoder__target": "ema", "future_encoder__ema_decay": 0.5, **HELD_OUT},
    "every third step": {"future_encoder__every": 3, "future_encoder__layers": 1, "metrics__diagnostics_interval": 4},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_options_of_compared_runs_are_valid(workspace: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    """So that a mistake in them does not wait for a GPU."""
    assert read_options(options(workspace, tmp_path, **COMPILED | changes), 1).training.compile


@pytest.mark.gpu
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_graphs_change_no_bit(workspace: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    tiny_llama(vocab_size=264, **WIDE).save_pretrained(tmp_path / "model")
    runs = {}
    for name, is_on in (("plain", False), ("graphs", True)):
        settings = COMPILED | {"model__config": tmp_path / "model", "training__cuda_graphs": is_on} | changes
        says = "from now on micro-steps are CUDA graphs" if is_on else ""
        rows = run_ranks(1, workspace, tmp_path / name, says=says, **settings)
        graphed = [row["cuda_graph_fraction"] for row in rows if "cuda_graph_fraction" in row]
        assert (max(graphed) == 1.0 and min(graphed) == 0.0) if is_on else not graphed
        runs[name] = [
            {key: value for key, value in row.items() if key in COMPARED or "validation" in key or "code" in key} for row in rows
        ]
    assert runs["graphs"] == runs["plain"]
    one, other = final_weights(tmp_path / "graphs"), final_weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in other)


FUTURE_LOSSES: dict[str, dict[str, Any]] = {
    "max_anchors": {"max_anchors": 100},
    "all weights of the teacher": {"target": "ema"},
    "duplicates": {"exclude_duplicates": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("name", [*GRAPHED, *FUTURE_LOSSES])
def test_a_graph_repeats_for_other_packed_sequences(name: str, answers_only: bool) -> None:
    """Against the same micro-steps without a graph, with other documents, tokens and divisors each time."""
    changes = FUTURE_LOSSES.get(name, {})
    config = choose("future" if changes else name, **changes)
    model = build_modules(config, tiny_llama(**WIDE), "cuda")
    materialize(model, torch.device("cuda"), seed=0)
    model.to(torch.bfloat16)
    for part in (*find_decoder_layers(model.lm), *get_own(model).list_compiled()):
        part.compile(dynamic=False)
    plain, graphed = MicroStep(model), GraphedMicroStep(model)
    for seed in range(8):  # few and many documents in turns
        cu_seqlens = random_cu_seqlens(256, 4 + 16 * (seed % 2) + seed // 2, seed)
        batch = (draw_answers(seed) if answers_only else random_batch(cu_seqlens, seed=seed)).to("cuda")
        divisors, found = Divisors(200 + seed, 100 + seed, 0.1 * seed), []
        for step in (plain, graphed):
            model.zero_grad()
            losses, loss = step.run(batch, Requested(aux=True), None, divisors)
            gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
            found.append((loss, losses, gradients))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)
    assert len(graphed._graphs) == 2


def draw_answers(seed: int) -> PackedBatch:
    """Of even numbers few documents, of odd ones many."""
    lengths = [(17, 3), (30, 2), (12, 2)] if seed % 2 == 0 else [(3, 3), (2, 2), (4, 1)]
    return build_pack(random.Random(seed).sample(lengths, len(lengths)), seed)
