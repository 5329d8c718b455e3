"""Semantic tube prediction against its definition as a plain loop in float64, and the triples that it draws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.objectives.stp.objective import draw_triples
from flame.runtime.seeds import derive_seed
from tests.support.answers import build_pack, split_documents
from tests.support.models import get_own, random_batch, random_cu_seqlens
from tests.support.objectives import build_objective, expect_definition


def compute_by_loop(model: TrainingModel, batch: PackedBatch) -> Tensor:
    """One document at a time, with the triples that are drawn for the pack."""
    seed = derive_seed(get_own(model).setup.seed, batch.sequence_index)
    triples = draw_triples(batch.cu_seqlens.diff(), seed).T.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for document, (s, r, t) in zip(split_documents(batch), triples, strict=True):
        if document.input_ids.shape[1] < 3 or (document.labels == NO_LABEL).all():
            continue
        states = model.lm.base_model(document.input_ids, use_cache=False).last_hidden_state[0]
        one, other = states[t] - states[r], states[r] - states[s]
        total = total + 1 - one @ other / one.norm() / other.norm()
    return total


@pytest.mark.parametrize("kept", ["all", "answers"])
def test_it_is_its_definition(kept):
    model = build_objective("stp").double()
    batch = random_batch(random_cu_seqlens(30, 8, seed=1)) if kept == "all" else build_pack([(11, 3), (50, 3), (4, 0)])
    assert {1, 2} & set(batch.cu_seqlens.diff().tolist()) or kept == "answers"
    expect_definition(
        model,
        lambda: model(compute_losses, batch, Requested(aux=True, ce=False)).aux.loss_sum,
        lambda: compute_by_loop(model, batch),
    )


def test_every_triple_is_as_likely_as_any_other():
    """8 000 draws over the ten triples of five positions: far from a mean of 800 only by chance (six standard deviations)."""
    triples = draw_triples(torch.full((8000,), 5), seed=1).T.tolist()
    counts = Counter(map(tuple, triples))
    assert set(counts) == set(combinations(range(5), 3))
    assert all(abs(count - 800) < 6 * (8000 * 0.1 * 0.9) ** 0.5 for count in counts.values())


def test_triples_are_of_the_sequence_and_lie_in_their_documents():
    lengths = torch.tensor([3, 4, 1000, 100_000])
    triples = draw_triples(lengths, seed=7)
    assert torch.equal(triples, draw_triples(lengths, seed=7)) and not torch.equal(triples, draw_triples(lengths, seed=8))
    assert (triples[0] >= 0).all() and (triples[2] < lengths).all()
    assert all((a < b).all() for a, b in pairwise(triples))


def test_another_sequence_draws_other_triples():
    model, batch = build_objective("stp"), random_batch(torch.tensor([0, 40, 80], dtype=torch.int32))
    losses = [
        model(compute_losses, replace(batch, sequence_index=index), Requested(aux=True)).aux.loss_sum.item()
        for index in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_states_that_do_not_move_have_a_gradient_that_is_finite():
    model, batch = build_objective("stp"), random_batch(torch.tensor([0, 9], dtype=torch.int32))
    states = torch.ones(9, 32, requires_grad=True)
    aux = get_own(model).loss(model, states, batch, None)
    aux.loss_sum.backward()
    assert aux.loss_sum == 1 and states.grad.isfinite().all()
