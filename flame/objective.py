"""The method: both forwards and both losses of one packed batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flame.components.seeds import derive_seed
from flame.config import JobConfig
from flame.data.batch import NO_LABEL, PackedBatch
from flame.instruments.representations import Observed
from flame.models.anchors import Anchors, find_anchor_room, find_excluded, select_anchors
from flame.models.candidate_pool import Pool, Share, agree_on_size, build_pools
from flame.models.estimator import Contrast
from flame.models.future_lm import FutureLM
from flame.models.future_mask import find_room, list_marked
from flame.models.future_targets import hash_futures
from flame.models.gradient_guard import guard_gradient
from flame.models.losses import linear_cross_entropy
from flame.models.rivals import Trunk
from flame.models.softmax_rows import count_chunk_rows
from flame.models.summaries import find_reach, shuffle_valid, summarize


class Parts(NamedTuple):
    """What to compute of a packed batch."""

    aux: bool
    """The loss beside the next token's."""
    ce: bool = True
    hits: bool = False
    observed: bool = False


class Losses(NamedTuple):
    """Sums over one packed batch, to be divided by global counts; None where not computed."""

    ce_sum: Tensor | None
    aux: Contrast | None
    """Of the objective beside the next token. The anchors of one that is not the future's are all labels."""
    is_hit: Tensor | None = None
    """bool [T]: where the label is the token that scores highest."""
    observed: Observed | None = None


def compute_losses(model: FutureLM, batch: PackedBatch, config: JobConfig, parts: Parts, pool: Pool | None = None) -> Losses:
    """Both forwards and both losses of one packed batch of T tokens. Run it as `model(compute_losses, ...)`.

    Args:
        pool: candidates of all packed batches of the step, this one's among them; None compares within the batch.
    """
    # 1. Anti-causal forward: summaries F [T, d] of each position's future. Labels: no gradient, no logits. It comes before the
    #    causal forward, so that its working memory is free again before that one's activations are kept.
    share: Share | Pool | None = pool
    anchors = None
    if parts.aux and model.predictor is not None:
        room = find_anchor_room(batch, config) if pool is None else pool.size
        anchors = select_anchors(batch, config, room)
        share = pool or collect_candidates(model, batch, anchors, config)

    # 2. Causal forward of the same network: hidden states h [T, d], and next-token cross entropy from them.
    hidden_states = model.encode_past(batch)
    positions = _list_predicted(batch, config)
    ce_sum = None
    if parts.ce and not config.experimental.freeze_lm_for_infonce:
        ce_sum = linear_cross_entropy(_pick(hidden_states, positions), model.output_embedding, _pick(batch.labels[0], positions))
    is_hit = find_hits(hidden_states, model.output_embedding, batch.labels[0]) if parts.hits else None

    # 3. Position t guesses F at t + target_shift; the summaries of other anchors are the negatives. (Or a rival of this loss.)
    aux = observed = None
    if anchors is not None and share is not None:
        seen = anchors.pick(_choose_inputs(model, hidden_states, batch, config))
        aux, observed = _contrast_with_future(model, seen, batch, anchors, share, config, parts.observed)
    elif parts.aux and model.rival is not None:
        aux = _run_rival(model, guard_gradient(hidden_states), batch, positions)
    return Losses(ce_sum, aux, is_hit, observed)


def collect_candidates(model: FutureLM, batch: PackedBatch, anchors: Anchors, config: JobConfig) -> Share:
    """The summaries that the guesses of a packed batch are for, row by row of its anchors; they are each other's negatives."""
    assert model.estimator is not None
    future = config.future_encoder
    with torch.no_grad():
        summaries = summarize(model, batch, config).detach()
        targets = anchors.pick_ahead(summaries, future.target_shift)
        keys = None
        if future.exclude_duplicates:
            reach = find_reach(future, model.lm.config)
            keys = anchors.pick_ahead(hash_futures(batch.input_ids[0], batch.segment_ids[0], reach), future.target_shift)
        if future.target == "shuffled":
            order = shuffle_valid(anchors.is_valid, derive_seed(config.training.seed, batch.sequence_index))
            targets, keys = targets[order], None if keys is None else keys[order]
        return Share(model.estimator.encode_targets(targets), anchors.is_valid, keys)


