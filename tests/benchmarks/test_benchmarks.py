"""What the benchmarks of training steps measure with and compare with: layouts, turns, and the plain implementations."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from benchmarks import kernels, prototypes
from benchmarks.fp8 import compare_summaries
from benchmarks.implementations import MODEL
from benchmarks.memory import read_peaks
from benchmarks.packs import draw_batch, draw_cu_seqlens, pack_documents
from benchmarks.prototypes import ChunkedCrossEntropy, ChunkedInfoNCE, Dense, Planned
from benchmarks.timing import CannotRun, Report, Sample, Timing, measure_in_turns
from flame.models.causal_lm import load_model_config
from flame.objectives.step import Requested, compute_losses
from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options
from research.summary_content import explain_variance
from tests.support.models import build_unsharded, future_config, random_batch, tiny_llama
from tests.support.runs import options


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@given(total=st.integers(1, 5000), mean=st.integers(1, 300), longest=st.integers(1, 400), seed=st.integers(0, 9))
def test_documents_fill_the_pack(total, mean, longest, seed):
    cu = draw_cu_seqlens(total, mean, longest, seed)
    lengths = cu.diff()
    assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == total
    assert (lengths >= 1).all() and (lengths <= longest).all()
    assert torch.equal(cu, draw_cu_seqlens(total, mean, longest, seed))


def test_document_lengths_are_exponential():
    lengths = draw_cu_seqlens(2_000_000, mean=1000, longest=4000).diff().float()
    assert lengths.mean() == pytest.approx(1000 * (1 - torch.e**-4), rel=0.06)
    assert (lengths < 693).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (lengths == 4000).float().mean() == pytest.approx(torch.e**-4, abs=0.01)
    assert not torch.equal(draw_cu_seqlens(100_000, seed=0)[:5], draw_cu_seqlens(100_000, seed=1)[:5])


def test_batch_has_the_layout():
    batch = draw_batch(20_000, vocab_size=50, seed=3)
    assert torch.equal(batch.cu_seqlens, draw_cu_seqlens(20_000, seed=3))
    assert batch.input_ids.shape == (1, 20_000) and set(batch.input_ids[0].tolist()) == set(range(50))
    assert batch.num_labels == 20_000 - (len(batch.cu_seqlens) - 1)


def test_chunked_cross_entropy_is_its_definition(monkeypatch):
    monkeypatch.setattr(prototypes, "ROWS_PER_CHUNK", 8)
    hidden = torch.randn(21, 5, requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=True)
    labels = torch.randint(0, 7, (21,))
    labels[::4] = -100
    expected = F.cross_entropy(hidden @ weight.t(), labels)
    found = ChunkedCrossEntropy.apply(hidden, weight, labels)
    torch.testing.assert_close(found, expected)
    for grad, grad_expected in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(grad, grad_expected)


def test_chunked_infonce_is_its_definition(monkeypatch, uncompiled):
    monkeypatch.setattr(prototypes, "ROWS_PER_CHUNK", 8)
    predictions, summaries = (F.normalize(torch.randn(21, 5), dim=-1) for _ in range(2))
    predictions.requires_grad_()
    expected = F.cross_entropy(predictions @ summaries.t() / 0.1, torch.arange(21))
    found = ChunkedInfoNCE.apply(predictions, summaries)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, predictions)[0] for loss in (found, expected)))


def in_float32(prototype: Planned | Dense, reference):
    """The prototype with the weights of flame's modules."""
    prototype.lm.float().load_state_dict(reference.lm.state_dict())
    prototype.predictor.float()
    pairs = zip(prototype.predictor.parameters(), reference.objective.predictor.parameters(), strict=True)
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    return prototype


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_planned_has_our_losses(uncompiled):
    cu = torch.tensor([0, 1, 60, 100, 133], dtype=torch.int32)
    batch, config, model_config = random_batch(cu), future_config(), tiny_llama(initializer_range=0.3)
    ours = build_unsharded(config, model_config)
    expected = ours(compute_losses, batch, Requested(aux=True))
    assert expected.aux.num_items == 129
    planned = in_float32(Planned(model_config, batch), ours)
    planned.anchors = (batch.labels[0] >= 0).nonzero()[:, 0]  # all, where a step would take 128
    ce, aux = planned.losses()
    torch.testing.assert_close(ce, expected.ce_sum / batch.num_labels)
    torch.testing.assert_close(aux, expected.aux.loss_sum / 129)


def test_planned_takes_whole_blocks_of_anchors(uncompiled):
    batch = random_batch(torch.tensor([0, 1, 60, 100, 133], dtype=torch.int32))
    anchors = Planned(tiny_llama(), batch).anchors
    assert len(anchors) == 128 and not {0, 59, 99, 132} & set(anchors.tolist())


def test_dense_has_our_cross_entropy_and_steps():
    batch = random_batch(torch.tensor([0, 1, 60, 100, 140], dtype=torch.int32))
    config, model_config = future_config(), tiny_llama(initializer_range=0.3)
    ours = build_unsharded(config, model_config)
    expected = ours(compute_losses, batch, Requested(aux=False)).ce_sum / batch.num_labels
    dense = in_float32(Dense(model_config, batch), ours)
    dense.future = dense.future.float()
    ce, aux = dense.losses()
    torch.testing.assert_close(ce, expected)
    (ce + aux).backward()
    assert all(parameter.grad is not None for part in (dense.lm, dense.predictor) for parameter in part.parameters())
    dense.step()
    assert all(parameter.grad is None for part in (dense.lm, dense.predictor) for parameter in part.parameters())


