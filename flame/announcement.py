"""What a run says of itself before its first step."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from flame.components.distributed import get_world_size
from flame.config import JobConfig
from flame.data.mixture import Mixture
from flame.loss_schedule import reaches_loss_weight
from flame.models.config_keys import list_unknown_keys
from flame.models.future_lm import FutureLM
from flame.unused_options import list_unused
from flame.validation import Validator

logger = logging.getLogger("flame")


def announce(
    config: JobConfig, model: FutureLM, mixture: Mixture, validator: Validator | None, device: torch.device, start_step: int
) -> None:
    """Log what is trained, on what, where and from which step on."""
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
    logger.info("%d tokens a step, from", training.seq_len * training.gradient_accumulation_steps * world_size)
    for line in mixture.describe():
        logger.info("  %s", line)
    if validator is not None:
        logger.info("validation: %d held-out sequences each %d steps", validator.num_sequences, config.validation.interval)
        for name in validator.unread_sources:
            logger.warning(
                'validation: none of them is of source "%s", whose held-out documents have fewer than training.seq_len = %d '
                "tokens, or validation.num_sequences = %d leaves it no turn: it gets no validation_ce_loss/%s",
                name,
                training.seq_len,
                config.validation.num_sequences,
                name,
            )
    source = config.model.config
    if not config.checkpoint.initial_load_path and list(Path(source).glob("*.safetensors")):
        logger.warning('model.config = "%s" holds weights; they are not loaded: training starts from training.seed', source)
    if unused := list_unused(config):
        logger.info("without effect in this run: %s", ", ".join(unused))
    if unknown := list_unknown_keys(model.lm.config):
        own, names = type(model.lm.config).__name__, ", ".join(unknown)
        logger.info("the model's configuration has keys that %s lacks, and that most likely nothing reads: %s", own, names)
    if config.uses_future and not reaches_loss_weight(config):
        weight = config.future_encoder.loss_weight
        logger.warning("future_encoder.loss_weight = %s is not reached: warm-up and decay leave no step between", weight)
    logger.info("run folder: %s", Path(config.job.dump_folder))
    if start_step:
        logger.info("resumed after step %d of %d", start_step, training.steps)
