"""Records the losses of a step as metrics."""

from __future__ import annotations

from dataclasses import fields

from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.logging.counters import Counters
from flame.logging.metric_names import SPEED_METRICS, STEP_METRICS
from flame.logging.metrics import Metrics
from flame.objectives.step import Losses
from flame.runtime.measures import Max, Mean, Measure

RESERVED = frozenset({*STEP_METRICS, *SPEED_METRICS, *(each.name for each in fields(Counters))})
"""Metrics of the trainer, which an objective's own cannot be called."""


def record_losses(
    metrics: Metrics, losses: Losses, batch: PackedBatch, sources: list[str], prefix: str = "", *, counts: bool = True
) -> None:
    """Record the losses of one packed sequence: the cross entropy per label, the objective's loss per item that it counts.

    Args:
        sources: names of all sources of the mixture. If there are several, cross entropy is also recorded for each source.
        prefix: prefix of the metrics' names.
        counts: False records the names with a count of 0, since all ranks must record the same names.
    """

    def record(name: str, measure: Measure, has_effect: bool = True) -> None:
        (metrics.record if counts and has_effect else metrics.record_zero)(prefix + name, measure)

    if losses.ce_sum is not None:
        ce = Mean(losses.ce_sum, batch.num_labels)
        record("ce_loss", ce)
        if not prefix:
            record("largest_ce_loss", Max(losses.ce_sum / max(batch.num_labels, 1)))
        for name in sources if len(sources) > 1 else ():
            record(f"ce_loss/{name}", ce, name == batch.source)
    if losses.aux is not None:
        record("aux_loss", Mean(losses.aux.loss_sum, losses.aux.num_items))
        for name, measure in losses.aux.measures.items():
            if name in RESERVED:
                raise UserError(f'the objective measures "{name}", which is a metric of the trainer: choose another name')
            record(name, measure)
