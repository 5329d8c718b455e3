"""One document a row gives what one mask of T x T gives, in both passes of every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, PreTrainedModel

from flame.attention import backends as future_encoder
from flame.attention.backends import AttentionBackend, MaskedBackend, RecurrentBackend, build_backend
from flame.attention.document_rows import DocumentRows
from flame.attention.families import FAMILIES, find_limits
from flame.attention.fla_families import TAKES_ROWS
from flame.attention.kernel_masks import build_row_mask
from flame.config.run import ObjectiveChoice
from flame.config.schema import JobConfig, Training
from flame.data.batch import PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.trainer.setup import build_modules
from tests.support.families import TOYS, WINDOW, build_toy
from tests.support.models import build_unsharded, future_config, random_batch, tiny_llama

lengths_of_documents = st.lists(st.integers(1, 14), min_size=1, max_size=6)
windows = st.sampled_from([0, 1, 3, 20])
every_family = pytest.mark.parametrize("name", TOYS)


def assert_equal(found: object, expected: object, dtype: torch.dtype) -> None:
    rtol, atol = (1e-8, 1e-10) if dtype == torch.float64 else (1e-3, 1e-4)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def to_cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def batch_of(lengths: list[int]) -> PackedBatch:
    return random_batch(to_cu(lengths), seed=sum(lengths))


@contextmanager
def rows(wanted: bool) -> Iterator[None]:
    """Rows whatever they cost, or none."""
    with patch.object(future_encoder, "is_cheaper_in_rows", return_value=wanted):
        yield


IN_FLOAT32 = ("cohere", "cohere2", "gemma2", "gemma3_text", "vaultgemma")
"""Families with norms that compute in float32."""


@lru_cache
def build_wide(name: str) -> TrainingModel:
    """In float64, but for those with kernels or norms that know float32 alone; with weights that make attention choose."""
    config = build_toy(name)
    model = build_unsharded(future_config(), config)
    model = model if config.model_type in IN_FLOAT32 or "num_experts_per_tok" in config.to_dict() else model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model.eval()


def find_shapes(passes: AttentionBackend, batch: PackedBatch) -> list[tuple[int, ...]]:
    """What a network is given to read, in both passes."""
    shapes = []

    def read(input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, use_cache: bool):
        assert input_ids.shape == position_ids.shape
        shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=input_ids[:, :, None])

    model = cast(PreTrainedModel, SimpleNamespace(base_model=read))
    for states in (passes.encode_past(model, batch), passes.encode_future(model, batch, 0)):
        assert torch.equal(states[:, 0], batch.input_ids[0])
    return shapes


@given(lengths_of_documents, windows, st.sampled_from(["causal", "future"]))
def test_the_mask_follows_its_definition_wherever_it_is_read(lengths, window, direction):
    longest = max(lengths)
    mask = build_row_mask(torch.tensor(lengths), longest, direction, window)
    assert mask.dtype == torch.bool
    mask = mask.expand(len(lengths), 1, longest, longest)
    for row, length in enumerate(lengths):
        for q in range(length):
            for kv in range(longest):
                ahead = q - kv if direction == "causal" else kv - q - 1
                horizon = window if direction == "causal" else window - 1
                assert mask[row, 0, q, kv] == (kv < length and ahead >= 0 and (not window or ahead <= horizon))
        if direction == "causal":  # a row of the gradient with no key would be NaN
            assert mask[row, 0].any(-1).all()
        else:
            assert not mask[row, 0, length - 1 :].any()


@given(lengths_of_documents)
def test_rows_are_documents_and_come_back(lengths):
    values = torch.arange(1, sum(lengths) * 2 + 1, dtype=torch.float32).view(-1, 2)
    layout = DocumentRows(to_cu(lengths), sum(lengths))
    laid_out = layout.lay_out(values)
    assert laid_out.shape == (len(lengths), max(lengths), 2)
    for row, (start, end) in enumerate(pairwise(to_cu(lengths).tolist())):
        assert torch.equal(laid_out[row, : end - start], values[start:end])
        assert not laid_out[row, end - start :].any()
    assert torch.equal(layout.collect(laid_out), values)


COMMON = tiny_llama(intermediate_size=32 * 8 // 3, num_key_value_heads=4)


@cache
def build_common() -> TrainingModel:
    return build_unsharded(future_config(), COMMON)


def count_flops(batch: PackedBatch, in_rows: bool) -> int:
    """Of the causal forward, all matrix products, attention's among them."""
    with torch.no_grad(), rows(in_rows), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_common().encode_past(batch)
    return counter.get_total_flops()


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
@example([19] * 30)
@example([60] + [20] * 39)
@example([4] * 8 + [40])
@example([1] * 30 + [60])
@example([9] * 200 + [60])  # less arithmetic, at six places a token
def test_rows_are_taken_where_they_are_less_arithmetic(lengths):
    batch, places, total = batch_of(lengths), len(lengths) * max(lengths), sum(lengths)
    in_rows, as_one = count_flops(batch, in_rows=True), count_flops(batch, in_rows=False)
    assume(places == total or abs(in_rows / as_one - 1) > 0.05)
    expected = (len(lengths), max(lengths)) if in_rows <= as_one and places <= 4 * total else (1, total)
    assert find_shapes(build_backend("sdpa", COMMON, 64), batch) == [expected] * 2


def test_compiled_layers_get_rows_of_one_shape_only():
    passes = build_modules(JobConfig(training=Training(compile=True)), COMMON, "cpu")._backend
    assert find_shapes(passes, batch_of([12] * 10)) == [(10, 12)] * 2
    assert find_shapes(passes, batch_of([12] * 9 + [11])) == [(1, 119)] * 2


