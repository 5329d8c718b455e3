"""Diagnostics of the hidden states, predictions and summaries of one packed sequence: their spread, and retrieval.

- Effective rank (Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", section 2): the exponential
  of the entropy of the singular values, normalised to sum 1. The rows are neither centred nor normalised.
- Alignment and uniformity (Wang and Isola 2020, arXiv:2005.10242, section 4.1) with alpha = 2 and t = 2, of vectors on the unit
  sphere. Alignment is E |x - y|^2 over pairs of a prediction and its target. Uniformity is log E exp(-2 |x - x'|^2) over pairs of
  different predictions, or of different targets.
- Retrieval: how often a prediction is closer to its own target than to the other targets.

Spread is computed in float64. Singular values are square roots of the eigenvalues of a Gram matrix. In float32, those of a
collapsed matrix that should be 0 come out as 3e-4 of the largest, and a thousand of them add up to a false rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.data.batch import PackedBatch
from flame.runtime.measures import Mean

MOST_ANCHORS = 1024
MOST_CANDIDATES = 16_384
UNIFORMITY_T = 2.0
TIE = 1e-6
"""Cosines this close are tied. Equal targets differ by that much between the columns of a float32 product."""

Means = dict[str, Mean]


class ProbeSample(NamedTuple):
    """What the future loss compares on one rank: n of the T positions of a packed sequence.

    Row i of `targets` is the target of row i of `predictions`. Rows that are not valid may hold anything.
    """

    hidden_states: Tensor
    """[n, d]"""
    predictions: Tensor
    """[n, p], not normalised."""
    targets: Tensor
    """[n, p], not normalised."""
    positions: Tensor
    """int64 [n]: position of each prediction in the packed sequence. Its target is `target_shift` tokens later."""
    is_valid: Tensor
    """bool [n]: which rows are anchors."""


@torch.no_grad()
def measure_representations(sample: ProbeSample, batch: PackedBatch, target_shift: int, seed: int) -> Means:
    """All metrics of this module by name, on a random sample of at most `MOST_ANCHORS` anchors and `MOST_CANDIDATES` targets.

    It waits for the device once, at the end, for the eigenvalues. A number that is not finite makes its metrics NaN and counts as
    a miss in each retrieval. The global random state is not used.

    Args:
        sample: on the device of `batch`, in any floating dtype.
        target_shift: tokens from an anchor to its target.
        seed: for the random sample.

    Returns:
        sum and count of each metric, the same names for any input. The count is 0 if there is nothing to measure.
    """
    chosen = _draw(sample.is_valid, MOST_CANDIDATES, seed)
    anchors = chosen[:MOST_ANCHORS]  # the first ones, so that the target of row i is in column i of the candidates
    rows = {
        name: _keep_valid(tensor[anchors], sample.is_valid[anchors]).double()
        for name, tensor in (
            ("hidden", sample.hidden_states),
            ("predictions", sample.predictions),
            ("targets", sample.targets),
        )
    }
    return {
        **_measure_retrieval(sample, batch, target_shift, anchors, chosen),
        **_measure_spread(rows, sample.is_valid[anchors]),
        **_measure_ranks(rows, sample.is_valid[anchors]),
    }


def _draw(is_valid: Tensor, at_most: int, seed: int) -> Tensor:
    """Rows in random order, valid ones first: int64 [min(n, at_most)]. Does not wait for the device."""
    generator = torch.Generator(is_valid.device).manual_seed(seed)
    priority = torch.rand(is_valid.shape, generator=generator, device=is_valid.device) + is_valid
    return priority.topk(min(at_most, is_valid.numel())).indices


def _keep_valid(rows: Tensor, is_valid: Tensor) -> Tensor:
    return torch.where(is_valid[:, None], rows, 0.0)


# ---------------------------------------------------------------- retrieval


def _measure_retrieval(sample: ProbeSample, batch: PackedBatch, target_shift: int, anchors: Tensor, chosen: Tensor) -> Means:
    """How many predictions score their own target above the others. A tie is a miss.

    Args:
        anchors: int64 [m], rows whose predictions are measured.
        chosen: int64 [k], rows whose targets are candidates, the anchors first.
    """
    device, is_valid, positions = chosen.device, sample.is_valid[chosen], sample.positions[chosen]
    predictions = F.normalize(_keep_valid(sample.predictions[anchors], is_valid[: len(anchors)]).float(), dim=-1)
    targets = F.normalize(_keep_valid(sample.targets[chosen], is_valid).float(), dim=-1)
    scores = predictions @ targets.t()  # [m, k]
    is_ahead = scores < scores.diagonal()[:, None] - TIE
    is_ahead.logical_not_()  # negated, so that NaN counts as ahead

    document = batch.segment_ids[0][positions]
    token = batch.input_ids[0][(positions + target_shift) % batch.input_ids.shape[1]]
    columns = torch.arange(len(chosen), device=device)
    is_negative = is_valid[None, :] & (columns[None, :] != columns[: len(anchors), None])
    is_same_document = document[: len(anchors), None] == document[None, :]
    kinds = {
        "": is_negative,
        "same_document": is_negative & is_same_document,
        "other_documents": is_negative & ~is_same_document,
        "same_token": is_negative & (token[: len(anchors), None] == token[None, :]),
    }
    means: Means = {}
    for kind, negatives in kinds.items():
        suffix = f"_{kind}" if kind else ""
        has_negatives = negatives.any(dim=1) & is_valid[: len(anchors)]
        ahead = (negatives & is_ahead).sum(dim=1)
        for top in (1, 10):
            means[f"top{top}{suffix}"] = Mean(((ahead < top) & has_negatives).sum(), has_negatives.sum())
        if kind:
            means[f"has{suffix}"] = Mean(has_negatives.sum(), is_valid[: len(anchors)].sum())
    return means


# ---------------------------------------------------------------- spread


def _measure_spread(rows: dict[str, Tensor], is_valid: Tensor) -> Means:
    """Cosines, alignment and uniformity of rows, float64 [m, ...] each and zero where not valid."""
    units = {name: F.normalize(tensor, dim=-1) for name, tensor in rows.items()}
    is_pair = is_valid[:, None] & is_valid[None, :]
    is_pair.fill_diagonal_(False)
    num_pairs = is_pair.sum()
    means: Means = {}
    for name, unit in units.items():
        cosines = unit @ unit.t()
        means[f"cosine_{name}"] = Mean(torch.where(is_pair, cosines, 0.0).sum(), num_pairs)
        if name == "hidden":
            continue
        lengths = cosines.diagonal()
        distances = (lengths[:, None] + lengths[None, :] - 2.0 * cosines).clamp(min=0.0)  # squared
        potential = torch.where(is_pair, (-UNIFORMITY_T * distances).exp(), 0.0).sum() / num_pairs.clamp(min=1)
        has_pairs = (num_pairs > 0).long()
        means[f"uniformity_{name}"] = Mean(torch.where(has_pairs > 0, potential, 1.0).log(), has_pairs)
    means["alignment"] = Mean((units["predictions"] - units["targets"]).square().sum(), is_valid.sum())
    return means


def _measure_ranks(rows: dict[str, Tensor], is_valid: Tensor) -> Means:
    """Effective ranks of rows, float64 [m, ...] each and zero where not valid. Waits for the device."""
    grams = torch.stack([tensor @ tensor.t() for tensor in rows.values()])  # [3, m, m]
    is_finite = grams.isfinite().all(dim=-1).all(dim=-1)
    grams = torch.where(is_finite[:, None, None], grams, 0.0)  # `eigvalsh` raises if a number is not finite
    values = torch.linalg.eigvalsh(grams).clamp(min=0.0).sqrt()
    total = values.sum(dim=-1)
    shares = values / torch.where(total > 0, total, 1.0)[:, None]
    ranks = torch.special.entr(shares).sum(dim=-1).exp()
    is_defined = (total > 0) | ~is_finite  # a zero matrix has no effective rank
    sums = torch.where(is_finite, ranks, torch.nan)
    return {f"rank_{name}": Mean(torch.where(is_defined[i], sums[i], 0.0), is_defined[i].long()) for i, name in enumerate(rows)}
