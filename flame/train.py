"""Train a causal language model that also predicts a summary of its own future.

    bash train.sh --job.config_file configs/quickstart.toml
    NGPU=8 bash train.sh --job.config_file configs/llama_340M.toml --training.steps 20000

`flame.objective.compute_losses` is the method; `Trainer` is what surrounds it, in the order in which it happens: set-up, the
loop, the step. What has a subject of its own is elsewhere.
"""

from __future__ import annotations

if __name__ == "__main__":
    from flame.components.interrupt import end_on_interrupt

    end_on_interrupt()

import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from flame.announcement import announce
from flame.checkpoints.checkpoint import Checkpointer, list_checkpoints
from flame.checkpoints.run_checkpoints import RunCheckpoints
from flame.checkpoints.run_state import RunState
from flame.components.counters import Counters
from flame.components.distributed import (
    end_processes,
    get_rank,
    get_world_size,
    set_single_process_defaults,
    start_processes,
)
from flame.components.interrupt import raise_on_interrupt
from flame.components.loggers import init_logging
from flame.components.preemption import PREEMPTED_EXIT_CODE, StopListener
from flame.components.run_meters import RunMeters, rewind_records
from flame.components.run_record import record_run
from flame.components.seeds import derive_seed
from flame.components.step_counts import StepCounts, count_over_ranks
from flame.components.step_guard import StepGuard
from flame.components.titan import GarbageCollection, clip_grad_norm_
from flame.config import JobConfig
from flame.config_reader import read_config
from flame.data.batch import PackedBatch
from flame.data.feed import Feed
from flame.data.loader import PackedLoader
from flame.data.preview import render_sequence
from flame.data.state import DataState
from flame.data.tokenizer import fingerprint_tokenizer
from flame.ending import finish_run
from flame.errors import UserError
from flame.instruments.step_instruments import is_instrument_step, measure_step
from flame.launch import report_mistake
from flame.loss_schedule import find_aux_weight
from flame.models.future_mask import (  # the two private names are part of this module's interface
    _future_valid_from_cu,
    _segment_ids_from_cu_seqlens,
    build_future_mask_from_cu,
)
from flame.objective import Losses, Parts, compute_losses, gather_pools
from flame.optimizers.optimizer import build_optimizer, build_schedule, seek_schedule
from flame.run_setup import build_model, check_same_data, claim_folder, open_inputs, open_validator
from flame.weights.exporter import Exporter
from flame.weights.hf_assets import write_hf_assets
from flame.weights.hf_weights import load_initial_weights

__all__ = [
    "Trainer",
    "_future_valid_from_cu",
    "_segment_ids_from_cu_seqlens",
    "build_future_mask_from_cu",
    "compute_losses",
    "main",
]

logger = logging.getLogger("flame")

PREVIEW_CHARS = 600


class Preempted(Exception):
    """Some rank has been asked to stop, and all have agreed to, between two steps."""


