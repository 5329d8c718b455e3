"""What a run measures of itself while it trains, and where it writes that."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from flame.components.counters import Counters
from flame.components.distributed import get_rank, get_world_size
from flame.components.flops import FlopCounter
from flame.components.loggers import METRICS_FILE, RunLog, drop_lines_after, drop_validation, format_line, format_validation
from flame.components.loss_metrics import record_losses
from flame.components.metrics import Metrics
from flame.components.step_counts import StepCounts
from flame.components.step_guard import SKIPPED_FILE
from flame.components.throughput import Throughput
from flame.config import JobConfig
from flame.data.audit import AuditLog, drop_audit_after
from flame.data.batch import PackedBatch
from flame.instruments.representations import Means
from flame.models.future_lm import FutureLM
from flame.models.mi_estimator import read_temperature
from flame.models.parallelize import find_compute_dtype
from flame.objective import Losses

logger = logging.getLogger("flame")


def rewind_records(folder: Path, step: int, validated_step: int) -> None:
    """Drop what an earlier process of this run wrote after the step that the run goes on from. Rank 0 calls it.

    Args:
        folder: the run's.
        validated_step: the last step of which the checkpoint holds that it has been validated. If the step's own validation is
            to be made again, what was logged of it goes too.
    """
    drop_audit_after(folder, step)
    drop_lines_after(folder / SKIPPED_FILE, step)
    if validated_step < step:
        drop_validation(folder / METRICS_FILE, step)


class RunMeters:
    """Metrics, speed, logs and audit of one run on one rank, from its start step on.

    Attributes:
        metrics: takes numbers at any point of a step; they are logged with the next line.
        throughput: is told of time that is not training's.

    Args:
        start_step: steps already done, as restored from the checkpoint; 0 for a new run.
        wandb_id: identity at Weights & Biases from the checkpoint.

    Raises:
        UserError: a service that was asked for is not installed or does not start.
    """

    def __init__(
        self,
        config: JobConfig,
        model: FutureLM,
        source_names: Sequence[str],
        device: torch.device,
        start_step: int,
        wandb_id: str | None,
    ):
        folder, rank = Path(config.job.dump_folder), get_rank()
        self._config = config
        self._estimator = model.estimator
        self._compute_dtype = find_compute_dtype(config.training, device.type)
        self._source_names = list(source_names)
        self.metrics = Metrics(device)
        self._run_log = RunLog(config, folder, rank == 0, start_step, dataclasses.asdict(config), wandb_id)
        self._audit = AuditLog(folder, rank) if config.training.audit else None
        self._flop_counter = FlopCounter(model, config)
        self.throughput = Throughput(self.metrics, device, get_world_size(), config.training.steps - start_step)
        self._logged_step = start_step
        self._has_told_of_no_anchors = False

    @property
    def wandb_id(self) -> str | None:
        """Identity at Weights & Biases, to be kept in the checkpoint."""
        return self._run_log.wandb_id

    def record_step(
        self,
        outcomes: Sequence[Losses],
        batches: Sequence[PackedBatch],
        loss: Tensor,
        grad_norm: Tensor,
        lr: float,
        weight: float,
        counts: StepCounts,
    ) -> None:
        """Record what a step has found; not called for one that is left out.

        Args:
            outcomes, batches: this rank's micro-steps.
            loss, grad_norm: of all ranks, 0-d.
            weight: factor of the loss beside the next token's.
        """
        for losses, batch in zip(outcomes, batches, strict=True):
            record_losses(self.metrics, losses, batch, self._source_names)
        self.metrics.record_mean("loss", loss, 1)
        self.metrics.record_mean("grad_norm", grad_norm, 1)
        self.metrics.record_last("lr", lr)
        if weight > 0 and self._config.uses_future:
            self.metrics.record_mean("anchors", counts.anchors, 1)
        if weight > 0:
            self.metrics.record_last("loss_weight", weight)

    def record_instruments(self, means: Means) -> None:
        """Record what the instruments show: sums and counts over this rank's part."""
        for name, (total, count) in means.items():
            self.metrics.record_mean(name, total, count)

    def count_step(self, step: int, batches: Sequence[PackedBatch], weight: float, counts: StepCounts, *, trained: bool) -> None:
        """Count a step as work done, and account for its data.

        Args:
            trained: whether it has changed the weights.
        """
        if self._audit is not None:
            self._audit.record(step, list(batches), trained=trained)
        self.throughput.count_step(counts.tokens)
        for batch in batches:
            labels = batch.piece_labels if self._config.training.loss_on == "answer" else None
            self.throughput.count_flops(self._flop_counter.count(batch.cu_seqlens, weight > 0, labels))

    def log_step(self, step: int, counters: Counters) -> None:
        """Log all that has been recorded since the last line, if there has been a step since. All ranks call it."""
        if step == self._logged_step:
            return
        if self._estimator is not None:
            temperature = read_temperature(self._estimator, self._compute_dtype)
            if temperature is not None:
                self.metrics.record_last("temperature", temperature)
        self.throughput.record()
        values = self.metrics.collect()
        seconds_left = self.throughput.summarize(values)
        values |= counters.flatten()
        self._run_log.log(step, values)
        logger.info(format_line(step, self._config.training.steps, values, seconds_left))
        self._logged_step = step
        if values.get("anchors") == 0 and get_rank() == 0 and not self._has_told_of_no_anchors:
            self._has_told_of_no_anchors = True
            logger.warning(
                "no position has a target, so the future loss teaches nothing: none has future_encoder.target_shift = %d more "
                "tokens of its %s after it; shift less, or see why they are that short",
                self._config.future_encoder.target_shift,
                "answer" if self._config.training.loss_on == "answer" else "document",
            )

    def log_validation(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a validation, `validation_*`."""
        self._run_log.log(step, values)
        logger.info(format_validation(step, self._config.training.steps, values))

    def sync(self) -> None:
        """Bring the files onto the disk; called before the checkpoint that their lines belong to is committed."""
        self._run_log.sync()
        if self._audit is not None:
            self._audit.sync()

    def close(self) -> None:
        """Finish writing. With Weights & Biases online, waits for the upload."""
        with ExitStack() as ending:  # one that fails does not keep the other from it
            ending.callback(self._run_log.close)
            if self._audit is not None:
                ending.callback(self._audit.close)
