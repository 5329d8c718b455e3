"""Log lines about a run before its first step."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from flame.config.schema import JobConfig
from flame.data.mixture import Mixture
from flame.evaluation.evaluator import Evaluator
from flame.models.config_keys import list_unknown_keys
from flame.models.wrapper import TrainingModel
from flame.objectives.step import get_objective
from flame.runtime.distributed import get_world_size
from flame.trainer.estimate import find_shortage
from flame.trainer.options import list_idle_options
from flame.trainer.setup import build_cadence, build_weight_schedule
from flame.trainer.validation import Validator

logger = logging.getLogger("flame")


def report_start(
    config: JobConfig,
    model: TrainingModel,
    mixture: Mixture,
    validator: Validator | None,
    evaluator: Evaluator | None,
    device: torch.device,
    start_step: int,
) -> None:
    """Log the model, the data, the options without effect, the run's folder and the first step."""
    training, world_size = config.training, get_world_size()
    parameters = sum(parameter.numel() for parameter in model.lm.parameters())
    if config.job.description:
        logger.info(config.job.description)
    logger.info(
        "%s with %.1fM parameters on %d x %s, attention by %s",
        model.lm.config.model_type,
        parameters / 1e6,
        world_size,
        device.type,
        model.describe_attention(),
    )
    schedule, objective = build_weight_schedule(config), get_objective(model)
    if objective is None:
        logger.info("objective: next_token alone")
    else:
        cadence = build_cadence(config)
        first, weight = cadence.find_first(), schedule.loss_weight
        logger.info("objective: %s, loss_weight %s from step %d on%s", objective.name, weight, first, cadence.describe())
        if first > training.steps:
            logger.warning(
                "no step of this run has the objective's loss: the first would be %d, and training.steps = %d; lower "
                "objective.start_step or %s.every",
                first,
                training.steps,
                objective.setup.options.section,
            )
    logger.info("%d tokens a step, from", training.seq_len * training.gradient_accumulation_steps * world_size)
    for line in mixture.describe():
        logger.info("  %s", line)
    for line in mixture.list_shared(training.num_streams):
        logger.warning(line)
    if validator is not None:
        logger.info("validation: %d held-out sequences each %d steps", validator.num_sequences, config.validation.interval)
        for name, read, asked in validator.short_sources:
            logger.warning(
                'validation: %d of %d sequences are of source "%s", whose weight asks for %.0f: its held-out documents are used '
                "up, and the means over all sources count it for less; up to validation.num_sequences = %d all count by their "
                "weights",
                read,
                validator.num_sequences,
                name,
                asked,
                validator.num_even,
            )
        for name in validator.unread_sources:
            logger.warning(
                'validation: none of them is of source "%s", whose held-out documents have fewer than training.seq_len = %d '
                "tokens, or validation.num_sequences = %d leaves it no turn: it gets no validation_ce_loss/%s",
                name,
                training.seq_len,
                config.validation.num_sequences,
                name,
            )
    if evaluator is not None:
        logger.info("evaluation each %d steps", config.evaluation.interval)
        for line in evaluator.describe():
            logger.info("  %s", line)
    source = config.model.config
    if source and not config.start.path and list(Path(source).glob("*.safetensors")):
        logger.warning('model.config = "%s" holds weights; they are not loaded: training starts from training.seed', source)
    if unused := list_idle_options(config):
        logger.info("without effect in this run: %s", ", ".join(unused))
    if unknown := list_unknown_keys(model.lm.config):
        own, names = type(model.lm.config).__name__, ", ".join(unknown)
        logger.info("the model's configuration has keys that %s lacks, and that most likely nothing reads: %s", own, names)
    if schedule.loss_weight and not schedule.reaches_weight():
        logger.warning(
            "the objective's loss_weight = %s is not reached: objective.start_step, warmup_steps and decay_steps leave no step",
            schedule.loss_weight,
        )
    if shortage := find_shortage(config, model, device):
        logger.warning(shortage)
    logger.info("run folder: %s", Path(config.job.dump_folder))
    if start_step:
        logger.info("resumed after step %d of %d", start_step, training.steps)
