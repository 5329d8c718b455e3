"""Train a causal language model that also predicts a summary of its own future.

    bash train.sh --job.config_file configs/quickstart.toml
    NGPU=8 bash train.sh --job.config_file configs/llama_340M.toml --training.steps 20000

`compute_losses` is the method; `Trainer` is what surrounds it, in the order in which it happens.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from flame.components.checkpoint import Checkpointer, check_resumable, list_checkpoints
from flame.components.distributed import (
    check_same_on_all_ranks,
    get_rank,
    get_world_size,
    set_single_process_defaults,
    start_processes,
    sum_over_ranks,
)
from flame.components.flops import FlopCounter
from flame.components.loggers import METRICS_FILE, RunLog, format_line, init_logging
from flame.components.metrics import Metrics
from flame.components.optimizer import build_optimizer, build_schedule, seek_schedule
from flame.components.run_record import record_run
from flame.components.throughput import Throughput
from flame.components.titan import GarbageCollection, clip_grad_norm_
from flame.config import JobConfig
from flame.config_reader import read_config
from flame.data.batch import PackedBatch
from flame.data.loader import PackedLoader
from flame.data.preview import render_sequence
from flame.data.sources import open_source
from flame.data.state import DataState, merge_states
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from flame.launch import report_mistake
from flame.models.causal_lm import check_fits_run, load_model_config
from flame.models.future_lm import FutureLM, build_future_lm
from flame.models.future_mask import (  # the two private names are part of this module's interface
    _future_valid_from_cu,
    _segment_ids_from_cu_seqlens,
    build_future_mask_from_cu,
    count_anchors,
    find_anchors,
)
from flame.models.losses import linear_cross_entropy
from flame.models.mi_estimator import Contrast, read_temperature
from flame.models.parallelize import materialize, parallelize
from flame.utils.convert_dcp_to_hf import convert
from flame.utils.plotting import plot_run

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


class Losses(NamedTuple):
    """Sums over one packed batch, to be divided by global counts; None where not computed."""

    ce_sum: Tensor | None
    contrast: Contrast | None


def compute_losses(model: FutureLM, batch: PackedBatch, config: JobConfig, with_future: bool) -> Losses:
    """Both forwards and both losses of one packed batch of T tokens. Run it as `model(compute_losses, ...)`."""
    future, frozen = config.future_encoder, config.experimental.freeze_lm_for_infonce

    # 1. Causal forward: hidden states h [T, d], and next-token cross entropy from them.
    hidden_states = model.encode_past(batch)
    ce_sum = None if frozen else linear_cross_entropy(hidden_states, model.output_embedding, batch.labels[0])
    if not with_future:
        return Losses(ce_sum, None)

    # 2. Anti-causal forward of the same network: summaries F [T, d] of each position's future. Labels: no gradient, no logits.
    with torch.no_grad():
        summaries = model.encode_future(batch, future.future_k).detach()

    # 3. Position t guesses F at t + target_shift; the summaries of all other anchors are the negatives.
    assert model.predictor is not None and model.estimator is not None
    anchors = find_anchors(batch.segment_ids[0], future.target_shift)
    targets = summaries.roll(-future.target_shift, dims=0)
    contrast = model.estimator.contrast(model.predictor(hidden_states), targets, anchors)
    return Losses(ce_sum, contrast)


class StepCounts(NamedTuple):
    """Totals of one optimizer step over micro-steps and ranks. The losses are divided by them."""

    tokens: int
    labels: int
    anchors: int


@dataclasses.dataclass
class Counters:
    """Totals of the run so far, over all ranks. They are logged, and live in the checkpoint."""

    tokens_seen: int = 0
    bad_rows: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class Trainer:
    """One run, on one process.

    Args:
        config: checked options.
    """

    def __init__(self, config: JobConfig):
        self.config = config
        self.folder = Path(config.job.dump_folder)
        self.rank, self.world_size = get_rank(), get_world_size()
        self.is_main = self.rank == 0
        init_logging(self.is_main)

        self.tokenizer = load_tokenizer(config.model.tokenizer_path)
        model_config = load_model_config(config.model.config)
        check_fits_run(model_config, len(self.tokenizer), config)
        self.source = open_source(config.training)

        self.device, mesh = start_processes(config)
        check_same_on_all_ranks("number of documents", len(self.source))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = build_future_lm(config, model_config, self.device.type)
        parallelize(self.model, config, mesh)
        materialize(self.model, self.device, config.training.seed)
        self.flop_counter = FlopCounter(self.model, config)
        self.optimizer = build_optimizer(config, self.model)
        self.schedule = build_schedule(config, self.optimizer)

        self.step = 0
        self.counters = Counters()
        self.previewed = False
        self.data_state = DataState(config.training.num_streams, config.training.seed)
        self.checkpointer = Checkpointer(
            self.folder / config.checkpoint.folder,
            self.model,
            self.optimizer,
            config.checkpoint.keep_latest_k,
            self._write_hf_assets,
        )

    # ---------------------------------------------------------------- the run

    def train(self) -> None:
        """Train to `training.steps`, from the newest checkpoint if there is one."""
        self._resume()
        self._open_run()
        try:
            while self.step < self.config.training.steps:
                self.step += 1
                self.train_step()
                self.garbage.run(self.step)
                self._log_when_due()
                self._save_when_due()
        finally:
            self.run_log.close()
            self.loader.close()
        self._finish()

    def train_step(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` packed batches on each rank."""
        batches = self._next_batches()
        weight = self.future_weight()
        counts = self._count_over_ranks(batches)

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
        grad_norm = clip_grad_norm_(self.model.parameters(), self.config.training.max_norm, foreach=True)
        dist.all_reduce(step_loss)

        if self._is_usable(step_loss, grad_norm, batches):
            self.optimizer.step()
            if self.model.estimator is not None:
                self.model.estimator.limit_temperature()
            self._record_losses(outcomes, batches)
            self._record_step(step_loss, grad_norm, weight, counts)
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
        with self.throughput.waiting_for_data():
            batches = [next(self.loader) for _ in range(self.config.training.gradient_accumulation_steps)]
        if not self.previewed:
            self.previewed = True
            logger.info("the first packed sequence:\n%s", render_sequence(batches[0], self.tokenizer, PREVIEW_CHARS))
        return batches

    def _count_over_ranks(self, batches: list[PackedBatch]) -> StepCounts:
        """What this step is averaged over, and the run's totals. Counted on the CPU: it does not wait for the GPU."""
        shift = self.config.future_encoder.target_shift
        tokens, labels, anchors, bad_rows = sum_over_ranks(
            sum(batch.input_ids.numel() for batch in batches),
            sum(batch.num_labels for batch in batches),
            sum(count_anchors(batch.cu_seqlens, shift) for batch in batches),
            sum(batch.bad_rows for batch in batches),
        )
        self.counters.tokens_seen += tokens
        self.counters.bad_rows += bad_rows
        return StepCounts(tokens, labels, anchors)

    def _seed_dropout(self, batch: PackedBatch) -> None:
        """Dropout depends on the seed and on which sequence this is: the same on any number of ranks, and after a resume."""
        torch.manual_seed((self.config.training.seed << 32) + batch.sequence_index)

    def _is_usable(self, loss: Tensor, grad_norm: Tensor, batches: list[PackedBatch]) -> bool:
        """Whether to apply this step. Loss and norm are global, so all ranks agree.

        Raises:
            UserError: they are not finite and skipping is off, or has happened too often in a row.
        """
        if bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
            self.counters.skipped_in_a_row = 0
            return True
        self.counters.skipped_steps += 1
        self.counters.skipped_in_a_row += 1
        last = self.data_state.next_sequence - 1
        first = last + 1 - len(batches) * self.world_size
        what = f"step {self.step} (sequences {first} to {last}): loss {loss.item():g}, gradient norm {grad_norm.item():g}"
        if not self.config.training.skip_nan_inf:
            raise UserError(f"{what}: stopped, since training.skip_nan_inf = false")
        if self.counters.skipped_in_a_row >= self.config.training.max_skipped_steps:
            limit = self.config.training.max_skipped_steps
            raise UserError(f"{what}: stopped, the last of training.max_skipped_steps = {limit} such steps in a row")
        if self.is_main:
            logger.warning("%s: step skipped", what)
        return False

    # ---------------------------------------------------------------- metrics

    def _record_losses(self, outcomes: list[Losses], batches: list[PackedBatch]) -> None:
        for (ce_sum, contrast), batch in zip(outcomes, batches, strict=True):
            if ce_sum is not None:
                self.metrics.record_mean("ce_loss", ce_sum, batch.num_labels)
            if contrast is None:
                continue
            self.metrics.record_mean("aux_loss", contrast.loss_sum, contrast.num_anchors)
            self.metrics.record_mean("mi_lower_bound", contrast.mi_sum, contrast.num_anchors)
            self.metrics.record_mean("infonce_accuracy", contrast.correct, contrast.num_anchors)
            self.metrics.record_mean("positive_cosine", contrast.positive_cosine_sum, contrast.num_anchors)
            self.metrics.record_mean("negative_cosine", contrast.negative_cosine_sum, contrast.num_anchors)

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
            self.throughput.count_flops(self.flop_counter.count(batch.cu_seqlens, with_future=weight > 0))

    def _log_when_due(self) -> None:
        """Log every `metrics.log_freq` steps, at the end, and before a checkpoint: a resumed run averages the same steps."""
        is_last = self.step == self.config.training.steps
        if self.step % self.config.metrics.log_freq and not is_last and not self._is_save_due():
            return
        if self.model.estimator is not None and self.model.estimator.log_temperature is not None:
            self.metrics.record_last("temperature", read_temperature(self.model.estimator))
        self.throughput.record()
        values = self.metrics.collect()
        seconds_left = self.throughput.summarize(values)
        values |= dataclasses.asdict(self.counters)
        self.run_log.log(self.step, values)
        logger.info(format_line(self.step, self.config.training.steps, values, seconds_left))

    # ---------------------------------------------------------------- checkpoints, start and end

    def _is_save_due(self) -> bool:
        checkpoint = self.config.checkpoint
        return checkpoint.enable_checkpoint and (self.step % checkpoint.interval == 0 or self.step == self.config.training.steps)

    def _save_when_due(self) -> None:
        if self._is_save_due():
            states: list[DataState | None] = [None] * self.world_size
            dist.all_gather_object(states, self.data_state)
            trainer_state = {
                "step": self.step,
                "counters": dataclasses.asdict(self.counters),
                "data": merge_states([state for state in states if state is not None]).state_dict(),
                "config": dataclasses.asdict(self.config),
            }
            self.checkpointer.save(self.step, trainer_state)
            self.throughput.restart()

    def _resume(self) -> None:
        config = self.config
        if not config.checkpoint.enable_checkpoint:
            if list_checkpoints(self.checkpointer.folder):
                raise UserError(
                    f'job.dump_folder = "{self.folder}" holds a run with checkpoints, but checkpoint.enable_checkpoint = false '
                    "would start over in it: choose another folder"
                )
            return
        state = self.checkpointer.load_latest(lambda saved: check_resumable(saved, config))
        if state is not None:
            self.step = state["step"]
            if self.step > config.training.steps:
                raise UserError(
                    f"training.steps = {config.training.steps}, but the run in {self.folder} is at step {self.step} already: "
                    "raise it, or start a new run in another job.dump_folder"
                )
            self.counters = Counters(**state["counters"])
            self.data_state.load_state_dict(state["data"])
            self.data_state.check_documents(self.source.name, len(self.source))
            seek_schedule(self.schedule, self.step)

    def _open_run(self) -> None:
        """Everything that starts at the step the run starts from."""
        config, start_step = self.config, self.step
        if self.is_main:
            record_run(config, self.folder, start_step, self.world_size)
        self.metrics = Metrics(self.device)
        self.run_log = RunLog(config, self.folder, self.is_main, start_step, dataclasses.asdict(config))
        self.throughput = Throughput(self.metrics, self.device, self.world_size, config.training.steps - start_step)
        self.garbage = GarbageCollection(config.training.gc_freq)
        self.loader = PackedLoader(config.training, self.source, self.tokenizer, self.rank, self.world_size, self.data_state)
        self._announce()

    def _announce(self) -> None:
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.model.lm.parameters())
        if config.job.description:
            logger.info(config.job.description)
        logger.info(
            "%s with %.1fM parameters on %d x %s",
            self.model.lm.config.model_type,
            parameters / 1e6,
            self.world_size,
            self.device.type,
        )
        tokens = config.training.seq_len * config.training.gradient_accumulation_steps * self.world_size
        logger.info("%s: %d documents; %d tokens a step", self.source.name, len(self.source), tokens)
        source = self.config.model.config
        if list(Path(source).glob("*.safetensors")):
            logger.warning('model.config = "%s" holds weights; they are not loaded: training starts from training.seed', source)
        logger.info("run folder: %s", self.folder)
        if self.step:
            logger.info("resumed after step %d of %d", self.step, config.training.steps)

    def _finish(self) -> None:
        """Export, draw, and say where everything is. Only rank 0 has work, and nobody waits for it."""
        config = self.config
        dist.barrier()
        dist.destroy_process_group()
        if not self.is_main:
            return
        logger.info("done: step %d of %d", self.step, config.training.steps)
        if config.checkpoint.enable_checkpoint:
            newest = list_checkpoints(self.checkpointer.folder)[-1]
            logger.info("  checkpoint   %s", newest)
            if config.checkpoint.export_hf:
                exported = self.folder / "hf"
                convert(newest, exported)
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
    """Read the options and train.

    Args:
        argv: command-line arguments; see `bash train.sh --help`.
    """
    set_single_process_defaults()
    try:
        config = read_config(argv, get_world_size())
        Trainer(config).train()
    except UserError as error:
        report_mistake(error)
        sys.exit(error.EXIT_CODE)


if __name__ == "__main__":
    record(main)(sys.argv[1:])  # puts the traceback of a rank whose output is not shown into torchrun's report
