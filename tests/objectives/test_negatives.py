"""Which candidates are negatives: those of other packs, without neighbours, without equals of the positive's future."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.packing import PackedSequence
from flame.models.mi_estimator import Candidates, build_mi_estimator
from flame.objectives.future.duplicates import BASES, PRIME, hash_futures
from flame.objectives.step import Requested, compute_losses
from tests.support.losses import chunks_of
from tests.support.models import build_unsharded, future_config, get_own
from tests.support.ranks import run_on_ranks

WIDTH = 4


def draw_candidates(anchors: int, others: int, seed: int, has_excluded: bool, has_keys: bool):
    """x [N, d], raw y [K, d], valid anchors [N], and Candidates of unit summaries in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = anchors + others
    x, y = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (anchors, total))
    is_valid = torch.rand(total, generator=generator) < 0.8
    own = torch.randperm(total, generator=generator)[:anchors]
    valid = is_valid[own] & (torch.rand(anchors, generator=generator) < 0.8)
    horizon = torch.randint(-2, 3, (2, anchors), generator=generator)
    first = (own - horizon[0]).clamp(0, total)
    excluded = (first, torch.maximum(own + horizon[1], first - 1).clamp(max=total - 1)) if has_excluded else None
    keys = torch.randint(-(2**62), 2**62, (3,), generator=generator)[torch.randint(0, 3, (total,), generator=generator)]
    unit = torch.nn.functional.normalize(y, dim=-1)
    return x, valid, Candidates(unit, is_valid, own, excluded, keys if has_keys else None)


def list_negatives(candidates: Candidates, i: int) -> list[int]:
    own = int(candidates.own[i])
    left_out = {own}
    if candidates.excluded is not None:
        left_out |= set(range(int(candidates.excluded[0][i]), int(candidates.excluded[1][i]) + 1))
    if candidates.keys is not None:
        left_out |= {j for j, key in enumerate(candidates.keys.tolist()) if key == candidates.keys[own]}
    return [j for j in range(len(candidates.is_valid)) if candidates.is_valid[j] and j not in left_out]


def infonce_by_loop(x, valid, candidates: Candidates, weight):
    """Loss sum with the score cos(x W, ...) replaced by unit(x)^T W y, and the measures as floats."""
    loss, mi, correct, positive, negative = x.sum() * 0.0, 0.0, 0, 0.0, 0.0
    for i in valid.nonzero().flatten().tolist():
        own, unit = int(candidates.own[i]), x[i] / x[i].norm()
        mine = unit @ weight @ candidates.summaries[own]
        scores = [unit @ weight @ candidates.summaries[j] for j in list_negatives(candidates, i)]
        term = torch.logsumexp(torch.stack([mine, *scores]), 0) - mine
        loss = loss + term
        mi += math.log(1 + len(scores)) - term.item()
        correct += bool(scores) and all(mine > score for score in scores)
        others = [j for j in range(len(candidates.is_valid)) if candidates.is_valid[j] and j != own]
        positive += (unit @ candidates.summaries[own]).item()
        negative += sum((unit @ candidates.summaries[j]).item() for j in others) / max(len(others), 1)
    measures = {"mi_lower_bound": mi, "infonce_accuracy": correct, "positive_cosine": positive, "negative_cosine": negative}
    return loss, measures