def gather_pools(model: FutureLM, batches: list[PackedBatch], config: JobConfig) -> list[Pool] | list[None]:
    """For each packed batch of this rank the candidates of the whole step, before its first forward with gradient; None where
    candidates are those of the batch. A collective call, once a step."""
    if not config.uses_future or config.future_encoder.negatives == "local":
        return [None] * len(batches)
    room = max(find_anchor_room(batch, config) for batch in batches)
    if config.training.loss_on == "answer":
        room = agree_on_size(room, batches[0].input_ids.device)
    return build_pools([model(collect_candidates, batch, select_anchors(batch, config, room), config) for batch in batches])


def _choose_inputs(model: FutureLM, hidden_states: Tensor, batch: PackedBatch, config: JobConfig) -> Tensor:
    """What guesses are made from: [T, d]."""
    if config.future_predictor.input == "embedding":
        return model.lm.get_input_embeddings()(batch.input_ids)[0].detach()
    return guard_gradient(hidden_states)


def _contrast_with_future(
    model: FutureLM,
    seen: Tensor,
    batch: PackedBatch,
    anchors: Anchors,
    share: Share | Pool,
    config: JobConfig,
    with_observed: bool,
) -> tuple[Contrast, Observed | None]:
    """Compare guesses from seen [n, d] with their summaries."""
    assert model.predictor is not None and model.estimator is not None
    guesses = model.predictor(seen)
    candidates = share.compare_with(find_excluded(batch, anchors, config.future_encoder.exclude_neighbors))
    aux = model.estimator.contrast_among(guesses, anchors.is_valid, candidates)
    if not with_observed:
        return aux, None
    positions = torch.arange(len(seen), device=seen.device) if anchors.positions is None else anchors.positions
    targets = candidates.summaries[candidates.own]
    return aux, Observed(seen.detach(), guesses.detach(), targets, positions, anchors.is_valid)


def _run_rival(model: FutureLM, hidden_states: Tensor, batch: PackedBatch, positions: Tensor | None) -> Contrast:
    assert model.rival is not None

    def encode(part: PreTrainedModel, embeddings: Tensor) -> Tensor:
        return model.encode_embeddings(part, embeddings, batch)

    labels = _pick(batch.labels[0], positions)
    loss_sum = model.rival(Trunk(hidden_states, batch, positions, labels, model.output_embedding, encode))
    count = loss_sum.new_full((), batch.num_labels)
    return Contrast(loss_sum, count, torch.zeros_like(count), {})


def _list_predicted(batch: PackedBatch, config: JobConfig) -> Tensor | None:
    """Positions that have logits, int64 [n]: where only answers count, those with labels and some to fill up. None is all T."""
    if config.training.loss_on == "all":
        return None
    labels = batch.labels[0]
    return list_marked(labels != NO_LABEL, find_room(batch.num_labels, len(labels)))


def _pick(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows[positions]


@torch.no_grad()
def find_hits(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Where the highest logit of hidden_states [T, d] @ weight.T, weight [V, d], is the label's: bool [T]. The logits of all
    positions with a label are never held at once; the others are not computed. Waits for the device."""
    positions = (labels != NO_LABEL).nonzero().flatten()
    is_hit = torch.zeros_like(labels, dtype=torch.bool)
    for chunk in positions.split(count_chunk_rows(max(len(positions), 1), len(weight), hidden_states.dtype)):
        is_hit[chunk] = (hidden_states[chunk] @ weight.t()).argmax(dim=-1) == labels[chunk]
    return is_hit
