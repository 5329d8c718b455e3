"""Semantic tube prediction (STP; Huang, LeCun and Balestriero 2026, arXiv:2602.22617, sections 3 and 4).

The final states of a document are to lie on a line. Of each document three positions s < r < t are drawn at random, and

    L = 1 - cos(h_t - h_r, h_r - h_s).

The gradient reaches all three states: the predictor is the identity, and no stop-gradient is taken. The paper adds L with a
factor of 0.01 to 0.08, 0.02 on its first data set, when it fine-tunes on one document a sequence.

Here each document of a packed sequence has a triple of its own, all of which are equally likely, and L is the mean over
documents. Those of fewer than three tokens have none. If only some tokens count (`training.loss_on`), a document needs one that
does; the triple may lie anywhere in it, as in the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxLoss, Objective
from flame.objectives.stp.options import SemanticTubeOptions
from flame.runtime.measures import Mean
from flame.runtime.seeds import derive_seed

SHORTEST = 3
"""Tokens of a document that has a triple."""


class SemanticTube(Objective):
    """The loss. It has no parameters, and its arithmetic is nothing beside a forward's."""

    name: ClassVar[str] = "stp"
    Options: ClassVar[type[SemanticTubeOptions]] = SemanticTubeOptions

    def find_future_pass(self) -> None:
        """None: the causal pass is all that is read."""

    def count(self, batch: PackedBatch) -> int:
        return int(((batch.cu_seqlens.diff().cpu().numpy() >= SHORTEST) & (batch.chunk_labels > 0)).sum())

    def loss(
        self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch, prepared: None, *, with_sample: bool = False
    ) -> AuxLoss:
        lengths = batch.cu_seqlens.diff()
        is_labelled = (batch.labels[0] != NO_LABEL).int()
        labels = torch.zeros_like(lengths).index_add_(0, batch.segment_ids[0].long(), is_labelled)
        is_counted = (lengths >= SHORTEST) & (labels > 0)
        triples = draw_triples(lengths, derive_seed(self.setup.seed, batch.sequence_index))
        triples = (batch.cu_seqlens[:-1].long() + triples).clamp(max=len(hidden_states) - 1)
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        first, middle, last = (hidden_states[row].to(wide) for row in triples)
        # A document without a triple gets a difference that has a direction, for the sake of the gradient.
        before, after = (torch.where(is_counted[:, None], way, 1.0) for way in (middle - first, last - middle))
        cosines = torch.where(is_counted, F.cosine_similarity(after, before, dim=-1), 0.0)
        count = is_counted.sum().to(wide)
        loss_sum = count - cosines.sum()
        return AuxLoss(loss_sum, count, torch.zeros_like(count), {"stp_cosine": Mean(cosines.sum().detach(), count)})

    def explain_no_count(self) -> str:
        return f"no document counts for the {self.name} loss: it needs {SHORTEST} tokens, one of them with a label"


def draw_triples(lengths: Tensor, seed: int) -> Tensor:
    """Three different positions of each document in ascending order, each such triple as likely as any other.

    Args:
        lengths: int [S]. Documents of fewer than `SHORTEST` tokens get positions beyond their end.

    Returns:
        int64 [3, S], from the start of each document. Does not wait for the device.
    """
    generator = torch.Generator(lengths.device).manual_seed(seed)
    shares = torch.rand(3, len(lengths), generator=generator, dtype=torch.float64, device=lengths.device)
    total = lengths.long().clamp(min=SHORTEST)
    one, other, third = ((share * (total - i)).long().clamp(max=total - i - 1) for i, share in enumerate(shares))
    other = other + (other >= one)  # a number among those that are left
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    third = third + (third >= low)
    third = third + (third >= high)
    return torch.stack([low, high, third]).sort(dim=0).values
