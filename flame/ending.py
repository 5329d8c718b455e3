"""What is made of a run that is done."""

from __future__ import annotations

import logging
from pathlib import Path

from flame.components.loggers import METRICS_FILE
from flame.config import JobConfig
from flame.errors import UserError
from flame.utils.plotting import plot_run
from flame.weights.hf_export import convert

logger = logging.getLogger("flame")


def finish_run(config: JobConfig, step: int) -> None:
    """Export the model of the last checkpoint, draw the curves, and say where everything is. Rank 0 calls it, alone."""
    folder = Path(config.job.dump_folder)
    logger.info("done: step %d of %d", step, config.training.steps)
    if config.checkpoint.enable_checkpoint:
        newest = folder / config.checkpoint.folder / f"step-{step}"
        logger.info("  checkpoint   %s", newest)
        if config.checkpoint.export_hf:
            exported = folder / "hf"
            convert(newest, exported, config.checkpoint.export_dtype)
            logger.info('  model        %s  (AutoModelForCausalLM.from_pretrained("%s"))', exported, exported)
    logger.info("  metrics      %s", folder / METRICS_FILE)
    try:
        logger.info("  curves       %s", plot_run(folder))
    except UserError as error:  # nothing that could be drawn is no fault of a run that is done
        logger.info("  curves       none: %s", error)
