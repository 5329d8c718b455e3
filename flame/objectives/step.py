"""The losses of one packed sequence: causal forward, cross entropy, and the objective's loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from flame.attention.masks import list_marked
from flame.data.batch import NO_LABEL, PackedBatch
from flame.kernels.gradient_guard import guard_gradient
from flame.models.output_head import OutputHead
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxLoss, Objective, WithLayer


class Requested(NamedTuple):
    """What to compute for a packed sequence."""

    aux: bool
    """The objective's loss."""
    ce: bool = True
    """The cross entropy."""
    correct: bool = False
    """Where the label has the highest logit."""
    sample: bool = False
    """The input of the objective's diagnostics."""


class Losses(NamedTuple):
    """Losses summed over one packed sequence; the trainer divides them by global counts. None if not requested."""

    ce_sum: Tensor | None
    aux: AuxLoss | None
    is_correct: Tensor | None = None
    """bool [T]: whether the label has the highest logit."""


def get_objective(model: TrainingModel) -> Objective | None:
    """The model's objective; None for next-token prediction alone."""
    assert model.objective is None or isinstance(model.objective, Objective)
    return model.objective


def compute_losses(model: TrainingModel, batch: PackedBatch, requested: Requested, prepared: Any = None) -> Losses:
    """All losses of one packed sequence of T tokens. Call it as `model(compute_losses, ...)`, so that FSDP sees the forward.

    Args:
        prepared: what `Objective.prepare_step` made for this packed sequence.
    """
    objective = get_objective(model) if requested.aux else None

    # 1. The objective's labels, without gradient. They come first, so their working memory is free before activations are stored.
    if objective is not None:
        with torch.no_grad():
            prepared = objective.prepare(model, batch, prepared)

    # 2. Causal forward: hidden states h [T, d] and their next-token cross entropy.
    depth = objective.find_layer_read() if objective is not None else None
    if depth is None:
        hidden_states = model.encode_past(batch)
    else:
        hidden_states, layer_states = model.encode_past_and_layer(batch, depth)
        assert objective is not None
        layer_states = guard_gradient(layer_states) if objective.trains_layer_read else layer_states.detach()
        prepared = WithLayer(prepared, layer_states)
    positions = list_predicted(batch)
    ce_sum = None
    if requested.ce:
        with record_function("cross entropy"):
            labels = pick(batch.labels[0], positions)
            ce_sum = model.output_head.sum_cross_entropy(pick(hidden_states, positions), labels)
    is_correct = find_correct(hidden_states, model.output_head, batch.labels[0]) if requested.correct else None

    # 3. The objective's loss, from the same hidden states.
    aux = None
    if objective is not None:
        with record_function("objective's loss"):
            aux = objective.loss(model, guard_gradient(hidden_states), batch, prepared, with_sample=requested.sample)
    return Losses(ce_sum, aux, is_correct)


def list_predicted(batch: PackedBatch) -> Tensor | None:
    """Positions whose logits are computed, int64 [n]; None is all T. If only answers count, those with a label, padded to a
    bucket size."""
    if not batch.answers_only:
        return None
    labels = batch.labels[0]
    assert batch.num_predicted, "only some tokens are labels, but the batch does not say how many"
    return list_marked(labels != NO_LABEL, batch.num_predicted)


def pick(rows: Tensor, positions: Tensor | None) -> Tensor:
    """[T, ...] -> [n, ...], the rows at the positions; None picks all."""
    return rows if positions is None else rows[positions]


@torch.no_grad()
def find_correct(hidden_states: Tensor, head: OutputHead, labels: Tensor) -> Tensor:
    """Where the label's logit is above all others: bool [T], False at positions without a label.

    Logits are computed at the positions with a label only, and are not rounded to the dtype of the states. Waits for the device.

    Args:
        hidden_states: [T, d].
        head: of the language model.
        labels: int64 [T].
    """
    positions = (labels != NO_LABEL).nonzero().flatten()
    is_correct = torch.zeros_like(labels, dtype=torch.bool)
    if len(positions):
        is_correct[positions] = head.score_labels(hidden_states[positions], labels[positions]).is_best.bool()
    return is_correct
