"""The CUDA paths against their CPU and float64 references: FlexAttention, compiled losses, FSDP on two devices."""

from __future__ import annotations

import copy
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import AutoConfig, PretrainedConfig

from flame.attention.families import FAMILIES, find_score_cap, list_layer_limits
from flame.attention.fla_families import register_fla_family
from flame.attention.varlen import DocumentLayout, attend
from flame.errors import UserError
from flame.kernels.cross_entropy import linear_cross_entropy
from flame.kernels.softmax_rows import softmax_rows_
from flame.models.causal_lm import find_decoder_layers
from flame.models.head_check import check_head
from flame.models.leak_check import check_no_leak
from flame.models.mi_estimator import InfoNCEEstimator
from flame.objectives.future.answer_suffixes import cut_suffixes
from flame.objectives.future.options import FutureOptions
from flame.objectives.future.summaries import summarize
from flame.objectives.step import Requested, compute_losses
from flame.trainer.setup import build_modules, materialize
from tests.support.answers import build_pack, list_suffix_positions
from tests.support.families import TOYS, build_other, build_toy
from tests.support.models import WIDE, build_unsharded, future_config, pack, random_batch, random_cu_seqlens, tiny_llama
from tests.support.runs import final_weights, measured, read_metrics, run_ranks

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

IN_FLOAT32 = {"training__mixed_precision_param": "float32", "training__seq_len": 128}
"""A run's, with packs that are long enough for FlexAttention."""


def build_on_gpu(compiled: bool, dtype: torch.dtype, model_config: PretrainedConfig | None = None, **changes):
    """bfloat16 takes the flash kernels, float32 FlexAttention."""
    config = future_config(**changes)
    config.training.compile = compiled
    config.training.mixed_precision_param = "bfloat16" if dtype == torch.bfloat16 else "float32"
    model = build_modules(config, model_config or tiny_llama(**WIDE), "cuda")
    materialize(model, CUDA, seed=0)
    model.to(dtype)
    if compiled:
        for layer in find_decoder_layers(model.lm):
            layer.compile(dynamic=False)
    return model


@torch.no_grad()
def encode(model, batch, direction: str, window_k: int = 0) -> torch.Tensor:
    batch = batch.to(next(model.parameters()).device)
    if direction == "causal":
        return model.encode_past(batch)
    model.objective.options.future_k = window_k
    return model.objective.summarize(model, batch)  # in fp8 where that is asked for


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("window_k", [0, 5, 130])
@pytest.mark.parametrize("path", ["flash", "flash in fp8", "flex"])
def test_no_leak(compiled, window_k, path):
    cu = torch.tensor([0, 100, 101, 256, 390, 391, 640], dtype=torch.int32)
    dtype = torch.float32 if path == "flex" else torch.bfloat16
    model = build_on_gpu(compiled, dtype, precision="fp8" if path == "flash in fp8" else "bf16")
    batch = random_batch(cu)
    base = encode(model, batch, "future", window_k)
    for j in (0, 50, 99, 100, 101, 180, 255, 256, 300, 389, 390, 391, 500, 639):
        tokens = batch.input_ids[0].clone()
        tokens[j] = (tokens[j] + 1) % 61
        changed = (encode(model, pack(tokens, cu), "future", window_k) != base).any(-1).nonzero().flatten().tolist()
        start = int(cu[cu <= j].max())
        assert j in changed
        assert min(changed) >= max(start, j - 2 * window_k if window_k else start) and max(changed) <= j
    last = encode(model, batch, "future", window_k)[cu[1:].long() - 1]
    assert last.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("direction", ["causal", "future"])
def test_flex_attention_equals_sdpa(compiled, direction):
    cu = random_cu_seqlens(600, 9, seed=1)
    on_cpu = build_unsharded(future_config(), tiny_llama(**WIDE))
    on_gpu = build_on_gpu(compiled, torch.float32)
    on_gpu.load_state_dict(on_cpu.state_dict())
    batch = random_batch(cu)
    expected = encode(on_cpu, batch, direction)
    torch.testing.assert_close(encode(on_gpu, batch, direction).cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, (192, 128)], ids=str)
