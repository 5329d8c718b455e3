"""The passes by variable-length attention against the masked passes, with the kernel's definition on the CPU."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig

from flame.attention import flash as flash_kernels
from flame.attention.backends import choose_attention
from flame.attention.varlen import (
    DocumentLayout,
    _launch,
    _launch_backward,
    _varlen_attention_backward,
    attend,
    varlen_attention,
)
from flame.models.causal_lm import find_decoder_layers
from flame.models.wrapper import TrainingModel
from flame.trainer import setup
from tests.support.families import build_toy
from tests.support.models import build_unsharded, future_config, pack, random_batch, random_cu_seqlens, tiny_llama

SEQ_LEN = 60


def build_varlen(config: PretrainedConfig | None = None) -> TrainingModel:
    with patch.object(setup, "choose_attention", lambda *_: "varlen"):
        return build_unsharded(future_config(), config)


@pytest.fixture(scope="module")
def varlen() -> TrainingModel:
    return build_varlen()


@pytest.fixture(scope="module")
def masked() -> TrainingModel:
    return build_unsharded(future_config())


@given(chunks=st.integers(1, 9), seed=st.integers(0, 1000), window_k=st.sampled_from([0, 1, 2, 7, 100]))
def test_both_passes_equal_the_masked_ones(varlen, masked, chunks, seed, window_k):
    batch = random_batch(random_cu_seqlens(SEQ_LEN, chunks, seed))
    with torch.no_grad():
        torch.testing.assert_close(varlen.encode_past(batch), masked.encode_past(batch))
        torch.testing.assert_close(varlen.encode_future(batch, window_k), masked.encode_future(batch, window_k))


def test_gradients_equal_the_masked_ones(varlen, masked):
    batch = random_batch(random_cu_seqlens(SEQ_LEN, 6, seed=1))
    direction = torch.randn(SEQ_LEN, 32, generator=torch.Generator().manual_seed(0))
    found, expected = (
        torch.autograd.grad((model.encode_past(batch) * direction).sum(), list(model.lm.model.parameters()))
        for model in (varlen, masked)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 1000), window=st.sampled_from([-1, 0, 3]), heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]))
def test_the_operator_and_its_gradient(seed, window, heads):
    """Against a loop over queries, in float64."""
    generator = torch.Generator().manual_seed(seed)
    cu = random_cu_seqlens(9, 4, seed)
    query, key, value = (torch.randn(9, h, 5, generator=generator, dtype=torch.float64) for h in (heads[0], heads[1], heads[1]))
    inputs = [states.requires_grad_() for states in (query, key, value)]
    rows = []
    for q in range(9):
        start = int(cu[cu <= q].max())
        first = start if window < 0 else max(start, q - window)
        per_head = []
        for h in range(heads[0]):
            group = h * heads[1] // heads[0]
            weights = torch.softmax(key[first : q + 1, group] @ query[q, h] * 0.3, dim=0)
            per_head.append(weights @ value[first : q + 1, group])
        rows.append(torch.stack(per_head))
    expected = torch.stack(rows)
    found = varlen_attention(*inputs, cu, 9, window, 0.3)[0]
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_leak_in_the_backward_reading(varlen):
    cu = torch.tensor([0, 1, 20, 21, 45, 60], dtype=torch.int32)
    batch = random_batch(cu)
    with torch.no_grad():
        base = varlen.encode_future(batch, 0)
        for j in range(60):
            tokens = batch.input_ids[0].clone()
            tokens[j] = (tokens[j] + 1) % 61
            changed = (varlen.encode_future(pack(tokens, cu), 0) != base).any(-1).nonzero().flatten().tolist()
            assert j in changed and min(changed) >= int(cu[cu <= j].max()) and max(changed) <= j


def test_rows_without_a_key_are_exactly_zero():
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    states = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    out = attend(torch.nn.Module(), *states, None, documents=DocumentLayout(cu, 9, is_strict=True))[0][0]
    assert [row for row in range(9) if not out[row].any()] == [0, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name, graphs", [("llama", 2), ("gemma3", 4), ("olmoe", 2)])
def test_new_layouts_compile_nothing_new(name, graphs):
    """One graph for each pass serves all layers of a kind and all numbers of documents."""
    torch._dynamo.reset()
    model = build_varlen(build_toy(name, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2))
    for layer in find_decoder_layers(model.lm):
        layer.compile(dynamic=False, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    for seed in range(12):
        batch = random_batch(random_cu_seqlens(SEQ_LEN, 1 + seed, seed))
        model.encode_past(batch).sum().backward()
        with torch.no_grad():
            model.encode_future(batch, 0)
    assert counters["stats"]["unique_graphs"] - before == graphs


@pytest.mark.parametrize("name", ["dropout", "softcap", "sinks"])
def test_what_the_kernels_would_leave_out_is_refused(name):
    states = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    layout = DocumentLayout(torch.tensor([0, 9], dtype=torch.int32), 9, is_strict=False)
    attend(torch.nn.Module(), *states, None, documents=layout, **{name: None})
    with pytest.raises(NotImplementedError, match=name):
        value = torch.zeros(2) if name == "s_aux" else 0.5
        attend(torch.nn.Module(), *states, None, documents=layout, **{name: value})


def test_what_attends_where(monkeypatch):
    monkeypatch.setattr(flash_kernels, "is_supported", lambda: True)
    choose = lambda dtype, device="cuda", **shape: choose_attention(tiny_llama(**shape), device, dtype)  # noqa: E731
    assert choose(torch.bfloat16) == "varlen"
    assert choose(torch.float32, head_dim=16) == "flex" and choose(torch.float32, head_dim=8) == "sdpa"
    assert choose(torch.bfloat16, head_dim=512) == "flex"
    assert choose(torch.bfloat16, head_dim=20) == "flex"
    assert choose(torch.bfloat16, device="cpu") == "sdpa"
    with_own_code = tiny_llama(head_dim=16)
    with_own_code.auto_map = {"AutoModelForCausalLM": "modeling.Mine"}
    assert choose_attention(with_own_code, "cuda", torch.bfloat16) == "flex"
    gemma = AutoConfig.for_model("gemma2", hidden_size=32, num_attention_heads=4)
    assert choose_attention(gemma, "cuda", torch.bfloat16) == "flex"
    assert choose_attention(build_toy("gpt2"), "cuda", torch.float32) == "sdpa"
    monkeypatch.setattr(flash_kernels, "is_supported", lambda: False)
    assert choose(torch.bfloat16, head_dim=16) == "flex"


def test_results_have_the_layout_that_compiled_code_is_told(monkeypatch):
    """PyTorch's kernels answer in the layout of their inputs, where heads may come before tokens."""

    def lay_out_as(result: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(states).copy_(result)

    def run_forward(query, *arguments):
        out, lse = varlen_attention(query, *arguments)
        return lay_out_as(out, query), lse

    def run_backward(grad_out, query, key, value, *_):
        return tuple(lay_out_as(torch.zeros(states.shape), states) for states in (query, key, value))

    monkeypatch.setattr(flash_kernels, "run_forward", run_forward)
    monkeypatch.setattr(flash_kernels, "run_backward", run_backward)
    query, key, value = (torch.randn(2, 7, 8).transpose(0, 1) for _ in range(3))
    arguments = torch.tensor([0, 3, 7], dtype=torch.int32), 8, -1, 0.3
    real = _launch(query, key, value, *arguments)
    real_grads = _launch_backward(query, query, key, value, *real, *arguments)
    with FakeTensorMode() as fake:
        states = [fake.from_tensor(each) for each in (query, key, value)]
        told = varlen_attention(*states, fake.from_tensor(arguments[0]), *arguments[1:])
        told_grads = _varlen_attention_backward(states[0], *states, *told, fake.from_tensor(arguments[0]), *arguments[1:])
    for found, expected in zip((*real, *real_grads), (*told, *told_grads), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
