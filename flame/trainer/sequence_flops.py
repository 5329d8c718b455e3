"""FLOPs of a packed sequence, by the first ones of the data: what budgets and estimates of a run rest on."""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np

from flame.config.schema import JobConfig
from flame.data.batch import PackedBatch, build_batch
from flame.data.mixture import Mixture
from flame.models.flops import ModelFlops
from flame.models.wrapper import TrainingModel
from flame.objectives.base import Objective
from flame.objectives.step import get_objective
from flame.trainer.setup import build_weight_schedule

SAMPLED = 16
"""Packed sequences whose FLOPs are counted."""
SAMPLED_STEPS = 60
"""Steps whose FLOPs are counted, where they differ."""


class SequenceFlops:
    """Means over the first packed sequences.

    Attributes:
        next_token: of next-token training.
    """

    def __init__(self, config: JobConfig, model: TrainingModel, mixture: Mixture):
        self._batches = _pack_first(config, mixture)
        self._flops = ModelFlops(model.lm)
        is_frozen = config.experimental.freeze_lm_for_infonce
        self.next_token = float(np.mean([self._flops.count_next_token(batch, is_frozen=is_frozen) for batch in self._batches]))
        # A copy, since `begin_step` is told steps that the run does not make now. It shares the weights.
        self._objective = copy.copy(get_objective(model))
        self._start_step = max(build_weight_schedule(config).start_step, 1)
        self._total_steps = config.lr_scheduler.total_steps

    def average_aux(self, steps: int) -> float:
        """What the objective adds to a packed sequence that has its loss, over such steps of a run of so many."""
        if self._objective is None:
            return 0.0
        if type(self._objective).begin_step is Objective.begin_step:
            return self._aux
        first, last = min(self._start_step, max(steps, 1)), max(steps, 1)
        found = []
        for step in np.linspace(first, last, num=min(SAMPLED_STEPS, last - first + 1)).round().astype(int):
            self._objective.begin_step(int(step), self._total_steps or last)
            found.append(self._count_aux())
        return float(np.mean(found))

    @cached_property
    def _aux(self) -> float:
        """Where it is the same in all steps."""
        return self._count_aux()

    def _count_aux(self) -> float:
        assert self._objective is not None
        return float(np.mean([sum(self._objective.count_flops(batch, self._flops)) for batch in self._batches]))


def _pack_first(config: JobConfig, mixture: Mixture) -> list[PackedBatch]:
    training, batches = config.training, []
    for index in range(min(SAMPLED, training.num_streams)):
        packer = mixture.open_packer(mixture.choose(index, training.num_streams), index, training.num_streams, training)
        batches.append(build_batch(packer.next_sequence(packer.first_cursor), index))
    return batches
