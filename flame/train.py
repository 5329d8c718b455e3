"""Train a causal language model that also predicts a summary of its own future.

    bash train.sh --job.config_file configs/quickstart.toml
    NGPU=8 bash train.sh --job.config_file configs/llama_340M.toml --training.steps 20000

`flame.objectives.step.compute_losses` computes the losses of one packed sequence. `Trainer` is everything around it: set-up, the
loop, the step. The parts of the loop are in `flame/trainer/`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from flame.runtime.interrupt import end_on_interrupt

    end_on_interrupt()

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.profiler import record_function

from flame.attention.masks import (  # the two private names are part of this module's interface
    _future_valid_from_cu,
    _segment_ids_from_cu_seqlens,
    build_future_mask_from_cu,
)
from flame.checkpoints.manager import Checkpointer
from flame.checkpoints.run import RunCheckpoints
from flame.checkpoints.state import RunState
from flame.config.schema import JobConfig
from flame.data.batch import PackedBatch
from flame.data.loader import PackedLoader
from flame.data.prefetch import Prefetcher
from flame.data.preview import render_sequence
from flame.data.state import DataState
from flame.errors import UserError
from flame.launch import report_mistake
from flame.logging.console import init_logging
from flame.logging.counters import Counters
from flame.objectives.cadence import LossPlan
from flame.objectives.probe import is_probe_step, measure_step
from flame.objectives.step import Requested, compute_losses, get_objective
from flame.optimizers.build import read_rates, seek_schedule
from flame.runtime.agreement import run_on_all, run_on_main
from flame.runtime.distributed import (
    end_processes,
    get_rank,
    get_world_size,
    keep_flight_record,
    leave_at_once,
    set_single_process_defaults,
    start_processes,
)
from flame.runtime.endings import PeerFailure
from flame.runtime.interrupt import raise_on_interrupt
from flame.runtime.sameness import check_same
from flame.runtime.seeds import derive_seed
from flame.runtime.signals import PREEMPTED_EXIT_CODE, StopListener
from flame.runtime.torchtitan import GarbageCollection, clip_grad_norm_
from flame.trainer import dry_run
from flame.trainer.budget import resolve_budget
from flame.trainer.failures import explain_failure
from flame.trainer.finish import finish_run, is_finished, reopen_run, report_outcome
from flame.trainer.first_step import record_first_step
from flame.trainer.guard import StepGuard
from flame.trainer.meters import RunMeters, rewind_records
from flame.trainer.micro_step import Divisors, choose_micro_step
from flame.trainer.options import read_options
from flame.trainer.profiler import Profiler
from flame.trainer.run_record import record_run
from flame.trainer.sameness import describe_inputs, describe_program
from flame.trainer.saved import describe_saved
from flame.trainer.setup import (
    build_cadence,
    build_model,
    build_run_optimizer,
    build_run_schedule,
    build_weight_schedule,
    claim_folder,
    open_evaluator,
    open_inputs,
    open_validator,
)
from flame.trainer.start_report import report_start
from flame.trainer.step_counts import StepCounts, count_over_ranks
from flame.weights.assets import write_hf_assets
from flame.weights.exporter import Exporter
from flame.weights.load import load_initial_weights

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
GARBAGE_STEPS = 50
"""Steps between Python's garbage collections. All ranks collect at the same step, so that none waits for another."""


class Preempted(Exception):
    """A rank was asked to stop, and all ranks have agreed to stop between two steps."""


class DataMistake(Exception):
    """A rank has found a mistake in its data, and all ranks have agreed to end between two steps."""