@pytest.mark.parametrize("window_k", [0, 100])
def test_flash_equals_its_definition_for_families(head_dim, window_k, with_sinks):
    """Both passes and the gradient, in bfloat16, against all T^2 scores in float64. Some have narrower values, or sinks."""
    cu = random_cu_seqlens(700, 9, seed=2)
    generator = torch.Generator().manual_seed(0)
    width, value_width = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    shapes = [(1, 4, 700, width), (1, 2, 700, width), (1, 2, 700, value_width), *([(4,)] if with_sinks else [])]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    for is_strict in (False, True):
        layout = DocumentLayout(cu, 700, is_strict, window_k)
        exact = [s.bfloat16().double().requires_grad_() for s in states]
        found = [s.to(CUDA, torch.bfloat16).requires_grad_() for s in states]
        expected = attend(None, *exact[:3], None, documents=layout, s_aux=exact[3] if with_sinks else None)[0]
        on_gpu = layout._replace(cu_seqlens=cu.to(CUDA))
        out = attend(None, *found[:3], None, documents=on_gpu, s_aux=found[3] if with_sinks else None)[0]
        check_close(out, expected)
        if not is_strict:
            direction = torch.randn(out.shape, generator=generator)
            for ours, theirs in zip(
                torch.autograd.grad(out, found, direction.to(out)),
                torch.autograd.grad(expected, exact, direction.double()),
                strict=True,
            ):
                check_close(ours, theirs)


WRONG = pytest.mark.xfail(
    reason="torch's kernel for short queries: such runs are refused (`SHORTEST_FLEX`)",
    raises=(AssertionError, torch._inductor.exc.InductorError),
    strict=True,
)
SHORT_PACKS = [(True, (64,)), (True, (127,)), (True, (200, 64)), (False, (64, 127))]


@pytest.mark.parametrize(
    ("compiled", "totals"),
    [*(pytest.param(*case, marks=WRONG) for case in SHORT_PACKS), *product((False, True), ((200,), (200, 128)))],
    ids=str,
)
def test_flex_attention_on_short_packs(compiled, totals):
    """One after the other in one process. Once all pass, `SHORTEST_FLEX` can go."""
    torch._dynamo.reset()  # what was compiled for other cases
    on_cpu, on_gpu = build_unsharded(future_config(), tiny_llama(**WIDE)), build_on_gpu(compiled, torch.float32)
    on_gpu.load_state_dict(on_cpu.state_dict())
    for total in totals:
        batch = random_batch(random_cu_seqlens(total, 5, seed=1))
        expected = encode(on_cpu, batch, "future")
        torch.testing.assert_close(encode(on_gpu, batch, "future").cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["flash", "flex"])
