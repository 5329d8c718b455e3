"""Regret pre-training (Zhao et al. 2026, arXiv:2606.03080, and its code, RegretPretraining/Code2026).

The teacher is the same network, in one more forward without gradient, with a mask that shows it the future. The student is the
causal forward. With their distributions of the next token,

    L = KL( p_teacher(x_{t+1}) || p_student(x_{t+1}) ).

Masks, inside a document, of query q and key k: k != q + 1 ("global", GlobalRegret), k <= q + 1 ("local", LocalRegret). They hold
in each layer. So "local" shows the teacher its answer, and from the second layer on "global" does so too, by way of other tokens
that have seen it. Both are as published.

The code adds L with factor 0.1 from step 10,000 on (`objective.start_step`). L is the mean over the labels, and the student's
output head learns too. The teacher's cross entropy is logged, as the code does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from flame.attention.backends import check_attention, is_recurrent
from flame.attention.kernel_masks import Privileged
from flame.data.batch import NO_LABEL, PackedBatch
from flame.kernels.divergence import linear_divergence
from flame.models.flops import ModelFlops, count_predicted, measure_lengths
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops, AuxLoss, Objective, Setup
from flame.objectives.regret.options import RegretOptions
from flame.objectives.step import list_predicted, pick
from flame.runtime.measures import Mean

VIEWS: dict[str, Privileged] = {"global": "all_but_next", "local": "one_ahead"}
HEAD_PRODUCTS = 8
"""FLOPs for each weight of the output head and position: two for the teacher's logits, two for the student's, four backward."""
KEPT_WIDTHS, BFLOAT16_BYTES = 2, 2
"""Vectors of the model's width kept for each token: the teacher's state, and the gradient of the student's."""


class Regret(Objective):
    """The teacher's forward and the divergence. It has no parameters.

    Raises:
        UserError: packed sequences are too short for the kernel of the teacher's mask.
    """

    name: ClassVar[str] = "regret"
    Options: ClassVar[type[RegretOptions]] = RegretOptions

    def __init__(self, setup: Setup):
        super().__init__(setup)
        assert isinstance(setup.options, RegretOptions)
        check_attention("flex" if setup.attention == "varlen" else setup.attention, setup.seq_len)
        self.view = VIEWS[setup.options.teacher]

    @classmethod
    def find_model_conflicts(cls, options: RegretOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        if is_recurrent(config):
            yield (
                f'objective.name = "{cls.name}" is not supported with model_type "{config.model_type}": recurrent layers take no '
                'mask for the teacher; use "future" or "top", or another model'
            )

    @property
    def fits_graph(self) -> bool:
        return True

    def prepare(self, backbone: TrainingModel, batch: PackedBatch, prepared: None) -> Tensor:
        """The teacher's final states [T, d]."""
        return backbone.encode_privileged(batch, self.view)

    def loss(
        self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch, prepared: Tensor, *, with_sample: bool = False
    ) -> AuxLoss:
        positions, head = list_predicted(batch), backbone.output_head
        labels = pick(batch.labels[0], positions)
        found = linear_divergence(
            pick(hidden_states, positions),
            head.weight,
            pick(prepared, positions),
            labels != NO_LABEL,
            labels,
            head.bias,
            *head.rule,
        )
        count = batch.sum_labels().to(found.total.dtype)
        measures = {"regret_teacher_ce": Mean(found.target_ce, count), "regret_agreement": Mean(found.agreed, count)}
        return AuxLoss(found.total, count, torch.zeros_like(count), {**measures})

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        forward = model.count_privileged_forward(measure_lengths(batch), self.view)
        return AuxFlops(forward, HEAD_PRODUCTS * model.head * count_predicted(batch))

    def estimate_memory(self, tokens: int) -> float:
        return float(KEPT_WIDTHS * tokens * self.setup.lm.config.hidden_size * BFLOAT16_BYTES)