class Trainer:
    """One rank of a run.

    Args:
        config: checked options.
        is_stop_requested: called before each step. Once it returns True on any rank, all ranks save and end.
    """

    def __init__(self, config: JobConfig, is_stop_requested: Callable[[], bool] = lambda: False):
        self.config = config
        self.is_stop_requested = is_stop_requested
        self.folder = Path(config.job.dump_folder)
        self.rank, self.world_size = get_rank(), get_world_size()
        self.is_main = self.rank == 0
        init_logging(self.is_main)
        inputs = open_inputs(config)
        self.tokenizer, model_config, self.mixture = inputs
        self.source_names = [source.name for source in self.mixture.sources]

        keep_flight_record(self.folder)
        self.device, mesh = start_processes(config.training, config.comm.timeout_seconds)
        check_same(run_on_all(partial(describe_program, config)))
        check_same(run_on_all(partial(describe_inputs, config, inputs)))
        self.lock = claim_folder(self.folder)
        self.model = build_model(config, model_config, self.device, mesh)
        resolve_budget(config, self.model, self.mixture)
        self.objective = get_objective(self.model)
        self.optimizer = build_run_optimizer(config, self.model)
        self.schedule = build_run_schedule(config, self.model, self.optimizer)
        self.micro_step = choose_micro_step(config, self.model, self.device)
        self.loss_plan = LossPlan(build_weight_schedule(config), build_cadence(config))

        self.counters = Counters(tokens_by_source=dict.fromkeys(self.source_names, 0))
        self.data_state = DataState(config.training.num_streams, config.training.seed)
        self.state = RunState(self.counters, self.data_state)
        self.guard = StepGuard(config.training.max_skipped_steps, self.folder, self.model, self.counters, self.device)
        self.checkpointer = Checkpointer(
            config.checkpoint_folder,
            self.model,
            self.optimizer,
            config.checkpoint.keep_latest_k,
            self._write_assets,
            asynchronous=config.checkpoint.async_mode == "async",
        )
        self.checkpoints = RunCheckpoints(config, self.checkpointer, self.state, self.tokenizer, self.mixture)
        self.exporter = Exporter(config.checkpoint, self.folder, config.training.steps, self.checkpointer)
        self.previewed = False
        self.recorded_first_step = False
        self.data_mistake: UserError | None = None

    @property
    def step(self) -> int:
        """Number of optimizer steps done, including the current one."""
        return self.state.step

    # ---------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Train to `training.steps`, from the newest checkpoint if there is one.

        Returns:
            True at the end; False if stopped early on request, after which the same run can resume.
        """
        with closing(self.lock) if self.lock is not None else nullcontext():
            return self._train()

    def _train(self) -> bool:
        self._resume()
        if run_on_main(partial(is_finished, self.config, self.step)):
            end_processes()
            if self.is_main:
                logger.info("nothing is left to do: this run is done")
                report_outcome(self.config, self.step)
                self.exporter.upload_rest()
            return True
        self._open_run()
        is_complete = False
        self._tell_objective(max(self.step, 1))
        try:
            self._validate_when_due()  # the run may have been stopped before it validated this step
            self._evaluate_when_due()
            self.exporter.catch_up(self.checkpoints.saved_step)  # or before it exported it
            self.meters.throughput.restart()  # what came before is no training
            while self.step < self.config.training.steps:
                with self.profiler.watch(self.step + 1, lambda: self.micro_step.graph_bytes):
                    self.train_step()
                self.garbage.run(self.step)
                self._log_when_due()
                self._validate_when_due()
                self._evaluate_when_due()
                self._save_when_due()
                with self.meters.throughput.not_counted():
                    self.exporter.export_when_due(self.step)
            self.checkpointer.wait()
            is_complete = True
        except Preempted:
            self._stop_early()
        except DataMistake:
            self._save_owed()
            run_on_all(self._raise_data_mistake)
        finally:
            self._close_run()
        end_processes()
        if is_complete and self.is_main and not self.config.is_dry_run:
            finish_run(self.config, self.step)
            self.exporter.upload_rest()
        return is_complete

    # ---------------------------------------------------------------- the step

    def train_step(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` packed sequences on each rank.

        Raises:
            Preempted, DataMistake: a rank is asked to stop, or its data are wrong. Nothing has been changed.
        """
        batches = self._next_batches()
        self._tell_objective(self.step + 1)
        weight, marked = self.loss_plan.decide(self.step + 1)
        with record_function("counting over ranks"):
            counts = self._count_over_ranks(batches, marked)
        self.data_state.advance(batches, self.world_size)
        self.state.step += 1
        if not self.recorded_first_step:
            self.recorded_first_step = True
            record_first_step(self.folder, self.step, self.model.lm, batches, self.device)

        self.meters.throughput.begin_launch()
        self.optimizer.zero_grad()
        on_device = [batch.to(self.device, non_blocking=True) for batch in batches]
        prepared = self._prepare_objective(on_device, weight, marked)
        step_loss = torch.zeros((), device=self.device)
        outcomes = []
        divisors = Divisors(counts.labels, counts.aux, weight)
        with_ce = not self.config.experimental.freeze_lm_for_infonce
        replays = self.micro_step.replays
        for batch, has_aux, own in zip(on_device, marked, prepared, strict=True):
            # Dropout depends on the sequence's index alone: it is the same on any number of ranks, and after a resume.
            torch.manual_seed(derive_seed(self.config.training.seed, batch.sequence_index))
            losses, loss = self.micro_step.run(batch, Requested(aux=has_aux, ce=with_ce), own, divisors)
            step_loss += loss
            outcomes.append(losses)
        step_loss, failures = self.guard.reduce(step_loss, outcomes)
        max_norm = self.config.training.max_norm or torch.inf
        with record_function("clipping"):
            grad_norm = clip_grad_norm_(self.model.parameters(), max_norm, foreach=True)
            grad_norm = grad_norm.to(self.device)  # with CPU offload it is on the CPU
        if self.micro_step.makes_graphs:
            self.meters.throughput.count_graphs(self.micro_step.replays - replays, len(batches), self.micro_step.graph_bytes)
        self.meters.throughput.end_launch()

        is_usable = self.guard.should_apply(self.step, step_loss, grad_norm, failures, batches, outcomes)
        if is_usable:
            with record_function("optimizer"):
                self.optimizer.step()
            if self.objective is not None:
                self.objective.after_step(self.model)
            rates = read_rates(self.optimizer)
            self.meters.record_step(outcomes, batches, step_loss, grad_norm, rates, weight, counts)
        self.meters.count_step(self.step, batches, marked, counts, trained=is_usable)
        self.schedule.step()

    def _tell_objective(self, step: int) -> None:
        if self.objective is not None:
            self.objective.begin_step(step, self.config.schedule_steps)

    def _prepare_objective(self, batches: list[PackedBatch], weight: float, marked: list[bool]) -> Sequence[Any]:
        """Run the objective's `prepare_step`, and measure its diagnostics if they are due.

        Args:
            marked: for each packed sequence, whether it has the objective's loss.

        Returns:
            what `compute_losses` needs for each packed sequence.
        """
        if self.objective is None or not any(marked):
            return [None] * len(batches)
        chosen = list(compress(batches, marked))
        prepared = self.objective.prepare_step(self.model, chosen)
        if is_probe_step(self.step, self.config.metrics.diagnostics_interval, self.loss_plan.cadence):
            self.meters.record(measure_step(self.model, chosen[0], self.config.training.seed, weight, prepared[0]))
        own = iter(prepared)
        return [next(own) if has_aux else None for has_aux in marked]

    def _next_batches(self) -> list[PackedBatch]:
        """This rank's packed sequences of the step; empty if it is asked to stop while waiting for them, or if they are wrong."""
        batches: list[PackedBatch] = []
        with self.meters.throughput.waiting_for_data(), record_function("waiting for data"):
            try:
                batches = self.prefetcher.take(self.config.training.gradient_accumulation_steps, self.is_stop_requested) or []
            except UserError as error:
                self.data_mistake = error  # raised when all ranks know of it
        if batches and not self.previewed:
            self.previewed = True
            logger.info("the first packed sequence:\n%s", render_sequence(batches[0], self.tokenizer, PREVIEW_CHARS))
        return batches

    def _count_over_ranks(self, batches: list[PackedBatch], marked: list[bool]) -> StepCounts:
        """Count labels, the objective's items and tokens of the step over all ranks, and add them to the run's totals.

        Raises:
            Preempted, DataMistake: as in `train_step`.
        """
        has_mistake = self.data_mistake is not None
        counts = count_over_ranks(batches, self.objective, marked, self.source_names, self.is_stop_requested(), has_mistake)
        if counts.mistakes:
            raise DataMistake
        if counts.stop_votes:
            raise Preempted
        counts.add_to(self.counters)
        return counts

    # ---------------------------------------------------------------- between steps

    def _log_when_due(self) -> None:
        """Log every `metrics.log_freq` steps, at the end, and before a checkpoint: then a resumed run averages the same steps."""
        is_last = self.step == self.config.training.steps
        if is_last or self.step % self.config.metrics.log_freq == 0 or self.checkpoints.is_due():
            self.meters.log_step(self.step, self.counters)

    def _validate_when_due(self) -> None:
        """Validate every `validation.interval` steps and at the end, once per step.

        Raises:
            Preempted: a rank is asked to stop during validation.
        """
        if self.validator is None or not self._is_due(self.config.validation.interval, self.state.validated_step):
            return
        with self.meters.throughput.not_counted():
            with_aux = self.loss_plan.schedule.find_weight(self.step) > 0
            values = self.validator.run(self.model, with_aux, self.is_stop_requested)
        if values is None:
            raise Preempted
        self.state.validated_step = self.step
        self.meters.log_validation(self.step, values)

    def _evaluate_when_due(self) -> None:
        """Evaluate every `evaluation.interval` steps and at the end, once per step.

        Raises:
            Preempted: a rank is asked to stop during evaluation.
        """
        if self.evaluator is None or not self._is_due(self.config.evaluation.interval, self.state.evaluated_step):
            return
        with self.meters.throughput.not_counted():
            evaluated = self.evaluator.run(self.model, self.is_stop_requested)
        if evaluated is None:
            raise Preempted
        self.state.evaluated_step = self.step
        self.meters.log_evaluation(self.step, evaluated)

    def _is_due(self, interval: int, done_step: int) -> bool:
        """Whether this step is one of those to measure, and has not been measured."""
        return done_step != self.step and (self.step % interval == 0 or self.step == self.config.training.steps)

    def _save_when_due(self) -> None:
        if self.checkpoints.is_due():
            self._save()

    def _save(self) -> None:
        self.meters.sync()
        with self.meters.throughput.not_counted():
            self.checkpoints.save()

    # ---------------------------------------------------------------- start and end

    def _resume(self) -> None:
        """Load the newest checkpoint or, for a new run, the initial weights."""
        is_resumed = self.checkpoints.resume()
        self.data_state.check_units(self.mixture.count_units())
        if is_resumed:
            seek_schedule(self.schedule, self.step)
        elif self.config.checkpoint.initial_load_path:
            lines, self.state.generation = load_initial_weights(
                self.model, self.config.model, self.config.checkpoint, self.tokenizer
            )
            for line in lines:
                logger.info(line)
        if not is_resumed and self.objective is not None:
            self.objective.start_new_run(self.model)
        self.checkpoints.prepare()

    def _write_assets(self, folder: Path) -> None:
        write_hf_assets(self.model.lm.config, self.tokenizer, self.state.generation, folder)

    def _open_run(self) -> None:
        """Open everything that depends on the first step: validation, logs, the loader and its prefetcher."""
        config = self.config
        self.exporter.prepare(self.step)
        self.validator = open_validator(config, self.tokenizer, self.mixture, self.device)
        self.evaluator = open_evaluator(config, self.tokenizer, self.device)
        if self.is_main:
            reopen_run(self.folder)
            record_run(config, self.folder, self.step, self.world_size)
            rewind_records(self.folder, self.step, self.state.validated_step, self.state.evaluated_step)
        dist.barrier()
        self.meters = RunMeters(config, self.model, self.source_names, self.device, self.step, self.state.service_ids)
        self.state.service_ids = self.meters.service_ids
        self.garbage = GarbageCollection(GARBAGE_STEPS)
        self.profiler = Profiler(config.profiling, self.folder, self.rank, range(self.step, config.training.steps))
        loader = PackedLoader(config.training, self.mixture, self.rank, self.world_size, self.data_state)
        self.prefetcher = Prefetcher(loader, config.comm.timeout_seconds, self.rank)
        self.prefetcher.wait_for_all_ranks(self.is_stop_requested)
        report_start(config, self.model, self.mixture, self.validator, self.evaluator, self.device, self.step)

    def _stop_early(self) -> None:
        """Save and log. Saving comes first: little time may be left."""
        self._save_owed()
        self.meters.log_step(self.step, self.counters)
        saved = describe_saved(self.config)
        logger.info("stopped on request after step %d of %d; %s", self.step, self.config.training.steps, saved)

    def _save_owed(self) -> None:
        """Save the current step unless a checkpoint holds it."""
        if self.checkpoints.is_owed():
            self._save()
        with self.meters.throughput.not_counted():
            self.checkpointer.wait()

    def _raise_data_mistake(self) -> None:
        if self.data_mistake is not None:
            raise self.data_mistake

    def _close_run(self) -> None:
        """Close the checkpointer, the prefetcher and the logs."""
        with ExitStack() as ending:  # closes all, even if one raises; the last one named closes first
            ending.callback(self.meters.close)
            ending.callback(self.prefetcher.close)
            ending.callback(self.checkpointer.close)
            ending.callback(self.profiler.close)


