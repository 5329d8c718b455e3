"""Train a causal language model that also predicts a summary of its own future.

    bash train.sh --job.config_file configs/quickstart.toml
    NGPU=8 bash train.sh --job.config_file configs/llama_340M.toml --training.steps 20000

`flame.objective.compute_losses` is the method; `Trainer` is what surrounds it, in the order in which it happens.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from flame.checkpoints.checkpoint import Checkpointer, list_checkpoints
from flame.checkpoints.resume_check import check_model, check_resumable, check_sources, check_tokenizer, list_changes
from flame.components.counters import Counters
from flame.components.distributed import (
    check_same_on_all_ranks,
    end_processes,
    get_rank,
    get_world_size,
    set_single_process_defaults,
    start_processes,
    sum_over_ranks,
)
from flame.components.flops import FlopCounter
from flame.components.loggers import (
    METRICS_FILE,
    RunLog,
    drop_lines_after,
    drop_validation,
    format_line,
    format_validation,
    init_logging,
)
from flame.components.metrics import Metrics
from flame.components.preemption import PREEMPTED_EXIT_CODE, StopListener
from flame.components.run_lock import lock_run
from flame.components.run_record import record_run
from flame.components.step_guard import SKIPPED_FILE, StepGuard
from flame.components.throughput import Throughput
from flame.components.titan import GarbageCollection, clip_grad_norm_
from flame.config import JobConfig
from flame.config_reader import read_config
from flame.data.audit import AuditLog, drop_audit_after
from flame.data.batch import PackedBatch
from flame.data.feed import Feed
from flame.data.loader import PackedLoader
from flame.data.mixture import open_held_out, open_mixture
from flame.data.preview import render_sequence
from flame.data.state import DataState, merge_states
from flame.data.tokenizer import fingerprint_tokenizer, load_tokenizer
from flame.errors import UserError
from flame.launch import report_mistake
from flame.model_source import find_model_source, find_tokenizer_source, name_model_option, needs_assets
from flame.models.causal_lm import check_fits_run, load_model_config
from flame.models.custom_model import import_custom_model
from flame.models.future_lm import build_future_lm
from flame.models.future_mask import (  # the two private names are part of this module's interface
    _future_valid_from_cu,
    _segment_ids_from_cu_seqlens,
    build_future_mask_from_cu,
    count_anchors,
)
from flame.models.leak_check import check_no_leak, needs_leak_check
from flame.models.mi_estimator import read_temperature
from flame.models.parallelize import materialize, parallelize
from flame.objective import compute_losses, record_losses
from flame.optimizers.optimizer import build_optimizer, build_schedule, seek_schedule
from flame.utils.plotting import plot_run
from flame.validation import Validator
from flame.weights.exporter import Exporter
from flame.weights.hf_export import convert
from flame.weights.hf_weights import load_initial_weights, resize_vocabulary
from flame.weights.weight_source import fetch_assets

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


class StepCounts(NamedTuple):
    """Totals of one optimizer step over micro-steps and ranks. The losses are divided by them."""

    tokens: int
    labels: int
    anchors: int


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

        if needs_assets(config):
            fetch_assets(config.checkpoint.initial_load_path)
        self.tokenizer = load_tokenizer(find_tokenizer_source(config), config.model.trust_remote_code, config.pathstar.labels)
        self.fingerprint = fingerprint_tokenizer(self.tokenizer)
        import_custom_model(config.experimental.custom_model_path)
        model_config = load_model_config(find_model_source(config), config.model.trust_remote_code, name_model_option(config))
        resize_vocabulary(model_config, len(self.tokenizer), config)
        check_fits_run(model_config, len(self.tokenizer), config)
        self.mixture = open_mixture(config, self.tokenizer)
        self.source_names = [source.name for source in self.mixture.sources]

        self.device, mesh = start_processes(config)
        for source, count in self.mixture.count_units().items():
            check_same_on_all_ranks(f'number of documents in source "{source}"', count)
        self._make_folder()
        self.lock = lock_run(self.folder) if self.is_main else None
        dist.barrier()
        self.model = build_future_lm(config, model_config, self.device.type)
        parallelize(self.model, config, mesh)
        materialize(self.model, self.device, config.training.seed, cpu_offload=config.training.cpu_offload)
        if needs_leak_check(model_config):
            check_no_leak(self.model, self.device, config.uses_future, config.future_encoder.future_k)
        self.flop_counter = FlopCounter(self.model, config)
        self.optimizer = build_optimizer(config, self.model)
        self.schedule = build_schedule(config, self.optimizer)

        self.step = 0
        self.saved_step = 0
        self.validated_step = 0
        self.counters = Counters(tokens_by_source=dict.fromkeys(self.source_names, 0))
        self.guard = StepGuard(config.training, self.folder, self.model, self.counters, self.device)
        self.previewed = False
        self.data_state = DataState(config.training.num_streams, config.training.seed)
        self.checkpointer = Checkpointer(
            self.folder / config.checkpoint.folder,
            self.model,
            self.optimizer,
            config.checkpoint.keep_latest_k,
            self._write_hf_assets,
            asynchronous=config.checkpoint.async_mode == "async",
        )
        self.exporter = Exporter(config, self.checkpointer)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'job.dump_folder = "{self.folder}" cannot be made ({error.strerror}): choose another') from error

    # ---------------------------------------------------------------- the run

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
            self.exporter.export_when_due(self.saved_step, again=False)  # likewise its model
            while self.step < self.config.training.steps:
                self.train_step()
                self.garbage.run(self.step)
                self._log_when_due()
                self._validate_when_due()
                self._save_when_due()
                with self.throughput.not_counted():
                    self.exporter.export_when_due(self.step)
            self.checkpointer.wait()
            is_finished = True
        except Preempted:
            self._stop_early()
        finally:
            self._close_run()
        end_processes()
        if is_finished and self.is_main:
            self._finish()
        return is_finished

    def train_step(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` packed batches on each rank.

        Raises:
            Preempted: before anything is done, if a rank is asked to stop.
        """
        batches = self._next_batches()
        counts = self._count_over_ranks(batches)
        self.data_state.advance(batches, self.world_size)
        self.step += 1
        weight = self.future_weight()

        self.optimizer.zero_grad()
        step_loss = torch.zeros((), device=self.device)
        outcomes = []
        for batch in batches:
            self._seed_dropout(batch)
            losses = self.model(compute_losses, batch.to(self.device, non_blocking=True), self.config, weight > 0)
            loss = torch.zeros((), device=self.device)
            if losses.ce_sum is not None:
                loss = loss + losses.ce_sum / max(counts.labels, 1)
            if losses.contrast is not None:
                loss = loss + weight * losses.contrast.loss_sum / max(counts.anchors, 1)
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
            for losses, batch in zip(outcomes, batches, strict=True):
                record_losses(self.metrics, losses, batch, self.source_names)
            self._record_step(step_loss, grad_norm, weight, counts)
        if self.audit is not None:
            self.audit.record(self.step, batches, trained=is_usable)
        self._count_step(batches, weight, counts)
        self.schedule.step()

    def future_weight(self) -> float:
        """Factor of the future loss at the current step: 0 before `start_step`, then linear warm-up to `loss_weight`."""
        future = self.config.future_encoder
        if not self.config.uses_future or self.step < future.start_step:
            return 0.0
        steps_in = self.step - max(future.start_step, 1) + 1
        return future.loss_weight * min(1.0, steps_in / max(future.warmup_steps, 1))

    # ---------------------------------------------------------------- parts of a step

    def _next_batches(self) -> list[PackedBatch]:
        """This rank's batches; none if it is asked to stop while it waits for them."""
        with self.throughput.waiting_for_data():
            batches = self.feed.take(self.config.training.gradient_accumulation_steps, self.is_stop_requested) or []
        if batches and not self.previewed:
            self.previewed = True
            logger.info("the first packed sequence:\n%s", render_sequence(batches[0], self.tokenizer, PREVIEW_CHARS))
        return batches

    def _count_over_ranks(self, batches: list[PackedBatch]) -> StepCounts:
        """What this step is averaged over, and the run's totals. Counted on the CPU: it does not wait for the GPU.

        Raises:
            Preempted: a rank is asked to stop. Nothing has been counted.
        """
        future = self.config.future_encoder
        by_source = [sum(batch.input_ids.numel() for batch in batches if batch.source == name) for name in self.source_names]
        stop_votes, labels, anchors, bad_rows, *tokens = sum_over_ranks(
            self.is_stop_requested(),
            sum(batch.num_labels for batch in batches),
            sum(
                count_anchors(batch.cu_seqlens, future.target_shift, future.max_anchors, batch.piece_labels) for batch in batches
            ),
            sum(batch.bad_rows for batch in batches),
            *by_source,
        )
        if stop_votes:
            raise Preempted
        for name, count in zip(self.source_names, tokens, strict=True):
            self.counters.tokens_by_source[name] += count
        self.counters.tokens_seen += sum(tokens)
        self.counters.bad_rows += bad_rows
        return StepCounts(sum(tokens), labels, anchors)

    def _seed_dropout(self, batch: PackedBatch) -> None:
        """Dropout depends on the seed and on which sequence this is: the same on any number of ranks, and after a resume."""
        torch.manual_seed((self.config.training.seed << 32) + batch.sequence_index)

    # ---------------------------------------------------------------- metrics and validation

    def _record_step(self, loss: Tensor, grad_norm: Tensor, weight: float, counts: StepCounts) -> None:
        self.metrics.record_mean("loss", loss, 1)
        self.metrics.record_mean("grad_norm", grad_norm, 1)
        self.metrics.record_last("lr", self.optimizer.optimizers[0].param_groups[0]["lr"])
        if weight > 0:
            self.metrics.record_mean("anchors", counts.anchors, 1)
            self.metrics.record_last("loss_weight", weight)

    def _count_step(self, batches: list[PackedBatch], weight: float, counts: StepCounts) -> None:
        self.throughput.count_step(counts.tokens)
        for batch in batches:
            labels = batch.piece_labels if self.config.training.loss_on == "answer" else None
            self.throughput.count_flops(self.flop_counter.count(batch.cu_seqlens, weight > 0, labels))

    def _log_when_due(self) -> None:
        """Log every `metrics.log_freq` steps, at the end, and before a checkpoint: a resumed run averages the same steps."""
        is_last = self.step == self.config.training.steps
        if is_last or self.step % self.config.metrics.log_freq == 0 or self._is_save_due():
            self._log_step()

    def _log_step(self) -> None:
        if self.model.estimator is not None and self.model.estimator.log_temperature is not None:
            self.metrics.record_last("temperature", read_temperature(self.model.estimator))
        self.throughput.record()
        values = self.metrics.collect()
        seconds_left = self.throughput.summarize(values)
        values |= self.counters.flatten()
        self.run_log.log(self.step, values)
        logger.info(format_line(self.step, self.config.training.steps, values, seconds_left))
        self.logged_step = self.step

    def _validate_when_due(self) -> None:
        """Validate every `validation.interval` steps and at the end, once.

        Raises:
            Preempted: a rank is asked to stop meanwhile.
        """
        interval, is_last = self.config.validation.interval, self.step == self.config.training.steps
        if self.validator is None or self.validated_step == self.step or not (self.step % interval == 0 or is_last):
            return
        with self.throughput.not_counted():
            values = self.validator.run(self.model, self.future_weight() > 0, self.is_stop_requested)
        if values is None:
            raise Preempted
        self.validated_step = self.step
        self.run_log.log(self.step, values)
        logger.info(format_validation(self.step, self.config.training.steps, values))

    # ---------------------------------------------------------------- checkpoints, start and end

    def _is_save_due(self) -> bool:
        checkpoint = self.config.checkpoint
        return checkpoint.enable_checkpoint and (self.step % checkpoint.interval == 0 or self.step == self.config.training.steps)

    def _save_when_due(self) -> None:
        if self._is_save_due():
            self._save()

    def _save(self) -> None:
        states: list[DataState | None] = [None] * self.world_size
        dist.all_gather_object(states, self.data_state)
        trainer_state = {
            "step": self.step,
            "validated_step": self.validated_step,
            "counters": dataclasses.asdict(self.counters),
            "data": merge_states([state for state in states if state is not None]).state_dict(),
            "wandb_id": self.run_log.wandb_id,
            "config": dataclasses.asdict(self.config),
            "model_config": self.model.lm.config.to_dict(),
            "tokenizer_fingerprint": self.fingerprint,
        }
        self.run_log.sync()
        if self.audit is not None:
            self.audit.sync()
        with self.throughput.not_counted():
            self.checkpointer.save(self.step, trainer_state)
        self.saved_step = self.step

    def _check_resumable(self, state: dict[str, Any]) -> None:
        check_resumable(state["config"], self.config)
        check_model(state["model_config"], self.model.lm.config.to_dict())
        check_tokenizer(state["tokenizer_fingerprint"], self.fingerprint)
        check_sources(list(state["data"]["sources"]), self.source_names)

    def _resume(self) -> str | None:
        """Take over the newest checkpoint, if there is one. Returns the identity of the run at Weights & Biases."""
        config = self.config
        if not config.checkpoint.enable_checkpoint:
            if list_checkpoints(self.checkpointer.folder):
                raise UserError(
                    f'job.dump_folder = "{self.folder}" holds a run with checkpoints, but checkpoint.enable_checkpoint = false '
                    "would start over in it: choose another folder"
                )
            self._load_initial_weights()
            return None
        state = self.checkpointer.load_latest(self._check_resumable)
        if state is not None:
            self.step = self.saved_step = state["step"]
            if self.step > config.training.steps:
                raise UserError(
                    f"training.steps = {config.training.steps}, but the run in {self.folder} is at step {self.step} already: "
                    "raise it, or start a new run in another job.dump_folder"
                )
            self.validated_step = state["validated_step"]
            self.counters.load(state["counters"])
            self.data_state.load_state_dict(state["data"])
            seek_schedule(self.schedule, self.step)
            for change in self._list_changes(state) if self.is_main else ():
                logger.warning("changed since the checkpoint: %s", change)
        self.data_state.check_units(self.mixture.count_units())
        if state is None:
            self._load_initial_weights()
        if self.step < config.training.steps:
            self.checkpointer.prepare()
        return state["wandb_id"] if state is not None else None

    def _load_initial_weights(self) -> None:
        if self.config.checkpoint.initial_load_path:
            for line in load_initial_weights(self.model, self.config, self.tokenizer):
                logger.info(line)

    def _list_changes(self, state: dict[str, Any]) -> list[str]:
        changes = list_changes(state["config"], self.config)
        new = [name for name in self.source_names if name not in state["data"]["sources"]]
        changes += [f'source "{name}" is new and begins at its first document' for name in new]
        if state["world_size"] != self.world_size:
            changes.append(f"ranks: {state['world_size']} -> {self.world_size}")
        return changes

    def _open_run(self, wandb_id: str | None) -> None:
        """Everything that starts at the step the run starts from."""
        config, start_step = self.config, self.step
        self.validator = None
        if config.validation.interval:
            held_out = open_held_out(config, self.tokenizer, self.mixture)
            self.validator = Validator(config, held_out, self.rank, self.world_size, self.device)
        if self.is_main:
            record_run(config, self.folder, start_step, self.world_size)
            drop_audit_after(self.folder, start_step)
            drop_lines_after(self.folder / SKIPPED_FILE, start_step)
            if self.validated_step < start_step:  # a validation of this step, from an earlier process, is to be made again
                drop_validation(self.folder / METRICS_FILE, start_step)
        dist.barrier()
        self.metrics = Metrics(self.device)
        self.run_log = RunLog(config, self.folder, self.is_main, start_step, dataclasses.asdict(config), wandb_id)
        self.audit = AuditLog(self.folder, self.rank) if config.training.audit else None
        self.throughput = Throughput(self.metrics, self.device, self.world_size, config.training.steps - start_step)
        self.garbage = GarbageCollection(config.training.gc_freq)
        loader = PackedLoader(config.training, self.mixture, self.rank, self.world_size, self.data_state)
        self.feed = Feed(loader, config.comm.timeout_seconds, self.rank)
        self.logged_step = start_step
        self._announce()

    def _announce(self) -> None:
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.model.lm.parameters())
        if config.job.description:
            logger.info(config.job.description)
        logger.info(
            "%s with %.1fM parameters on %d x %s, attention by %s",
            self.model.lm.config.model_type,
            parameters / 1e6,
            self.world_size,
            self.device.type,
            self.model.describe_attention(),
        )
        tokens = config.training.seq_len * config.training.gradient_accumulation_steps * self.world_size
        logger.info("%d tokens a step, from", tokens)
        for line in self.mixture.describe():
            logger.info("  %s", line)
        if self.validator is not None:
            logger.info(
                "validation: %d held-out sequences each %d steps", self.validator.num_sequences, config.validation.interval
            )
        source = self.config.model.config
        if not self.config.checkpoint.initial_load_path and list(Path(source).glob("*.safetensors")):
            logger.warning('model.config = "%s" holds weights; they are not loaded: training starts from training.seed', source)
        logger.info("run folder: %s", self.folder)
        if self.step:
            logger.info("resumed after step %d of %d", self.step, config.training.steps)

    def _stop_early(self) -> None:
        """Save what has been done, if no checkpoint holds it yet. Nothing else comes before that."""
        if self.config.checkpoint.enable_checkpoint and self.step > self.saved_step:
            self._save()
        self.checkpointer.wait()
        if self.step > self.logged_step:
            self._log_step()
        where = (
            "the same command goes on" if self.config.checkpoint.enable_checkpoint else "nothing is saved: checkpoints are off"
        )
        logger.info("stopped on request after step %d of %d; %s", self.step, self.config.training.steps, where)

    def _close_run(self) -> None:
        """End what runs beside the training."""
        with ExitStack() as ending:  # one that fails keeps none of the others from it; the last named is the first
            ending.callback(self.run_log.close)
            ending.callback(self.feed.close)
            if self.audit is not None:
                ending.callback(self.audit.close)
            ending.callback(self.checkpointer.close)

    def _finish(self) -> None:
        """Export, draw, and say where everything is. Only on rank 0, and nobody waits for it."""
        config = self.config
        logger.info("done: step %d of %d", self.step, config.training.steps)
        if config.checkpoint.enable_checkpoint:
            newest = self.checkpointer.folder / f"step-{self.step}"
            logger.info("  checkpoint   %s", newest)
            if config.checkpoint.export_hf:
                exported = self.folder / "hf"
                convert(newest, exported, config.checkpoint.export_dtype)
                logger.info('  model        %s  (AutoModelForCausalLM.from_pretrained("%s"))', exported, exported)
        logger.info("  metrics      %s", self.folder / METRICS_FILE)
        logger.info("  curves       %s", plot_run(self.folder))

    def _write_hf_assets(self, folder: Path) -> None:
        """The model's configuration, with the tokenizer's special tokens: generation stops where training ended documents."""
        model_config = copy.deepcopy(self.model.lm.config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model_config, name, getattr(self.tokenizer, name))
        model_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def main(argv: list[str]) -> None:
    """Read the options and train. Ends the process with `PREEMPTED_EXIT_CODE` when the run was stopped on request, and at once,
    unsaved, on Ctrl-C.

    Args:
        argv: command-line arguments; see `bash train.sh --help`.
    """
    set_single_process_defaults()
    try:
        config = read_config(argv, get_world_size())
        with StopListener() as listener:
            is_finished = Trainer(config, lambda: listener.requested is not None).train()
    except UserError as error:
        report_mistake(error)
        sys.exit(error.EXIT_CODE)
    except KeyboardInterrupt:
        logger.info("interrupted: the same command goes on from the last checkpoint")
        sys.exit(128 + signal.SIGINT)
    if not is_finished:
        sys.exit(PREEMPTED_EXIT_CODE)


if __name__ == "__main__":
    record(main)(sys.argv[1:])  # puts the traceback of a rank whose output is not shown into torchrun's report
