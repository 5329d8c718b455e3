"""What is logged of the losses of a step."""

from __future__ import annotations

from torch import Tensor

from flame.components.metrics import Metrics
from flame.data.batch import PackedBatch
from flame.objective import Losses


def record_losses(
    metrics: Metrics, losses: Losses, batch: PackedBatch, sources: list[str], prefix: str = "", times: int = 1
) -> None:
    """Record the losses of one packed batch as means per label and per anchor.

    Args:
        sources: names of all sources of the mixture. Where there are several, cross entropy is recorded for each.
        prefix: of the metrics' names.
        times: 0 records the names alone, which all ranks must have in common.
    """

    def record(name: str, total: Tensor, count: Tensor | int, weight: int = times) -> None:
        metrics.record_mean(prefix + name, total if weight else 0.0, count if weight else 0)

    if losses.ce_sum is not None:
        record("ce_loss", losses.ce_sum, batch.num_labels)
        for name in sources if len(sources) > 1 else ():
            record(f"ce_loss/{name}", losses.ce_sum, batch.num_labels, times * (name == batch.source))
    if losses.aux is not None:
        record("aux_loss", losses.aux.loss_sum, losses.aux.num_anchors)
        for name, (total, count) in losses.aux.measures.items():
            record(name, total, count)