class Trainer:
    """One run, on one process.

    Args:
        config: checked options.
        is_stop_requested: asked before each step. Once it is true on any rank, all ranks save and end.
    """

    def __init__(self, config: JobConfig, is_stop_requested: Callable[[], bool] = lambda: False):
        self.config = config
        self.is_stop_requested = is_stop_requested
        self.folder = Path(config.job.dump_folder)
        self.rank, self.world_size = get_rank(), get_world_size()
        self.is_main = self.rank == 0
        init_logging(self.is_main)
        self.tokenizer, model_config, self.mixture = open_inputs(config)
        self.source_names = [source.name for source in self.mixture.sources]

        self.device, mesh = start_processes(config)
        check_same_data(self.mixture)
        self.lock = claim_folder(self.folder)
        self.model = build_model(config, model_config, self.device, mesh)
        self.optimizer = build_optimizer(config, self.model)
        self.schedule = build_schedule(config, self.optimizer)

        self.counters = Counters(tokens_by_source=dict.fromkeys(self.source_names, 0))
        self.data_state = DataState(config.training.num_streams, config.training.seed)
        self.state = RunState(self.counters, self.data_state)
        self.guard = StepGuard(config.training, self.folder, self.model, self.counters, self.device)
        self.checkpointer = Checkpointer(
            self.folder / config.checkpoint.folder,
            self.model,
            self.optimizer,
            config.checkpoint.keep_latest_k,
            self._write_assets,
            asynchronous=config.checkpoint.async_mode == "async",
        )
        fingerprint = fingerprint_tokenizer(self.tokenizer)
        self.checkpoints = RunCheckpoints(config, self.checkpointer, self.state, fingerprint, self.source_names)
        self.exporter = Exporter(config, self.checkpointer)
        self.averages_weights = config.uses_future and config.future_encoder.target == "ema"
        self.previewed = False

    @property
    def step(self) -> int:
        """Optimizer steps done, with the one that is being made."""
        return self.state.step

    # ---------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Train to `training.steps`, from the newest checkpoint if there is one.

        Returns:
            True at the end, False if asked to stop before; the same run then goes on from there.
        """
        with closing(self.lock) if self.lock is not None else nullcontext():
            return self._train()

    def _train(self) -> bool:
        wandb_id = self._resume()
        self._open_run(wandb_id)
        is_finished = False
        try:
            self._validate_when_due()  # a run that was stopped while validating owes that step its numbers
            self.exporter.export_when_due(self.checkpoints.saved_step, again=False)  # likewise its model
            while self.step < self.config.training.steps:
                self.train_step()
                self.garbage.run(self.step)
                self._log_when_due()
                self._validate_when_due()
                self._save_when_due()
                with self.meters.throughput.not_counted():
                    self.exporter.export_when_due(self.step)
            self.checkpointer.wait()
            is_finished = True
        except Preempted:
            self._stop_early()
        finally:
            self._close_run()
        end_processes()
        if is_finished and self.is_main:
            finish_run(self.config, self.step)
        return is_finished

    # ---------------------------------------------------------------- the step

    def train_step(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` packed batches on each rank.

        Raises:
            Preempted: before anything is done, if a rank is asked to stop.
        """
        batches = self._next_batches()
        counts = self._count_over_ranks(batches)
        self.data_state.advance(batches, self.world_size)
        self.state.step += 1
        weight = find_aux_weight(self.config, self.step)

        self.optimizer.zero_grad()
        on_device = [batch.to(self.device, non_blocking=True) for batch in batches]
        pools = gather_pools(self.model, on_device, self.config) if weight > 0 else [None] * len(batches)
        if weight > 0 and is_instrument_step(self.config, self.step):
            self.meters.record_instruments(measure_step(self.model, on_device[0], self.config, weight, pools[0]))
        step_loss = torch.zeros((), device=self.device)
        outcomes = []
        for batch, pool in zip(on_device, pools, strict=True):
            # Dropout depends on which sequence this is: the same on any number of ranks, and after a resume.
            torch.manual_seed(derive_seed(self.config.training.seed, batch.sequence_index))
            losses = self.model(compute_losses, batch, self.config, Parts(aux=weight > 0), pool)
            loss = self._average(losses, weight, counts)
            loss.backward()
            step_loss += loss.detach()
            outcomes.append(losses)
        step_loss, failures = self.guard.settle(step_loss, outcomes)
        grad_norm = clip_grad_norm_(self.model.parameters(), self.config.training.max_norm, foreach=True)
        grad_norm = grad_norm.to(self.device)  # of offloaded gradients it is on the CPU

        is_usable = self.guard.judge(self.step, step_loss, grad_norm, failures, batches, outcomes)
        if is_usable:
            self.optimizer.step()
            if self.model.estimator is not None:
                self.model.estimator.limit_temperature()
            if self.averages_weights:
                self.model.update_teacher(self.config.future_encoder.ema_decay)
            lr = self.optimizer.optimizers[0].param_groups[0]["lr"]
            self.meters.record_step(outcomes, batches, step_loss, grad_norm, lr, weight, counts)
        self.meters.count_step(self.step, batches, weight, counts, trained=is_usable)
        self.schedule.step()

    def _next_batches(self) -> list[PackedBatch]:
        """This rank's batches; none if it is asked to stop while it waits for them."""
        with self.meters.throughput.waiting_for_data():
            batches = self.feed.take(self.config.training.gradient_accumulation_steps, self.is_stop_requested) or []
        if batches and not self.previewed:
            self.previewed = True
            logger.info("the first packed sequence:\n%s", render_sequence(batches[0], self.tokenizer, PREVIEW_CHARS))
        return batches

    def _count_over_ranks(self, batches: list[PackedBatch]) -> StepCounts:
        """What this step is averaged over; added to the run's totals.

        Raises:
            Preempted: a rank is asked to stop. Nothing has been counted.
        """
        counts = count_over_ranks(batches, self.config.future_encoder, self.source_names, self.is_stop_requested())
        if counts.stop_votes:
            raise Preempted
        counts.add_to(self.counters)
        return counts

    def _average(self, losses: Losses, weight: float, counts: StepCounts) -> Tensor:
        """This packed batch's part of the step's loss, 0-d: sums divided by the counts of all micro-steps and ranks."""
        loss = torch.zeros((), device=self.device)
        if losses.ce_sum is not None:
            loss = loss + losses.ce_sum / max(counts.labels, 1)
        if losses.aux is not None:
            anchors = counts.anchors if self.config.uses_future else counts.labels
            loss = loss + weight * losses.aux.loss_sum / max(anchors, 1)
        return loss

    # ---------------------------------------------------------------- between steps

    def _log_when_due(self) -> None:
        """Log every `metrics.log_freq` steps, at the end, and before a checkpoint: a resumed run averages the same steps."""
        is_last = self.step == self.config.training.steps
        if is_last or self.step % self.config.metrics.log_freq == 0 or self.checkpoints.is_due():
            self.meters.log_step(self.step, self.counters)

    def _validate_when_due(self) -> None:
        """Validate every `validation.interval` steps and at the end, once.

        Raises:
            Preempted: a rank is asked to stop meanwhile.
        """
        interval, is_last = self.config.validation.interval, self.step == self.config.training.steps
        if self.validator is None or self.state.validated_step == self.step or not (self.step % interval == 0 or is_last):
            return
        with self.meters.throughput.not_counted():
            values = self.validator.run(self.model, find_aux_weight(self.config, self.step) > 0, self.is_stop_requested)
        if values is None:
            raise Preempted
        self.state.validated_step = self.step
        self.meters.log_validation(self.step, values)

    def _save_when_due(self) -> None:
        if self.checkpoints.is_due():
            self._save()

    def _save(self) -> None:
        self.meters.sync()
        with self.meters.throughput.not_counted():
            self.checkpoints.save()

    # ---------------------------------------------------------------- start and end

    def _resume(self) -> str | None:
        """Take over the newest checkpoint, if there is one. Returns the identity of the run at Weights & Biases."""
        is_resumed = self.checkpoints.resume()
        self.data_state.check_units(self.mixture.count_units())
        if is_resumed:
            seek_schedule(self.schedule, self.step)
        elif self.config.checkpoint.initial_load_path:
            lines, self.state.generation = load_initial_weights(self.model, self.config, self.tokenizer)
            for line in lines:
                logger.info(line)
        if not is_resumed and self.averages_weights:
            self.model.update_teacher(decay=0.0)
        self.checkpoints.prepare()
        return self.state.wandb_id

    def _write_assets(self, folder: Path) -> None:
        write_hf_assets(self.model.lm.config, self.tokenizer, self.state.generation, folder)

    def _open_run(self, wandb_id: str | None) -> None:
        """Everything that starts at the step the run starts from."""
        config = self.config
        self.validator = open_validator(config, self.tokenizer, self.mixture, self.device)
        if self.is_main:
            record_run(config, self.folder, self.step, self.world_size)
            rewind_records(self.folder, self.step, self.state.validated_step)
        dist.barrier()
        self.meters = RunMeters(config, self.model, self.source_names, self.device, self.step, wandb_id)
        self.state.wandb_id = self.meters.wandb_id
        self.garbage = GarbageCollection(config.training.gc_freq)
        loader = PackedLoader(config.training, self.mixture, self.rank, self.world_size, self.data_state)
        self.feed = Feed(loader, config.comm.timeout_seconds, self.rank)
        announce(config, self.model, self.mixture, self.validator, self.device, self.step)

    def _stop_early(self) -> None:
        """Save what has been done, if no checkpoint holds it yet. Nothing else comes before that."""
        if self.checkpoints.is_owed():
            self._save()
        self.checkpointer.wait()
        self.meters.log_step(self.step, self.counters)
        saved = _tell_what_is_saved(self.config)
        logger.info("stopped on request after step %d of %d; %s", self.step, self.config.training.steps, saved)

    def _close_run(self) -> None:
        """End what runs beside the training."""
        with ExitStack() as ending:  # one that fails keeps none of the others from it; the last named is the first
            ending.callback(self.meters.close)
            ending.callback(self.feed.close)
            ending.callback(self.checkpointer.close)


