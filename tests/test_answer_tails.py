"""Summaries of answers from the ends of documents alone: the same as from the whole pack, for less arithmetic."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models import summaries
from flame.models.answer_tails import GRAIN, SHARES, cut_tails, find_share
from flame.models.causal_lm import find_decoder_layers
from flame.models.future_encoder import ReversedPasses
from flame.models.parallelize import MOST_GRAPHS, _compile
from flame.models.summaries import summarize
from flame.objective import Parts, compute_losses
from tests.helpers import build_unsharded
from tests.test_answer_only import SEPARATOR, answer_config, pack_documents
from tests.test_gradient_flow import RunningMean
from tests.toy_families import TOYS, build_toy

TOTAL, LONGEST = 200, 40


def build_pack(prompts_and_answers: list[tuple[int, int]], seed: int = 0) -> PackedBatch:
    """One pack of documents with prompts and answers of these lengths, again and again until it is full."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, lowest: int) -> list[int]:
        return torch.randint(lowest, 61, (length,), generator=generator).tolist()

    documents = [[*draw(prompt, 1), SEPARATOR, *draw(answer, 0)] for prompt, answer in prompts_and_answers]
    (batch,) = pack_documents(documents, TOTAL, LONGEST, 1)
    return batch


def list_tails(batch: PackedBatch) -> list[int]:
    """Tokens of which a label is, or that have one."""
    labels = batch.labels[0].tolist()
    return [t for t in range(len(labels)) if labels[t] != NO_LABEL or (t and labels[t - 1] != NO_LABEL)]


lengths_of_documents = st.lists(st.tuples(st.integers(0, 45), st.integers(0, 6)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents)
@example([(20, 3)])
@example([(45, 6)])  # cut off before its answer
@example([(0, 6)])  # hardly a prompt
def test_tails_are_the_documents_ends_each_for_itself(lengths):
    batch = build_pack(lengths)
    expected, tails = list_tails(batch), cut_tails(batch)
    if not expected or len(expected) > TOTAL // 2 + GRAIN:
        assert tails is None
        return
    if tails is None:
        assert find_share(len(expected), TOTAL) == TOTAL
        return
    assert tails.places.tolist() == expected
    cut = tails.batch
    room = cut.input_ids.shape[1]
    assert room == find_share(len(expected), TOTAL) < TOTAL
    assert all(getattr(cut, name).shape == (1, room) for name in ("labels", "position_ids", "segment_ids"))
    found = list(zip(cut.input_ids[0].tolist(), cut.position_ids[0].tolist(), strict=True))[: len(expected)]
    assert found == [(int(batch.input_ids[0, t]), int(batch.position_ids[0, t])) for t in expected]
    starts = [n for n, t in enumerate(expected) if not n or batch.segment_ids[0, t] != batch.segment_ids[0, expected[n - 1]]]
    cu = cut.cu_seqlens.tolist()
    assert cu[: len(starts) + 1] == [*starts, len(expected)] and cu[-1] == room and cut.cu_seqlens.dtype == torch.int32
    assert cut.cu_seqlens.diff().min() > 0 and cut.cu_seqlens.diff().max() == batch.piece_labels.max() + 1
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
    places = list_tails(batch)
    assert cut_tails(batch) is not None
    with torch.no_grad():
        whole = model.encode_future(batch, window_k)
    torch.testing.assert_close(summarize(model, batch, config)[places], whole[places], rtol=1e-4, atol=1e-5)


def test_summaries_of_a_recurrence_too():
    model = SimpleNamespace(base_model=RunningMean(), config=SimpleNamespace(model_type="gla"))
    batch = build_pack([(17, 3), (30, 2)])
    tails, places = cut_tails(batch), list_tails(batch)
    assert tails is not None
    whole, cut = ReversedPasses().encode_future(model, batch, 0), ReversedPasses().encode_future(model, tails.batch, 0)
    torch.testing.assert_close(tails.spread(cut, TOTAL)[places], whole[places])


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
            monkeypatch.setattr(summaries, "cut_tails", lambda _: None)
        aux = model(compute_losses, batch, config, Parts(aux=True)).aux
        assert aux.num_anchors > 0
        found.append((aux.loss_sum, *torch.autograd.grad(aux.loss_sum, weights, allow_unused=True)))
    for cut, whole in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-8, atol=1e-10)


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
        _compile(model, [*own, *find_decoder_layers(model.teacher)], own)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=MOST_GRAPHS):
            shares = set()
            for is_training, answer in itertools.product((True, False), (1, 6, 14, 28, 60)):
                model.train(is_training)
                documents = [[*[1] * (63 - answer), SEPARATOR, *[2] * answer]]
                (batch,) = pack_documents(documents, total, 65, 1)
                tails = cut_tails(batch)
                shares.add(total if tails is None else tails.batch.input_ids.shape[1])
                with torch.set_grad_enabled(is_training):
                    model(compute_losses, batch, config, Parts(aux=True))
        assert len(shares) >= 4
    finally:
        torch._dynamo.reset()


def test_only_the_tails_are_read():
    """And where all tokens count, or a target looks back, the whole pack is."""
    config = answer_config()
    model = build_unsharded(config)
    batch = build_pack([(17, 3)])
    tokens: list[int] = []

    def count_tokens(_module, _arguments, options: dict) -> None:
        tokens.append(options["input_ids"].numel())

    model.lm.base_model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    everything = copy.deepcopy(config)
    everything.training.loss_on = "all"
    for each in (config, everything, answer_config(target="causal")):
        summarize(model, batch, each)
    tails = cut_tails(batch)
    assert tails is not None
    rows = (len(tails.batch.cu_seqlens) - 1) * 4
    assert tokens == [rows, tokens[1], tokens[1]] and len(list_tails(batch)) <= rows < tokens[1]
