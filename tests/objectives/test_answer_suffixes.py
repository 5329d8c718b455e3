"""Summaries of answers from the ends of documents alone: the same as from the whole pack, for less arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flame.attention.backends import RecurrentBackend
from flame.data.suffix_layout import GRAIN, SHARES, find_share
from flame.models.causal_lm import find_decoder_layers
from flame.models.parallelize import MOST_GRAPHS, _compile
from flame.objectives.future import summaries
from flame.objectives.future.answer_suffixes import cut_suffixes
from flame.objectives.future.options import FutureOptions
from flame.objectives.future.summaries import summarize
from flame.objectives.step import Requested, compute_losses
from tests.support.answers import SEPARATOR, TOTAL, answer_config, build_pack, list_suffix_positions, pack_documents
from tests.support.families import TOYS, build_toy
from tests.support.models import RunningMean, build_unsharded, future_config

lengths_of_documents = st.lists(st.tuples(st.integers(0, 45), st.integers(0, 6)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents)
@example([(20, 3)])
@example([(45, 6)])  # cut off before its answer
@example([(0, 6)])  # hardly a prompt
def test_suffixes_are_the_documents_ends_each_for_itself(lengths):
    batch = build_pack(lengths)
    expected, suffixes = list_suffix_positions(batch), cut_suffixes(batch)
    if not expected or len(expected) > TOTAL // 2 + GRAIN:
        assert suffixes is None
        return
    if suffixes is None:
        assert find_share(len(expected), TOTAL) == TOTAL
        return
    places = suffixes.positions.tolist()
    assert places[: len(expected)] == expected and len(set(places)) == len(places)
    cut = suffixes.batch
    bucket = cut.input_ids.shape[1]
    assert bucket == find_share(len(expected), TOTAL) < TOTAL
    assert all(getattr(cut, name).shape == (1, bucket) for name in ("labels", "position_ids", "segment_ids"))
    found = list(zip(cut.input_ids[0].tolist(), cut.position_ids[0].tolist(), strict=True))[: len(expected)]
    assert found == [(int(batch.input_ids[0, t]), int(batch.position_ids[0, t])) for t in expected]
    starts = [n for n, t in enumerate(expected) if not n or batch.segment_ids[0, t] != batch.segment_ids[0, expected[n - 1]]]
    cu = cut.cu_seqlens.tolist()
    assert cu[: len(starts) + 1] == [*starts, len(expected)] and cu[-1] == bucket and cut.cu_seqlens.dtype == torch.int32
    assert cut.cu_seqlens.diff().min() > 0 and cut.cu_seqlens.diff().max() == batch.chunk_labels.max() + 1
    assert [cu.index(n) for n in cu[:-1]] == [int(cut.segment_ids[0, n]) for n in cu[:-1]]


def test_a_share_is_the_least_that_holds_the_answers():
    """2,048 graphs G(5, 5) of 69 tokens with answers of 6, 1,024 of them, and packs that are hardly more than their answers."""
    found = [find_share(*case) for case in [(12_288, 141_312), (6144, 70_656), (500, 1000), (513, 1000), (90, 100), (64, 200)]]
    assert found == [17_664, 8832, 512, 1000, 100, 128]


@given(total=st.integers(1, 100_000), part=st.floats(0, 1))
def test_shares_hold_the_count_and_are_few(total, part):
    count = int(part * total)
    share = find_share(count, total)
    assert count <= share <= total and (share == total or share % GRAIN == 0)
    if total > GRAIN * SHARES[-1]:
        assert share <= max(2 * count, total // SHARES[-1]) + GRAIN
    assert len({find_share(other, total) for other in range(0, total + 1, max(total // 99, 1))}) <= len(SHARES) + 1


@pytest.mark.parametrize("family", sorted(TOYS))
@pytest.mark.parametrize("window_k", [0, 2])
def test_summaries_of_answers_are_those_of_the_whole_pack(family, window_k):
    config = answer_config(future_k=window_k)
    model = build_unsharded(config, build_toy(family))  # in float32: experts have no other
    batch = build_pack([(17, 3), (30, 2), (4, 0), (9, 5)])
    places = list_suffix_positions(batch)
    assert cut_suffixes(batch) is not None
    with torch.no_grad():
        whole = model.encode_future(batch, window_k)
    torch.testing.assert_close(summarize(model, batch, config.get(FutureOptions))[places], whole[places], rtol=1e-4, atol=1e-5)


def test_summaries_of_a_recurrence_too():
    model = SimpleNamespace(base_model=RunningMean(), config=SimpleNamespace(model_type="gla"))
    batch = build_pack([(17, 3), (30, 2)])
    suffixes, places = cut_suffixes(batch), list_suffix_positions(batch)
    assert suffixes is not None
    whole, cut = RecurrentBackend().encode_future(model, batch, 0), RecurrentBackend().encode_future(model, suffixes.batch, 0)
    torch.testing.assert_close(suffixes.spread(cut, TOTAL)[places], whole[places])


@pytest.mark.parametrize(
    "changes",
    [
        {"target_shift": 2, "max_anchors": 30},
        {"target": "shuffled", "exclude_duplicates": True},
        {"target": "random", "target_shift": 0},
        {"target": "ema", "exclude_neighbors": 2},
        {"estimator_type": "bilinear"},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_whole_pack(changes, monkeypatch):
    config = answer_config(**changes)
    model = build_unsharded(config).double()
    batch = build_pack([(17, 3), (30, 2), (4, 0), (9, 5)])
    found, weights = [], [p for p in model.parameters() if p.requires_grad]
    for is_cut in (True, False):
        if not is_cut:
            monkeypatch.setattr(summaries, "cut_suffixes", lambda _: None)
        aux = model(compute_losses, batch, Requested(aux=True)).aux
        assert aux.num_items > 0
        found.append((aux.loss_sum, *torch.autograd.grad(aux.loss_sum, weights, allow_unused=True)))
    for cut, whole in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_each_share_has_its_compiled_layers(monkeypatch):
    """In training and in validation: torch gives up compiling at so many."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compile_module(self, backend="eager", dynamic=dynamic))
    config = answer_config(target="random")
    config.training.compile = True
    model = build_unsharded(config)
    torch._dynamo.reset()
    total = 2048
    try:
        own = find_decoder_layers(model.lm)
        _compile(model, [*own, *find_decoder_layers(model.objective.teacher)], own, model.objective.list_compiled())
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=MOST_GRAPHS):
            shares = set()
            for is_training, answer in itertools.product((True, False), (1, 6, 14, 28, 60)):
                model.train(is_training)
                documents = [[*[1] * (63 - answer), SEPARATOR, *[2] * answer]]
                (batch,) = pack_documents(documents, total, 65, 1)
                suffixes = cut_suffixes(batch)
                shares.add(total if suffixes is None else suffixes.batch.input_ids.shape[1])
                with torch.set_grad_enabled(is_training):
                    model(compute_losses, batch, Requested(aux=True))
        assert len(shares) >= 4
    finally:
        torch._dynamo.reset()


def test_only_the_suffixes_are_read():
    """And where all tokens count, or a target looks back, the whole pack is."""
    model = build_unsharded(future_config())
    batch = build_pack([(17, 3)])
    tokens: list[int] = []

    def count_tokens(_module, _arguments, options: dict) -> None:
        tokens.append(options["input_ids"].numel())

    model.lm.base_model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    for each, target in ((batch, "self"), (replace(batch, answers_only=False), "self"), (batch, "causal")):
        summarize(model, each, FutureOptions(target=target))
    suffixes = cut_suffixes(batch)
    assert suffixes is not None
    rows = (len(suffixes.batch.cu_seqlens) - 1) * 4
    assert tokens == [rows, tokens[1], tokens[1]] and len(list_suffix_positions(batch)) <= rows < tokens[1]