def main(argv: list[str]) -> None:
    """Read the options and train. Ends the process with `PREEMPTED_EXIT_CODE` when the run was stopped on request, and at once,
    unsaved, on Ctrl-C.

    Args:
        argv: command-line arguments; see `bash train.sh --help`.
    """
    set_single_process_defaults()
    try:
        is_finished = _run(read_config(argv, get_world_size()))
    except UserError as error:
        report_mistake(error)
        sys.exit(error.EXIT_CODE)
    if not is_finished:
        sys.exit(PREEMPTED_EXIT_CODE)


def _run(config: JobConfig) -> bool:
    """Train until the end or a request to stop, like `Trainer.train`, or until Ctrl-C, which ends the process."""
    try:
        raise_on_interrupt()
        with StopListener() as listener:
            return Trainer(config, lambda: listener.requested is not None).train()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another one
        logger.info("interrupted: %s", _tell_what_is_saved(config))
        sys.exit(128 + signal.SIGINT)


def _tell_what_is_saved(config: JobConfig) -> str:
    if not config.checkpoint.enable_checkpoint:
        return "nothing is saved: checkpoints are off"
    if list_checkpoints(Path(config.job.dump_folder) / config.checkpoint.folder):
        return "the same command goes on from the last checkpoint"
    return "nothing is saved yet: the same command begins anew"


if __name__ == "__main__":
    record(main)(sys.argv[1:])  # puts the traceback of a rank whose output is not shown into torchrun's report
