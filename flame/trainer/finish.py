"""Finishes a run: exports the model, plots the curves, and notes that nothing is left to do."""

from __future__ import annotations

import json
import logging
from hashlib import sha256
from pathlib import Path

from flame.checkpoints.manifest import TRAINER_FILE
from flame.checkpoints.storage import METADATA_FILE
from flame.config.run import CURVES_FILE
from flame.config.schema import JobConfig
from flame.errors import MachineFault, UserError, give_reason
from flame.logging.writers.json_lines import METRICS_FILE
from flame.weights.export import convert

FINISHED_FILE = "finished.json"
HF_FOLDER = "hf"

logger = logging.getLogger("flame")


def is_finished(config: JobConfig, step: int) -> bool:
    """Whether an earlier process brought the run to this step, its last, and did with it what the options ask for."""
    folder = Path(config.job.dump_folder)
    if step < config.training.steps or not step:
        return False
    try:
        note = json.loads((folder / FINISHED_FILE).read_text(encoding="utf-8"))
        return note == _describe_outcome(config, step) and (not _exports(config) or (folder / HF_FOLDER).is_dir())
    except (OSError, ValueError):
        return False


def reopen_run(folder: Path) -> None:
    """Note that something is left to do."""
    (folder / FINISHED_FILE).unlink(missing_ok=True)


def finish_run(config: JobConfig, step: int) -> None:
    """Export the model of the last checkpoint, plot the curves, and log where everything is. Only rank 0 calls it.

    Raises:
        MachineFault: the last checkpoint or the metrics have been deleted meanwhile.
    """
    folder = Path(config.job.dump_folder)
    wanted = [folder / METRICS_FILE]
    if config.checkpoint.enable_checkpoint:
        wanted += [config.checkpoint_folder / f"step-{step}" / name for name in (METADATA_FILE, TRAINER_FILE)]
    if gone := [path for path in wanted if not path.exists()]:
        raise MachineFault(f'"{gone[0]}" was deleted while the run was going on: the same command makes again what is lost')
    if _exports(config):
        convert(config.checkpoint_folder / f"step-{step}", folder / HF_FOLDER, config.checkpoint.export_dtype)
    # Imported here, since it brings matplotlib, for which a start would wait.
    from flame.logging.plots import plot_run

    try:
        plot_run(folder)
    except UserError as error:  # a finished run without anything to plot has not failed
        logger.info("no curves: %s", error)
    except Exception as error:  # matplotlib's, of any type: the run is done without a picture
        logger.warning("no curves: they could not be drawn (%s)", give_reason(error))
    if config.checkpoint.enable_checkpoint:
        (folder / FINISHED_FILE).write_text(json.dumps(_describe_outcome(config, step)) + "\n", encoding="utf-8")
    report_outcome(config, step)


def report_outcome(config: JobConfig, step: int) -> None:
    """Log where checkpoint, model, metrics and curves are."""
    folder = Path(config.job.dump_folder)
    exported = folder / HF_FOLDER
    logger.info("done: step %d of %d", step, config.training.steps)
    if config.checkpoint.enable_checkpoint:
        logger.info("  checkpoint   %s", config.checkpoint_folder / f"step-{step}")
    if _exports(config):
        logger.info('  model        %s  (AutoModelForCausalLM.from_pretrained("%s"))', exported, exported)
    logger.info("  metrics      %s", folder / METRICS_FILE)
    if (folder / CURVES_FILE).exists():
        logger.info("  curves       %s", folder / CURVES_FILE)


def _exports(config: JobConfig) -> bool:
    return config.checkpoint.enable_checkpoint and config.checkpoint.export_hf


def _describe_outcome(config: JobConfig, step: int) -> dict[str, object]:
    """What the note says: which checkpoint it is about, and the export that was made of it.

    Raises:
        OSError: there is no such checkpoint.
    """
    state = (config.checkpoint_folder / f"step-{step}" / TRAINER_FILE).read_bytes()
    dtype = config.checkpoint.export_dtype if _exports(config) else None
    is_validated = config.validation.interval > 0
    outcome = {"step": step, "checkpoint": sha256(state).hexdigest(), "export_dtype": dtype, "is_validated": is_validated}
    return outcome | ({"is_evaluated": True} if config.evaluation.interval else {})