def test_turns_alternate_and_outlive_those_that_fail():
    calls = []

    def take(name: str, fails_at: int = 0, error: Exception = CannotRun()):  # noqa: B008
        def sampler() -> Sample:
            calls.append(name)
            turn = calls.count(name)
            if turn == fails_at:
                raise error
            return Sample(float(turn), turn * 2**30, 2**29)

        return sampler

    samplers = {"a": take("a"), "b": take("b", 2, torch.OutOfMemoryError()), "c": take("c"), "d": take("d", 1)}
    found = measure_in_turns(samplers, repeats=3, warmup=1)
    assert "".join(calls) == "abcd" + "abc" + "ac" * 2
    assert found["b"] is None and found["d"] is None
    assert found["a"] == (3.0, 2.0, 4.0, 4.0, 3.5)  # of turns 2, 3, 4
    assert gc.isenabled()


def test_report_is_printed_and_kept(tmp_path, capsys):
    report = Report(tmp_path / "new" / "report.md")
    report.write("first")
    report.table("Title", ["name", "ms"], [["x", "1"], ["y", "2"]])
    expected = "first\n\nTitle\n\n| name | ms |\n|---|---|\n| x | 1 |\n| y | 2 |\n"
    assert capsys.readouterr().out == expected == report.path.read_text()


def test_model_of_the_comparison():
    config = load_model_config(str(MODEL))
    assert config.rope_parameters["rope_theta"] == json.loads(MODEL.read_text())["rope_theta"] == 500_000
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    a_layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    assert sum(parameter.numel() for parameter in lm.parameters()) == 16 * a_layer + 2048 + 128_256 * 2048


def test_floors_are_the_products_of_the_losses(monkeypatch):
    monkeypatch.setattr(kernels, "count_chunk_rows", lambda rows, columns, dtype: 8)
    x, y, w = torch.randn(21, 5), torch.randn(21, 5), torch.randn(7, 5)
    compare = kernels.ContrastProducts(x, y, 0.1)
    compare()
    unit_x, unit_y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    torch.testing.assert_close(compare.scores[:5], unit_x[16:] @ unit_y.t())
    torch.testing.assert_close(compare.grad_x[8:16], compare.probs @ unit_y)
    entropy = kernels.CrossEntropyProducts(x, w)
    entropy()
    grad_logits = torch.cat([entropy.grad_logits] * 3)[:21]
    torch.testing.assert_close(entropy.logits[:5], x[16:] @ w.t())
    torch.testing.assert_close(entropy.grad_hidden, grad_logits @ w)
    torch.testing.assert_close(entropy.grad_weight, grad_logits.t() @ x)


def test_probabilities_of_a_floor_sum_to_one():
    sums = kernels.fill_with_probabilities(torch.empty(4, 100_000), 0.9).sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones(4), rtol=0.02, atol=0)


def test_row_of_a_kernel():
    timing, floor = Timing(20.0, 19.0, 21.04, 0, 0), Timing(8.0, 7.5, 9.0, 0, 0)
    cells = kernels.Row("x", timing, 4e13, floor).as_cells()
    assert cells == ["x", "20.0 [19.0, 21.0]", "8.000 [7.500, 9.000]", "2.500", "2,000"]
    assert kernels.Row("x", None, 4e13, floor).as_cells() == ["x", "out of memory", "-", "-", "-"]


def test_failure_of_a_kernel_becomes_a_note():
    bench = kernels.Bench(draw_batch(10, vocab_size=5), repeats=1)
    with bench.guard("part"):
        raise ValueError("first line\nsecond line")
    assert bench.notes == ["part: ValueError: first line"]


def test_comparing_summaries_takes_its_batch_out_of_the_data(workspace, tmp_path):
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, tmp_path / "run", checkpoint__enable_checkpoint=False), 1))
    trainer._resume()
    trainer._open_run()
    mean, low = compare_summaries(trainer)
    trainer.train_step()
    trainer._close_run()
    end_processes()
    assert (mean, low) == (pytest.approx(1), pytest.approx(1))


def test_peaks_are_those_of_all_steps_and_without_the_first(tmp_path):
    rows = [{"step": step, "peak_memory_gib": peak} for step, peak in enumerate((9.0, 7.0, 8.0), start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_peaks(tmp_path) == (9.0, 8.0)


def test_given_documents_are_packed_in_order():
    batch = pack_documents([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 9])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 9]] and batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]


def test_explained_variance_is_one_less_the_variance_within_groups():
    generator = torch.Generator().manual_seed(0)
    summaries = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 4, (50,), generator=generator)
    summaries[:, 0] += 3 * tokens
    center = sum(summaries) / 50
    whole = sum(((row - center) ** 2).sum() for row in summaries)
    within = 0.0
    for token in range(4):
        group = [row for row, own in zip(summaries, tokens, strict=True) if own == token]
        mean = sum(group) / len(group)
        within += sum(((row - mean) ** 2).sum() for row in group)
    assert explain_variance(summaries, 10 * tokens) == pytest.approx(float(1 - within / whole))
    assert explain_variance(torch.eye(4, dtype=torch.float64)[tokens], tokens) == pytest.approx(1)