def test_summaries_of_answers_alone(compiled, dtype):
    """Those of the whole pack, and nothing waits for the device on the way there."""
    model = build_on_gpu(compiled, dtype)
    batch = build_pack([(17, 3), (30, 2), (4, 0), (9, 5)])
    places = list_suffix_positions(batch)
    whole = encode(model, batch, "future")[places]
    batch = batch.to(CUDA)
    assert batch.answers_only
    found = summarize(model, batch, FutureOptions())[places]
    assert cut_suffixes(batch) is not None
    check_close(found, whole.double().cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        cut_suffixes(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To bfloat16 rounding, in the Euclidean norm."""
    assert (found.double().cpu() - expected).norm() / expected.norm() < 1e-2


def test_flash_passes_equal_flex_passes():
    """The whole model in bfloat16, compiled, against FlexAttention in float32."""
    flash, flex = build_on_gpu(True, torch.bfloat16), build_on_gpu(False, torch.float32)
    batch = random_batch(random_cu_seqlens(600, 9, seed=1))
    for direction in ("causal", "future"):
        found, expected = encode(flash, batch, direction), encode(flex, batch, direction)
        assert (found.float() - expected).norm() / expected.norm() < 2e-2


def widen(name: str) -> PretrainedConfig:
    """A toy with heads that the kernels take."""
    shape = WIDE | {"num_key_value_heads": 4 if name == "gpt_neox" else 2, "moe_intermediate_size": 64}
    toy = build_toy(name, **shape)
    if find_score_cap(toy) is not None:
        toy.initializer_range = 0.05  # scores and logits of these widths reach the caps, and rounding stays small
    return toy


@pytest.mark.parametrize("name", TOYS)
def test_families(name):
    """Both passes: the flash kernels in bfloat16 and FlexAttention in float32, against the CPU; and no leak. Capped scores take
    FlexAttention in both."""
    cu = torch.tensor([0, 1, 100, 101, 256, 390, 512], dtype=torch.int32)
    compiled = name in ("gemma2", "gemma3", "qwen3_moe", "gpt2", "gpt_oss", "deepseek_v2", "deepseek_v3")
    batch, has_experts = random_batch(cu), FAMILIES[TOYS[name][0]].has_experts
    on_cpu = build_unsharded(future_config(), widen(name))
    limits = list_layer_limits(on_cpu.lm.config)
    rounding = 3e-2 if find_score_cap(on_cpu.lm.config) is None else 5e-2
    for dtype, tolerance in ((torch.bfloat16, rounding), (torch.float32, 1e-2)):
        model = build_on_gpu(compiled, dtype, widen(name))
        is_flash = model.describe_attention() not in ("FlexAttention", "PyTorch's SDPA")
        assert is_flash == (dtype == torch.bfloat16 and find_score_cap(model.lm.config) is None)
        model.load_state_dict(on_cpu.state_dict())
        for direction in ("causal", "future"):
            found, expected = encode(model, batch, direction).float().cpu(), encode(on_cpu, batch, direction)
            # A router's choice between experts turns on rounding: most tokens, not all, take the same ones.
            errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert errors.quantile(0.75 if has_experts else 1.0) < tolerance, direction
        base = encode(model, batch, "future")
        for j in (0, 1, 50, 99, 100, 101, 180, 255, 256, 400, 511):
            tokens = batch.input_ids[0].clone()
            tokens[j] = (tokens[j] + 1) % 61
            difference = (encode(model, pack(tokens, cu), "future") - base).norm(dim=-1)
            # The tokens of an expert are rounded together: how many they are may change how.
            changed = (difference > (1e-5 * base.norm(dim=-1) if has_experts else 0)).nonzero().flatten().tolist()
            horizon = sum(limits) if all(limits) else 512
            assert j in changed and min(changed) >= max(int(cu[cu <= j].max()), j - horizon) and max(changed) <= j


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma", "granite", "cohere2", "phi"])
def test_families_that_change_logits_or_scores(name):
    """Loss and gradient on the GPU against those on the CPU: the row kernel's cap, scale and bias, and FlexAttention's cap."""
    batch = random_batch(torch.tensor([0, 1, 100, 101, 256, 390, 512], dtype=torch.int32))
    models = build_unsharded(future_config(), widen(name)), build_on_gpu(name == "gemma2", torch.float32, widen(name))
    with torch.no_grad():
        for parameter in models[0].lm.parameters():
            if not parameter.any():  # biases
                parameter.normal_(std=0.1)
    models[1].load_state_dict(models[0].state_dict())
    losses, gradients = [], []
    for model in models:
        check_head(model, next(model.parameters()).device)
        found = model(compute_losses, batch.to(next(model.parameters()).device), Requested(aux=False)).ce_sum
        found.backward()
        losses.append(found.item())
        gradients.append({key: p.grad.double().cpu() for key, p in model.lm.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for key, expected in gradients[0].items():
        assert (gradients[1][key] - expected).norm() < 2e-2 * expected.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["glm4", "gptj", "hyperclovax", "minicpm3", "nemotron"])
def test_families_that_are_not_in_the_table(name):
    """The checks of the start, and both passes by FlexAttention, against the CPU."""
    latent = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16} if name == "minicpm3" else {}
    toy = build_other(name, **WIDE | {"num_key_value_heads": 4} | latent)
    try:
        on_cpu = build_unsharded(future_config(), toy)
    except UserError as error:
        pytest.skip(str(error))
    batch = random_batch(torch.tensor([0, 1, 100, 101, 256, 390, 512], dtype=torch.int32))
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float32, 1e-2)):
        model = build_on_gpu(False, dtype, copy.deepcopy(toy))
        model.load_state_dict(on_cpu.state_dict())
        assert model.describe_attention() == "FlexAttention"
        check_head(model, CUDA)
        check_no_leak(model, CUDA, with_future=True)
        for direction in ("causal", "future"):
            found, expected = encode(model, batch, direction).float().cpu(), encode(on_cpu, batch, direction)
            errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert errors.max() < tolerance, direction


def test_new_layouts_compile_nothing_new():
    model = build_on_gpu(True, torch.bfloat16)
    for seed in range(3):
        encode_both(model, seed)
    before = dict(counters["stats"])
    for seed in range(3, 30):
        encode_both(model, seed)
    assert dict(counters["stats"])["unique_graphs"] == before["unique_graphs"]


def encode_both(model, seed: int) -> None:
    batch = random_batch(random_cu_seqlens(640, 1 + seed % 12, seed=seed), seed=seed).to(CUDA)
    model.encode_past(batch).sum().backward()
    encode(model, batch, "future")


def test_fp8_summaries_are_close():
    batch = random_batch(random_cu_seqlens(600, 9, seed=1))
    exact = encode(build_on_gpu(False, torch.bfloat16), batch, "future")
    for compiled in (False, True):
        model = build_on_gpu(compiled, torch.bfloat16, precision="fp8")
        rounded = encode(model, batch, "future")
        assert F.cosine_similarity(rounded.float(), exact.float(), dim=-1).mean() > 0.98
        assert not torch.equal(rounded, exact)
        torch.testing.assert_close(
            encode(model, batch, "causal"), encode(build_on_gpu(False, torch.bfloat16), batch, "causal"), rtol=5e-2, atol=5e-2
        )


def test_row_kernel_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    for dtype, columns in ((torch.bfloat16, 5000), (torch.float32, 4097)):
        scores = torch.randn(300, columns, generator=generator).to(dtype)
        own = torch.randint(0, columns - 100, (300,), generator=generator)
        excluded = (own - 3).clamp(min=0), own + 5
        column_keys = torch.randint(0, 40, (columns,), generator=generator, dtype=torch.int32)
        keys = column_keys, column_keys[own]
        own[::7] = -1
        scale, count = torch.tensor(10.0), torch.tensor(columns - 50)
        capped = (None, None, None, 3.0)
        for options in ((None, None), capped, (count, None), (count, excluded), (count, None, keys), (count, excluded, keys)):
            exact, found = scores.double(), scores.to(CUDA)
            expected = softmax_rows_(exact, own, scale.double(), *options)
            on_gpu = [
                tuple(e.to(CUDA) for e in o) if isinstance(o, tuple) else o.to(CUDA) if isinstance(o, torch.Tensor) else o
                for o in options
            ]
            sums = softmax_rows_(found, own.to(CUDA), scale.to(CUDA), *on_gpu)
            assert (found.double().cpu() - exact).norm() / exact.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5)
            for ours, theirs in zip(sums, expected, strict=True):
                torch.testing.assert_close(ours.double().cpu(), theirs.double(), rtol=1e-4, atol=1e-4)


def test_infonce_equals_float64():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5000, 64, generator=generator), torch.randn(5000, 64, generator=generator)
    valid = torch.rand(5000, generator=generator) < 0.9
    found = x.to(CUDA, torch.bfloat16).requires_grad_()
    outcome = InfoNCEEstimator(64, 0.1).compare(found, y.to(CUDA, torch.bfloat16), valid.to(CUDA))
    (outcome.loss_sum / outcome.num_items).backward()

    exact = x.bfloat16().double().requires_grad_()
    a, b = F.normalize(exact[valid], dim=-1), F.normalize(y.bfloat16().double()[valid], dim=-1)
    loss = F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))
    loss.backward()
    assert (outcome.loss_sum / outcome.num_items).item() == pytest.approx(loss.item(), rel=1e-3)
    error = (found.grad.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-2
    assert outcome.measures["mi_lower_bound"][0].item() / len(a) == pytest.approx(math.log(len(a)) - loss.item(), abs=1e-2)


def test_cross_entropy_equals_float64():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5000, 64, generator=generator), torch.randn(1000, 64, generator=generator) * 0.1
    labels = torch.randint(0, 1000, (5000,), generator=generator)
    labels[::7] = -100
    h, w = (t.to(CUDA, torch.bfloat16).requires_grad_() for t in (hidden, weight))
    found = linear_cross_entropy(h, w, labels.to(CUDA))
    found.backward()
    he, we = (t.bfloat16().double().requires_grad_() for t in (hidden, weight))
    exact = F.cross_entropy(he @ we.T, labels, reduction="sum")
    exact.backward()
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    for ours, theirs in ((h.grad, he.grad), (w.grad, we.grad)):
        assert (ours.double().cpu() - theirs).norm() / theirs.norm() < 2e-2


def test_no_leak_through_reversed_documents():
    """A linear-attention family of flash-linear-attention."""

    register_fla_family("gla")
    config = AutoConfig.for_model("gla", hidden_size=128, num_hidden_layers=2, num_heads=2, vocab_size=61)
    model = build_modules(future_config(), config, "cuda")
    materialize(model, CUDA, seed=0)
    model.to(torch.bfloat16)
    cu = torch.tensor([0, 70, 71, 200, 333, 512], dtype=torch.int32)
    batch = random_batch(cu)
    base = encode(model, batch, "future")
    for j in (0, 69, 70, 71, 150, 199, 200, 332, 400, 511):
        tokens = batch.input_ids[0].clone()
        tokens[j] = (tokens[j] + 1) % 61
        changed = (encode(model, pack(tokens, cu), "future") != base).any(-1).nonzero().flatten().tolist()
        assert j in changed and min(changed) >= int(cu[cu <= j].max()) and max(changed) <= j


def test_a_linear_attention_model_trains(workspace: Path, tmp_path: Path):
    (tmp_path / "gla.json").write_text(
        '{"model_type": "gla", "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 264}'
    )
    rows = run_ranks(1, workspace, tmp_path / "run", model__config=tmp_path / "gla.json", training__steps=12)
    assert rows[-1]["ce_loss"] < rows[0]["ce_loss"] and rows[-1]["aux_loss"] > 0


def check_rows(rows: list[dict], others: list[dict]) -> None:
    """To rounding, which decides whose score is higher where two are close: so two hits more or less."""
    for found, expected in zip(measured(rows), measured(others), strict=True):
        correct = [row.pop("infonce_accuracy") * row["anchors"] for row in (found, expected)]
        assert correct[0] == pytest.approx(correct[1], abs=2.01)
        assert found == pytest.approx(expected, rel=2e-2), (found, expected)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"training__compile": True},
        {"training__compile": True, "training__dropout": 0.1, "activation_checkpoint__mode": "full"},
        {"future_encoder__negatives": "global", "future_encoder__exclude_duplicates": True},
        {"future_encoder__target": "ema", "future_encoder__ema_decay": 0.5},
    ],
    ids=["eager", "compiled", "dropout", "global negatives", "averaged weights"],
)
def test_two_gpus_equal_one(workspace: Path, tmp_path: Path, options: dict[str, object]):
    tiny_llama(vocab_size=264, **WIDE).save_pretrained(tmp_path / "model")
    changes = options | IN_FLOAT32 | {"model__config": tmp_path / "model"}
    one = run_ranks(1, workspace, tmp_path / "one", training__gradient_accumulation_steps=4, **changes)
    two = run_ranks(2, workspace, tmp_path / "two", training__gradient_accumulation_steps=2, **changes)
    check_rows(two, one)
    assert read_metrics(tmp_path / "two")[-1]["mfu"] > 0
    torch.testing.assert_close(final_weights(tmp_path / "two"), final_weights(tmp_path / "one"), rtol=0, atol=2e-2)


def run_deterministic(workspace: Path, run: Path, ranks: int, **changes: object) -> list[dict]:
    tiny_llama(vocab_size=264, **WIDE).save_pretrained(run.parent / "model")
    options = {"model__config": run.parent / "model", "training__deterministic": True, "checkpoint__interval": 2}
    return run_ranks(ranks, workspace, run, **options | changes)


def check_equal(found: Path, expected: Path) -> None:
    assert measured(read_metrics(found)) == measured(read_metrics(expected))
    one, other = final_weights(found), final_weights(expected)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_deterministic_runs_repeat_to_the_bit(workspace: Path, tmp_path: Path):
    for name in ("one", "again"):
        run_deterministic(workspace, tmp_path / name, ranks=1)
    check_equal(tmp_path / "one", tmp_path / "again")


@pytest.mark.multi_gpu
def test_asynchronous_checkpoints_resume_to_the_bit(workspace: Path, tmp_path: Path):
    """Two GPUs: saved from page-locked copies while training goes on, cut back to step 2, resumed."""
    changes = {"training__gradient_accumulation_steps": 2}
    run_deterministic(workspace, tmp_path / "plain", ranks=2, **changes)
    changes |= {"checkpoint__async_mode": "async", "checkpoint__keep_latest_k": 0}
    run_deterministic(workspace, tmp_path / "run", ranks=2, **changes)
    check_equal(tmp_path / "run", tmp_path / "plain")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoint" / f"step-{step}")
    run_deterministic(workspace, tmp_path / "run", ranks=2, **changes)
    check_equal(tmp_path / "run", tmp_path / "plain")


@pytest.mark.multi_gpu
def test_hsdp_and_one_gpu_go_on_from_two(workspace: Path, tmp_path: Path):
    """FSDP on two -> replicated on two (HSDP) -> one process: the same data, and losses to rounding."""
    run = tmp_path / "run"
    plain = run_deterministic(workspace, tmp_path / "plain", ranks=2, training__gradient_accumulation_steps=2, **IN_FLOAT32)
    run_deterministic(workspace, run, ranks=2, training__gradient_accumulation_steps=2, **IN_FLOAT32)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoint" / f"step-{step}")
    replicated = {"training__data_parallel_replicate_degree": 2, "training__gradient_accumulation_steps": 2}
    run_deterministic(workspace, run, ranks=2, **replicated, **IN_FLOAT32)
    shutil.rmtree(run / "checkpoint" / "step-6")
    rows = run_deterministic(workspace, run, ranks=1, training__gradient_accumulation_steps=4, **IN_FLOAT32)
    check_rows(rows, plain)
    assert [row["anchors"] for row in rows] == [row["anchors"] for row in plain]


def test_a_future_loss_that_is_not_finite_leaves_no_trace_in_the_backbone():
    model = build_on_gpu(False, torch.float32)
    batch = random_batch(torch.tensor([0, 100, 250], dtype=torch.int32)).to(CUDA)
    with torch.no_grad():
        model.objective.predictor.out.weight[0, 0] = math.nan
    losses = model(compute_losses, batch, Requested(aux=True))
    assert losses.aux.failed == 1 and losses.aux.loss_sum == 0
    losses.aux.loss_sum.backward()
    for name, parameter in model.lm.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