def main(argv: list[str]) -> None:
    """Read the options and train. If stopped on request, the process ends with `PREEMPTED_EXIT_CODE`. Ctrl-C ends it at once
    without saving.

    Args:
        argv: command-line arguments; see `bash train.sh --help`.
    """
    config = None
    try:
        set_single_process_defaults()
        config = read_options(argv, get_world_size())
        is_complete = _run(config)
    except Exception as error:
        failure = explain_failure(error, config)
        if failure is None:
            raise
        report_mistake(failure.told)
        if isinstance(failure.told, PeerFailure):
            leave_at_once(failure.exit_code)
        sys.exit(failure.exit_code)
    if not is_complete:
        sys.exit(PREEMPTED_EXIT_CODE)


def _run(config: JobConfig) -> bool:
    """Train like `Trainer.train`. On Ctrl-C, end the process."""
    try:
        raise_on_interrupt()
        with StopListener() as listener:
            if config.is_dry_run:
                return dry_run.run(config, lambda short: Trainer(short, lambda: listener.requested is not None).train())
            return Trainer(config, lambda: listener.requested is not None).train()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends another one
        logger.info("interrupted: %s", describe_saved(config))
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    record(main)(sys.argv[1:])  # torchrun's report then has the traceback of ranks whose output is not shown
