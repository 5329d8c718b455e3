"""Diagnostics of an objective, every `metrics.diagnostics_interval` steps. They do not affect training.

docs/diagnostics.md says how to read them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flame.data.batch import PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.cadence import Cadence
from flame.objectives.gradients import compare_gradients, name_gradients, reshard_weights
from flame.objectives.step import Losses, Requested, compute_losses, get_objective
from flame.runtime.distributed import get_gpu
from flame.runtime.measures import Measures
from flame.runtime.seeds import derive_seed


def is_probe_step(step: int, interval: int, cadence: Cadence) -> bool:
    """Whether to measure a step that has the objective's loss: the first one, and the first one after each `interval` steps (0 is
    never). Measuring the first one shows at once if the diagnostics do not fit in memory."""
    if interval == 0 or not cadence.has_loss(step):
        return False
    previous = cadence.find_previous(step)
    return previous is None or previous // interval < step // interval


def measure_step(model: TrainingModel, batch: PackedBatch, run_seed: int, loss_weight: float, prepared: Any) -> Measures:
    """Measure both losses on one packed sequence of each rank. All ranks call it. Gradients and random state are restored.

    Args:
        run_seed: `training.seed`.
        loss_weight: factor of the objective's loss at this step.
        prepared: as for `compute_losses`.

    Returns:
        metrics by name, "NAME/..." with the objective's name. Gradients are those of the losses over all ranks' sequences.
    """
    objective = get_objective(model)
    assert objective is not None
    samples: list[Any] = []
    seed = derive_seed(run_seed, batch.sequence_index)

    def run(requested: Requested) -> Losses:
        torch.manual_seed(seed)  # same dropout as in the training step
        return model(compute_losses, batch, requested, prepared)

    def run_ce() -> Tensor:
        ce_sum = run(Requested(aux=False)).ce_sum
        assert ce_sum is not None
        return ce_sum / _sum_over_ranks(ce_sum.new_full((), batch.num_labels)).clamp(min=1)

    def run_aux() -> Tensor:
        aux = run(Requested(aux=True, ce=False, sample=True)).aux
        assert aux is not None
        samples.append(aux.sample)
        return aux.loss_sum / _sum_over_ranks(aux.num_items).clamp(min=1)

    reshard_weights(model)  # `prepare_step` may have run forwards without a backward
    parameters = [parameter for parameter in model.lm.parameters() if parameter.requires_grad]
    if parameters:
        measured = name_gradients(compare_gradients(model, run_ce, run_aux, parameters), loss_weight)
    else:  # the language model is frozen
        measured = {}
        gpu = get_gpu()
        with torch.no_grad(), torch.random.fork_rng([] if gpu is None else [gpu]):
            run_aux()
    measured |= objective.measure_sample(samples[0], batch, seed)
    return {f"{objective.name}/{name}": mean for name, mean in measured.items()}


def _sum_over_ranks(count: Tensor) -> Tensor:
    total = count.clone()
    dist.all_reduce(total)
    return total
