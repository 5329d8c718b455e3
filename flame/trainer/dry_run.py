"""`bash train.sh ... --dry-run`: all of a run's start and a few of its steps, in a folder that is then deleted.

Options, model, tokenizer, data and initial weights are opened and checked as for the run itself, with all their messages. The
steps compute both losses on the first packed sequences of the data. The first one compiles. The last one is timed: on one GPU its
micro-step may be a CUDA graph, which takes two before it and one to be captured.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from flame.checkpoints.files import list_checkpoints
from flame.config.profiling import Profiling
from flame.config.run import Checkpoint, Metrics
from flame.config.schema import JobConfig
from flame.logging.writers.json_lines import METRICS_FILE
from flame.objectives.registry import choose_objective
from flame.runtime.distributed import get_rank
from flame.runtime.json_lines import parse_line
from flame.trainer.micro_step import WARM_UP

STEPS = WARM_UP + 2

logger = logging.getLogger("flame")


def shorten(config: JobConfig) -> JobConfig:
    """The options of the dry run. All ranks and machines get the same folder."""
    short = deepcopy(config)
    port = os.environ.get("MASTER_PORT", "0")
    own = f"{os.getuid()}-{os.getpid() if port == '0' else port}"
    short.job.dump_folder = os.path.join(tempfile.gettempdir(), f"flame-dry-run-{own}")
    short.training.tokens = short.training.epochs = short.training.flops = None
    short.lr_scheduler.total_steps = short.lr_scheduler.total_steps or max(config.training.steps, STEPS)
    short.training.steps = STEPS
    short.training.audit = False
    short.objective.start_step = short.objective.warmup_steps = short.objective.decay_steps = 0
    if (kind := choose_objective(short)) is not None:
        short.get(kind.options).every = 1
    short.checkpoint = Checkpoint(
        enable_checkpoint=False,
        initial_load_path=config.checkpoint.branch_from or config.checkpoint.initial_load_path,
        load_objective=config.checkpoint.load_objective,
    )
    short.metrics = Metrics(log_freq=1, diagnostics_interval=config.metrics.diagnostics_interval)
    short.profiling = Profiling()
    if short.validation.interval:
        short.validation.num_sequences = min(short.validation.num_sequences, config.world_size)
    short.evaluation.num_questions = 1
    short.evaluation.completion_tokens = min(short.evaluation.completion_tokens, STEPS)
    for held_out in short.held_out.values():
        held_out.num_documents = 1
    return short


def run(config: JobConfig, train: Callable[[JobConfig], bool]) -> bool:
    """Train on the options of the dry run, report, and delete its folder, also after a failure.

    Args:
        config: of the run itself.
        train: returns whether the run is complete.
    """
    short = shorten(config)
    try:
        is_complete = train(short)
        if is_complete and get_rank() == 0:
            report(config, short)
        return is_complete
    finally:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each machine has made it
            shutil.rmtree(short.job.dump_folder, ignore_errors=True)


def report(config: JobConfig, short: JobConfig) -> None:
    """Log what the dry run has found. Rank 0 calls it.

    Args:
        config: of the run itself.
        short: from `shorten`.
    """
    folder = Path(short.job.dump_folder)
    rows = [parse_line(line) for line in (folder / METRICS_FILE).read_bytes().splitlines(keepends=True)]
    last = [row for row in rows if row is not None and "step_seconds" in row][-1]
    steps = list_checkpoints(config.checkpoint_folder)
    logger.info(
        "dry run: a step takes %.2f s and %.1f GiB; nothing was kept. %s",
        last["step_seconds"],
        last["peak_memory_gib"],
        f"The run itself goes on from {steps[-1]}" if steps else f"The run itself begins in {config.job.dump_folder}",
    )
