"""Metrics, speed, logs and data audit of a run while it trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from flame.config.schema import JobConfig
from flame.data.audit import AuditLog, drop_audit_after
from flame.data.batch import PackedBatch
from flame.evaluation.evaluator import Evaluated
from flame.logging.console import format_evaluation, format_line, format_validation
from flame.logging.counters import Counters
from flame.logging.metrics import Metrics
from flame.logging.run_log import RunLog, drop_row
from flame.logging.stragglers import StragglerWatch
from flame.logging.throughput import Flops, Throughput
from flame.logging.writers.base import RunIdentity
from flame.logging.writers.json_lines import METRICS_FILE
from flame.models.flops import ModelFlops
from flame.models.parallelize import find_compute_dtype
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops
from flame.objectives.step import Losses, get_objective
from flame.runtime.distributed import get_rank, get_world_size
from flame.runtime.json_lines import drop_lines_after
from flame.runtime.measures import Measures
from flame.trainer.guard import SKIPPED_FILE
from flame.trainer.loss_metrics import record_losses
from flame.trainer.step_counts import StepCounts

logger = logging.getLogger("flame")


def rewind_records(folder: Path, step: int, validated_step: int, evaluated_step: int) -> None:
    """Drop the records that an earlier process wrote after the step that the run resumes from. Rank 0 calls it.

    Args:
        folder: the run's folder.
        validated_step: the last validated step, from the checkpoint. If it is before `step`, `step` will be validated again, and
            its logged validation is dropped too.
        evaluated_step: the same of the last evaluation.
    """
    drop_audit_after(folder, step)
    drop_lines_after(folder / SKIPPED_FILE, step)
    if validated_step < step:
        drop_row(folder / METRICS_FILE, step, "validation")
    if evaluated_step < step:
        drop_row(folder / METRICS_FILE, step, "evaluation")


class RunMeters:
    """Metrics, speed, logs and data audit of a run on one rank, from its start step on.

    Attributes:
        metrics: collects numbers at any point of a step; they are logged with the next line.
        throughput: measures speed; mark time that is not spent on training there.

    Args:
        start_step: steps already done, from the checkpoint; 0 for a new run.
        service_ids: the run's ids at services such as Weights & Biases, by metric writer, from the checkpoint.

    Raises:
        UserError: a requested service is not installed or does not start.
    """

    def __init__(
        self,
        config: JobConfig,
        model: TrainingModel,
        source_names: Sequence[str],
        device: torch.device,
        start_step: int,
        service_ids: dict[str, str],
    ):
        folder, rank = Path(config.job.dump_folder), get_rank()
        self._objective = get_objective(model)
        self._total_steps, self._is_frozen = config.training.steps, config.experimental.freeze_lm_for_infonce
        self._compute_dtype = find_compute_dtype(config.training, device.type)
        self._source_names = list(source_names)
        self.metrics = Metrics(device)
        run = RunIdentity(folder, start_step, config.job.description, config.to_dict(), None)
        self._run_log = RunLog(config.metrics, run if rank == 0 else None, service_ids)
        self._audit = AuditLog(folder, rank) if config.training.audit else None
        self._model_flops = ModelFlops(model.lm)
        self.throughput = Throughput(self.metrics, device, get_world_size(), config.training.steps - start_step)
        self._stragglers = StragglerWatch(device)
        self._logged_step = start_step
        self._items: int | None = None
        """What the objective's loss was averaged over since the last line; None if no step had it."""
        self._has_reported_no_count = False

    @property
    def service_ids(self) -> dict[str, str]:
        """The run's id at a service such as Weights & Biases; the checkpoint stores it."""
        return self._run_log.service_ids

    def record_step(
        self,
        outcomes: Sequence[Losses],
        batches: Sequence[PackedBatch],
        loss: Tensor,
        grad_norm: Tensor,
        rates: Mapping[str, float],
        weight: float,
        counts: StepCounts,
    ) -> None:
        """Record the losses of a step. Do not call it for a skipped step.

        Args:
            outcomes, batches: of this rank's micro-steps.
            loss, grad_norm: over all ranks, 0-d.
            rates: learning rates by metric.
            weight: factor of the objective's loss at this step.
        """
        for losses, batch in zip(outcomes, batches, strict=True):
            record_losses(self.metrics, losses, batch, self._source_names)
        self.metrics.record_mean("loss", loss, 1)
        self.metrics.record_mean("grad_norm", grad_norm, 1)
        for name, rate in rates.items():
            self.metrics.record_last(name, rate)
        if weight > 0 and self._objective is not None:
            self._items = (self._items or 0) + counts.aux
            if self._objective.count_metric is not None:
                self.metrics.record_mean(self._objective.count_metric, counts.aux, 1)
            self.metrics.record_last("loss_weight", weight)

    def record(self, measures: Measures) -> None:
        """Record other measures, such as diagnostics. All ranks must record the same names."""
        for name, measure in measures.items():
            self.metrics.record(name, measure)

    def count_step(
        self, step: int, batches: Sequence[PackedBatch], marked: Sequence[bool], counts: StepCounts, *, trained: bool
    ) -> None:
        """Count the tokens and FLOPs of a step, and write its documents to the data audit.

        Args:
            marked: for each micro-step, whether it has the objective's loss.
            trained: whether the step has changed the weights.
        """
        if self._audit is not None:
            self._audit.record(step, list(batches), trained=trained)
        self.throughput.count_step(counts.tokens)
        for batch, has_loss in zip(batches, marked, strict=True):
            next_token = self._model_flops.count_next_token(batch, is_frozen=self._is_frozen)
            aux = AuxFlops()
            if has_loss and self._objective is not None:
                aux = self._objective.count_flops(batch, self._model_flops)
            self.throughput.count_flops(Flops(next_token, *aux))

    def log_step(self, step: int, counters: Counters) -> None:
        """Log everything recorded since the last line; does nothing if no step came since. All ranks call it."""
        if step == self._logged_step:
            return
        if self._objective is not None:
            self.record(self._objective.read_metrics(self._compute_dtype))
        self.throughput.record()
        values = self.metrics.collect()
        own_times = self.throughput.find_own_times()
        seconds_left = self.throughput.summarize(values)
        values |= counters.flatten()
        self._run_log.log(step, values)
        logger.info(format_line(step, self._total_steps, values, seconds_left, self._describe))
        self._logged_step = step
        with self.throughput.not_counted():
            slow = self._stragglers.compare(*own_times, values["step_seconds"])
        for line in slow if get_rank() == 0 else ():
            logger.warning(line)
        if self._items == 0 and get_rank() == 0 and not self._has_reported_no_count:
            self._has_reported_no_count = True
            assert self._objective is not None
            logger.warning(self._objective.explain_no_count())
        self._items = None

    def _describe(self, values: Mapping[str, float], prefix: str) -> str:
        return self._objective.describe_metrics(values, prefix) if self._objective is not None else ""

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a validation, whose names begin with `validation_`."""
        self._run_log.log(step, values)
        logger.info(format_validation(step, self._total_steps, values, self._describe))

    def log_evaluation(self, step: int, evaluated: Evaluated) -> None:
        """Log the metrics and completions of an evaluation."""
        if evaluated.metrics:
            self._run_log.log(step, evaluated.metrics)
        for line in format_evaluation(step, self._total_steps, evaluated.metrics):
            logger.info(line)
        for each in evaluated.completions:
            logger.info("completion of %s: %s", *(json.dumps(text, ensure_ascii=False) for text in each))
        self._run_log.log_texts(step, "completions", [each._asdict() for each in evaluated.completions])

    def sync(self) -> None:
        """Flush the files to disk. Call it before committing the checkpoint that their lines belong to."""
        self._run_log.sync()
        if self._audit is not None:
            self._audit.sync()

    def close(self) -> None:
        """Finish writing. With Weights & Biases online, waits for the upload."""
        with ExitStack() as ending:  # closes both, even if one raises
            ending.callback(self._run_log.close)
            if self._audit is not None:
                ending.callback(self._audit.close)