@pytest.mark.parametrize("name", ["infonce", "bilinear"])
@pytest.mark.parametrize("rows_per_chunk", [3, 4096])
@given(
    anchors=st.integers(1, 8),
    others=st.integers(0, 8),
    seed=st.integers(0, 10**6),
    has_excluded=st.booleans(),
    has_keys=st.booleans(),
)
def test_global_negatives_are_their_definition(name, rows_per_chunk, anchors, others, seed, has_excluded, has_keys):
    x, valid, candidates = draw_candidates(anchors, others, seed, has_excluded, has_keys)
    estimator = build_mi_estimator(name, WIDTH, temperature=0.2, learnable_temperature=name == "infonce").double()
    estimator.init_weights()
    generator = torch.Generator().manual_seed(seed)
    log_t = torch.full((), math.log(0.2), dtype=torch.float64, requires_grad=True)
    weight = torch.eye(WIDTH, dtype=torch.float64)
    if name == "bilinear":
        with torch.no_grad():
            estimator.weight.add_(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        weight = estimator.weight.detach().clone().requires_grad_()
    found_x, exact_x = (x.clone().requires_grad_() for _ in range(2))
    with chunks_of(rows_per_chunk):
        found = estimator.compare_with(found_x, valid, candidates)
    exact, measures = infonce_by_loop(exact_x, valid, candidates, weight / log_t.exp() if name == "infonce" else weight)
    (3.0 * found.loss_sum).backward()
    (3.0 * exact).backward()

    torch.testing.assert_close(found.loss_sum, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_x.grad, exact_x.grad, rtol=1e-9, atol=1e-9)
    learned, definition = (estimator.weight, weight) if name == "bilinear" else (estimator.log_temperature, log_t)
    by_loop = torch.zeros_like(definition) if definition.grad is None else definition.grad
    torch.testing.assert_close(learned.grad.reshape(by_loop.shape), by_loop, rtol=1e-8, atol=1e-9)
    assert found.num_items == valid.sum() and found.failed == 0
    sums = {key: total.item() for key, (total, _) in found.measures.items()}
    assert set(sums) == (set(measures) if name == "infonce" else {"mi_lower_bound", "infonce_accuracy"})
    assert sums == pytest.approx({key: measures[key] for key in sums}, abs=1e-8)
    assert all(count == valid.sum() for _, count in found.measures.values())


@pytest.mark.parametrize("name", ["infonce", "bilinear", "cosine", "smooth_l1"])
def test_anchors_in_two_parts_have_the_loss_of_all(name):
    """Ranks and micro-batches, each with its own anchors and the candidates of all, add up to one large batch."""
    x, valid, candidates = draw_candidates(12, 0, 3, has_excluded=False, has_keys=True)
    estimator = build_mi_estimator(name, WIDTH).double()
    whole = estimator.compare_with(x, valid, candidates)
    parts = [
        estimator.compare_with(x[part], valid[part], candidates._replace(own=candidates.own[part]))
        for part in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(parts[0].loss_sum + parts[1].loss_sum, whole.loss_sum)
    for key, (total, count) in whole.measures.items():
        torch.testing.assert_close(parts[0].measures[key][0] + parts[1].measures[key][0], total)
        assert parts[0].measures[key][1] + parts[1].measures[key][1] == count


def test_an_anchor_without_its_own_candidate_is_not_passed_over():
    x, y = torch.randn(4, WIDTH), torch.nn.functional.normalize(torch.randn(6, WIDTH), dim=-1)
    is_valid = torch.tensor([False, True, True, True, True, True])
    candidates = Candidates(y, is_valid, own=torch.tensor([2, 0, 1, 3]))
    outcome = build_mi_estimator("infonce", WIDTH).compare_with(x, torch.ones(4, dtype=torch.bool), candidates)
    assert outcome.failed == 1


def test_the_local_call_is_the_special_case():
    x, valid, candidates = draw_candidates(9, 0, 5, has_excluded=True, has_keys=True)
    y, own = candidates.summaries, torch.arange(9)
    estimator = build_mi_estimator("infonce", WIDTH)
    excluded = ((own - 1).clamp(min=0), (own + 1).clamp(max=8))
    found = estimator.compare(x, 3.0 * y, valid, excluded, candidates.keys)
    expected = estimator.compare_with(x, valid, Candidates(y, valid, own, excluded, candidates.keys))
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found.loss_sum, estimator.compare(x, y, valid).loss_sum)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    vocab=st.integers(1, 3),
    horizon=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
def test_hashes_are_equal_where_futures_are(lengths, vocab, horizon, seed):
    total = sum(lengths)
    tokens = torch.randint(0, vocab, (total,), generator=torch.Generator().manual_seed(seed))
    segments = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    ends = torch.tensor(lengths).cumsum(0).repeat_interleave(torch.tensor(lengths)).tolist()
    hashes = hash_futures(tokens, segments, horizon).tolist()
    futures = [tuple(tokens[t : min(ends[t], t + horizon) if horizon else ends[t]].tolist()) for t in range(total)]
    for a, b in itertools.combinations(range(total), 2):
        assert (hashes[a] == hashes[b]) == (futures[a] == futures[b])
    assert (
        hash_futures(tokens[total - lengths[-1] :], segments[total - lengths[-1] :], horizon).tolist() == hashes[-lengths[-1] :]
    )


def test_hashes_of_like_futures_do_not_collide():
    """Every word of 13 bits, each a document: all futures differ by few and regular changes."""
    words = (torch.arange(2**13)[:, None] >> torch.arange(13)) & 1
    tokens, segments = words.flatten(), torch.arange(2**13).repeat_interleave(13)
    hashes = hash_futures(tokens, segments)
    assert hashes.unique().numel() == 2**14 - 2  # the words of 1 to 13 bits
    bits = (hashes.view(-1, 13)[:, 0][:, None] >> torch.arange(62)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.03  # every bit is used


def test_hashes_of_a_long_pack_are_exact():
    """In sums of 2^48 and more nothing is rounded and nothing wraps around."""
    total = 150_000
    tokens = torch.randint(0, 2**31 - 2, (total,), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(total) >= 10_000).int()
    hashes = hash_futures(tokens, segments)
    for position in (0, 9_999, 10_000, 149_990, 149_999):
        future = tokens[position : 10_000 if position < 10_000 else total].tolist()
        fingerprints = [0, 0]
        for token in reversed(future):
            fingerprints = [(value * base + token + 1) % PRIME for value, base in zip(fingerprints, BASES, strict=True)]
        assert hashes[position] == fingerprints[0] * 2**31 + fingerprints[1]


@pytest.mark.parametrize("base", BASES)
def test_no_two_powers_of_a_base_are_equal(base):
    """So that runs of one token are told apart by their lengths, up to 2^31 - 2 tokens."""
    factors = (2, 3, 7, 11, 31, 151, 331)
    rest = PRIME - 1
    for factor in factors:
        while rest % factor == 0:
            rest //= factor
        assert pow(base, (PRIME - 1) // factor, PRIME) != 1
    assert rest == 1


PACK_LEN, DOCUMENT_LEN = 300, 10
ANSWER_LENS = (1, 8)  # in each of two packs: 64 places for anchors would do for the one, the other needs 256


def pack_answers(answer_len: int) -> PackedBatch:
    ids = np.random.default_rng(answer_len).integers(0, 61, PACK_LEN)
    cu_seqlens = np.arange(0, PACK_LEN + 1, DOCUMENT_LEN, dtype=np.int32)
    counts = np.asarray([[end - answer_len, end] for end in cu_seqlens[1:].tolist()])
    return build_batch(PackedSequence(ids, cu_seqlens, "a", 0, Cursor(0, 0, 0, 0), [], 0, counts), answer_len)


def contrast_packs(_folder: Path) -> list[float]:
    """The loss of each of this rank's packs, of which all ranks together have two."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build_unsharded(future_config(negatives="global")).double()
    batches = [pack_answers(answer_len) for answer_len in ANSWER_LENS][rank::ranks]
    prepared = get_own(model).prepare_step(model, batches)
    losses = [model(compute_losses, batch, Requested(aux=True), own) for batch, own in zip(batches, prepared, strict=True)]
    return [each.aux.loss_sum.item() for each in losses]


def test_ranks_with_different_numbers_of_answers_share_their_candidates(one_process, tmp_path):
    """1 rank x 2 micro-steps = 2 ranks x 1."""
    whole = contrast_packs(tmp_path)
    first, second = run_on_ranks(2, tmp_path, contrast_packs)
    assert [*first, *second] == pytest.approx(whole, rel=1e-9)