def test_rows_are_for_known_families_on_cpus():
    batch = batch_of([7] * 4)
    for family in FAMILIES:
        toy = next(build_toy(name) for name, (known, _) in TOYS.items() if known == family)
        passes = build_backend("sdpa", toy, 64)
        assert isinstance(passes, MaskedBackend) and find_shapes(passes, batch) == [(4, 7)] * 2
        on_gpu = SimpleNamespace(input_ids=batch.input_ids, cu_seqlens=SimpleNamespace(is_cuda=True))
        assert passes._choose_rows(cast(PackedBatch, on_gpu)) is None  # and asks for no length
    unknown = build_backend("sdpa", OPTConfig(), 64)
    assert find_shapes(unknown, batch) == [(1, 28)] * 2
    assert MaskedBackend("flex", 0, row_width=8)._choose_rows(batch) is None


@every_family
@settings(max_examples=8)
@given(lengths=lengths_of_documents, window=windows)
@example(lengths=[1, 1, 1], window=0)
@example(lengths=[12, 1, 14, 13], window=3)
def test_both_passes_equal_those_under_one_mask(name, lengths, window):
    model, batch = build_wide(name), batch_of(lengths)
    found = {}
    for wanted in (True, False):
        with rows(wanted), torch.no_grad():
            found[wanted] = model.encode_past(batch), model.encode_future(batch, window)
    assert_equal(found[True], found[False], found[True][0].dtype)


def differentiate(model: TrainingModel, batch: PackedBatch, by_embeddings: bool) -> tuple[list[Tensor], Tensor | None]:
    """Of a random weighting of the hidden states: the gradients of all weights, and of the embeddings where those were given."""
    model.zero_grad()
    embeddings = None
    if by_embeddings:
        embeddings = model.lm.get_input_embeddings()(batch.input_ids)[0].detach().requires_grad_()
        states = model.encode_embeddings(model.lm, embeddings, batch)
    else:
        states = model.encode_past(batch)
    weighting = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
    (states * weighting).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.lm.parameters() if parameter.grad is not None]
    return gradients, embeddings.grad if embeddings is not None else None


@every_family
@pytest.mark.parametrize("by_embeddings", [False, True])
def test_gradients_equal_those_under_one_mask(name, by_embeddings):
    model = build_wide(name)
    for lengths in ([12, 1, 14, 13], [1, 2], [WINDOW + 5] * 3):
        found = []
        for wanted in (True, False):
            with rows(wanted):
                found.append(differentiate(model, batch_of(lengths), by_embeddings))
        assert all(gradient.isfinite().all() for gradient in found[0][0]) and any(gradient.any() for gradient in found[0][0])
        assert_equal(found[0], found[1], model.lm.dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
def test_no_leak(name):
    """One token changed moves what may see it, to the bit nothing else, and the summary of a last token is its own alone."""
    lengths = [14, 12, 13, 14]
    cu, model, batch = to_cu(lengths).tolist(), build_wide(name), batch_of(lengths)
    assert find_shapes(build_backend("sdpa", model.lm.config, 64), batch) == [(4, 14)] * 2
    horizon = 2 * (WINDOW - 1) if find_limits(model.lm.config) == WINDOW - 1 else 60
    with torch.no_grad():
        past, future = model.encode_past(batch), model.encode_future(batch, 0)
        for start, end in pairwise(cu):
            for j in (start, start + 5, end - 1):
                batch.input_ids[0, j] = (batch.input_ids[0, j] + 1) % 61
                touched = (model.encode_past(batch) != past).any(-1), (model.encode_future(batch, 0) != future).any(-1)
                batch.input_ids[0, j] = (batch.input_ids[0, j] - 1) % 61
                seen_by = [mask.nonzero().flatten().tolist() for mask in touched]
                assert seen_by[0] == list(range(j, min(end, j + horizon + 1)))
                assert seen_by[1] == list(range(max(start, j - horizon), j + 1))


@pytest.mark.parametrize("objective", ["future", "mtp"])
def test_losses_equal_those_under_one_mask(objective):
    config = JobConfig(objective=ObjectiveChoice(name=objective))
    model = build_unsharded(config, build_toy("olmo3")).double()
    batch = batch_of([13, 14, 1, 14, 12])
    found = []
    for wanted in (True, False):
        model.zero_grad()
        with rows(wanted):
            losses = model(compute_losses, batch, Requested(aux=True))
        (losses.ce_sum + losses.aux.loss_sum).backward()
        found.append([losses.ce_sum, losses.aux.loss_sum, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_equal(found[0], found[1], torch.float64)


class RunningMean(torch.nn.Module):
    """A recurrence that reads rows: state t is the mean of its row up to t."""

    def forward(self, input_ids, use_cache):
        x = torch.nn.functional.one_hot(input_ids, 61).double()
        return SimpleNamespace(last_hidden_state=x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


@given(lengths_of_documents)
def test_recurrences_that_read_rows(lengths):
    batch = batch_of(lengths)
    network = SimpleNamespace(base_model=RunningMean(), config=SimpleNamespace(model_type=sorted(TAKES_ROWS)[0]))
    model = cast(PreTrainedModel, network)
    past, future = RecurrentBackend().encode_past(model, batch), RecurrentBackend().encode_future(model, batch, 0)
    tokens = torch.nn.functional.one_hot(batch.input_ids[0], 61).double()
    for start, end in pairwise(to_cu(lengths).tolist()):
        for t in range(start, end):
            torch.testing.assert_close(past[t], tokens[start : t + 1].mean(0))
            torch.testing.assert_close(future[t], tokens[t:end].mean(0))
