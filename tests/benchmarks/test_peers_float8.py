"""Steps in 8 bits beside the peer's: ours are built and run, and one that fails leaves the others their table."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import destroy_process_group

from benchmarks.packs import draw_batch
from benchmarks.peers_float8 import BFLOAT16, TURNS, Turns, build_step, get_bare_step, measure, show
from benchmarks.timing import Report, Timing
from benchmarks.training_step import OUT_OF_MEMORY, TrainingStep
from flame.config.schema import Training
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import set_single_process_defaults, start_processes
from tests.support.models import tiny_llama

ROWWISE = TURNS["rowwise"]
_, FLOAT8, FLOAT8_HEAD = ROWWISE.ours
(PEER,) = ROWWISE.peers


def test_step_is_forward_and_backward_of_the_next_token(toy, mesh):
    batch, step = draw_batch(96, 61, mean=30), build_step(toy, 96, ROWWISE.ours[BFLOAT16], mesh, compiled=False)
    step.take(batch)
    run = get_bare_step(step)
    run()
    first = step.loss
    run()
    assert torch.equal(step.loss, first)  # no optimizer
    torch.testing.assert_close(first, step.model(compute_losses, batch, Requested(aux=False)).ce_sum.detach() / batch.num_labels)


def test_what_the_device_cannot_run_leaves_the_others(toy, mesh):
    timings, faults = measure(ROWWISE, 64, None, mesh, model=toy, compiled=False)
    assert list(timings) == [BFLOAT16] and timings[BFLOAT16].median_ms > 0
    assert list(faults) == [FLOAT8, FLOAT8_HEAD]
    assert all(fault.startswith('UserError: training.float8 = "rowwise') and " needs a GPU" in fault for fault in faults.values())


def test_a_step_that_fails_later_leaves_the_others(toy, mesh, monkeypatch):
    own, calls = TrainingStep.step, []

    def step(self, with_aux=True, with_optimizer=True):
        calls.append(self)
        if self is calls[0] and calls.count(self) == 3:
            raise torch.OutOfMemoryError
        own(self, with_aux, with_optimizer)

    monkeypatch.setattr(TrainingStep, "step", step)
    turns = Turns(dict.fromkeys(ROWWISE.ours, ROWWISE.ours[BFLOAT16]), {})
    timings, faults = measure(turns, 64, None, mesh, model=toy, compiled=False)
    assert faults == {BFLOAT16: OUT_OF_MEMORY} and list(timings) == [FLOAT8, FLOAT8_HEAD]
    assert len(set(map(id, calls))) == len(turns.ours)


def test_table_is_written_without_what_failed(tmp_path):
    timings = {
        PEER: Timing(20.0, 19.0, 21.0, 0, 0),
        FLOAT8: Timing(8.0, 7.5, 9.0, 0, 0),
        BFLOAT16: Timing(16.0, 15.0, 17.0, 0, 0),
    }
    show(Report(tmp_path / "table.md"), "rowwise", 1000, ROWWISE, timings, {FLOAT8_HEAD: "RuntimeError: x"})
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(("| ours", "| torchtitan"))] == [
        f"| {BFLOAT16} | 16.0 [15.0, 17.0] | 62,500 | 1.000 | 1.250 |",
        f"| {FLOAT8} | 8.0 [7.5, 9.0] | 125,000 | 2.000 | 2.500 |",
        f"| {FLOAT8_HEAD} | RuntimeError: x | - | - | - |",
        f"| {PEER} | 20.0 [19.0, 21.0] | 50,000 | 0.800 | 1.000 |",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_all_of_ours_on_a_gpu(tmp_path, turns):
    pytest.importorskip("torchao")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_llama(**shape, vocab_size=512, head_dim=64).to_json_file(tmp_path / "toy.json")
    set_single_process_defaults()
    _, mesh = start_processes(Training(), 60)
    try:
        timings, faults = measure(turns, 1024, None, mesh, model=tmp_path / "toy.json")
        assert list(timings) == list(turns.ours) and not faults
    finally:
        destroy_process_group()
