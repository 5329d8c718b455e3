"""What the trainer measures of the future loss every `metrics.future_interval` steps, see docs/instruments.md."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from flame.components.distributed import get_gpu
from flame.components.seeds import derive_seed
from flame.config import JobConfig
from flame.data.batch import PackedBatch
from flame.instruments.gradients import compare_gradients, name_gradients, reshard_weights
from flame.instruments.representations import Means, Observed, measure_representations
from flame.models.candidate_pool import Pool
from flame.models.future_lm import FutureLM
from flame.objective import Losses, Parts, compute_losses


def is_instrument_step(config: JobConfig, step: int) -> bool:
    """Whether a step, counted from 1, is measured: the first with a future loss, so that what does not fit shows at once, and
    each so-many-th."""
    interval, first = config.metrics.future_interval, max(config.future_encoder.start_step, 1)
    return config.uses_future and interval > 0 and (step == first or step % interval == 0)


def measure_step(model: FutureLM, batch: PackedBatch, config: JobConfig, loss_weight: float, pool: Pool | None) -> Means:
    """Measure both losses on one packed batch of each rank, apart from training, of which nothing is changed. All ranks call it.

    Args:
        loss_weight: factor of the future loss.
        pool: as for `compute_losses`.

    Returns:
        sum and count by metric. Gradients are those of both losses over all ranks' batches.
    """
    observed: list[Observed] = []

    seed = derive_seed(config.training.seed, batch.sequence_index)

    def run(parts: Parts) -> Losses:
        torch.manual_seed(seed)  # the dropout of the training step
        return model(compute_losses, batch, config, parts, pool)

    def run_ce() -> Tensor:
        ce_sum = run(Parts(aux=False)).ce_sum
        assert ce_sum is not None
        return ce_sum / _sum_over_ranks(ce_sum.new_full((), batch.num_labels)).clamp(min=1)

    def run_aux() -> Tensor:
        losses = run(Parts(aux=True, ce=False, observed=True))
        assert losses.aux is not None and losses.observed is not None
        observed.append(losses.observed)
        return losses.aux.loss_sum / _sum_over_ranks(losses.aux.num_anchors).clamp(min=1)

    reshard_weights(model)  # after forwards that have collected candidates
    parameters = [parameter for parameter in model.lm.parameters() if parameter.requires_grad]
    if parameters:
        gradients = name_gradients(compare_gradients(model, run_ce, run_aux, parameters), loss_weight)
    else:  # the language model is frozen
        gradients = {}
        gpu = get_gpu()
        with torch.no_grad(), torch.random.fork_rng([] if gpu is None else [gpu]):
            run_aux()
    return gradients | measure_representations(observed[0], batch, config.future_encoder.target_shift, seed)


def _sum_over_ranks(count: Tensor) -> Tensor:
    total = count.clone()
    dist.all_reduce(total)
    return total
