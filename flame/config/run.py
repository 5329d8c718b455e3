"""Options of a run as a whole: where it is, its model, what it learns, what it saves and logs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flame.config.addresses import find_target_fault
from flame.config.locations import find_branch_conflicts, find_model_conflicts
from flame.config.types import NonNegativeInt, PositiveInt, Section, When, option

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

NEXT_TOKEN = "next_token"
BYTES_TOKENIZER = "bytes"
CHECKPOINT_FOLDER = "checkpoint"
STARTS_FILE = "starts.jsonl"
"""In a run's folder: a line for each start."""
FIRST_STEP_FILE = "first_step.jsonl"
"""In a run's folder: what each start begins with."""
CURVES_FILE = "curves.png"


@dataclass(kw_only=True)
class Job(Section):
    """The run."""

    config_file: str = option("", is_silent=True)
    """TOML file with the run's options. Keys given on the command line win over it."""
    dump_folder: str = option("exp/run", is_silent=True)
    """Folder of the run: logs, metrics, checkpoints and the exported model. The same folder resumes the run."""
    description: str = option("", is_silent=True)
    """A line about the run, shown at start and passed to Weights & Biases."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        for path in (self.dump_folder, os.path.join(self.dump_folder, CHECKPOINT_FOLDER)):
            if os.path.lexists(path) and not os.path.isdir(path):
                yield f'job.dump_folder = "{self.dump_folder}": "{path}" is not a folder; choose another name'
                return
            try:
                os.stat(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:  # too long, inside a file, not to be entered, with a null character
                reason = getattr(error, "strerror", None) or error
                yield f'job.dump_folder = "{self.dump_folder}" cannot be a folder ({reason}); choose another name'
                return


@dataclass(kw_only=True)
class Model(Section):
    """The language model and its tokenizer."""

    config: str = ""
    """Hugging Face model configuration: a JSON file, a folder with config.json, an address of either, or a Hub name.
    Weights start from the seed unless there is checkpoint.initial_load_path or branch_from, whose configuration is taken where
    this is empty."""
    tokenizer_path: str = ""
    """Tokenizer: a folder, a tokenizer.json, an address of either, a Hub name, "bytes" for the built-in
    byte-level one (258 entries, no download), or the name of a generated dataset, such as "pathstar", for its own. Empty: the
    one in checkpoint.initial_load_path or branch_from."""
    resize_embeddings: bool = option(False, applies=When("checkpoint.initial_load_path"))
    """Grow the vocabulary to the tokenizer's where that has more entries. New rows start at the mean of the old ones."""
    trust_remote_code: bool = False
    """Run the Python code that comes with model.config or model.tokenizer_path, from the Hub or a folder."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        yield from find_model_conflicts(self.config, self.tokenizer_path, job.start)


@dataclass(kw_only=True)
class ObjectiveChoice(Section):
    """What is learned beside the next token. Each objective has a section of its own options."""

    name: str | None = None
    """"next_token" (nothing else, the default), "future" (summaries of the anti-causal pass, see [future_encoder]), "mtp" (the
    tokens after the next one), "mtp_sequential" (the same, one after another), "top" (the order in which upcoming tokens come),
    "fsp_bow" (the set of upcoming tokens), "fsp_revlm" (the state of a language model that reads from the end), "nitp" (the next
    token's state after an early layer), "nextlat" (the next final state, given the next token), "regret" (the distribution of a
    teacher that sees the future), "stp" (states on a line), or the name of an objective of your own, from objective.path or an
    installed package. docs/objectives.md defines each."""
    path: str = ""
    """A Python file with an objective of your own, such as "my_objective.py" (docs/add_an_objective.md). It is trained unless
    objective.name says otherwise."""
    start_step: NonNegativeInt = 0
    """First step with the objective's loss. Steps are counted from 1."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the weight of the loss grows linearly to the objective's loss_weight."""
    decay_steps: NonNegativeInt = 0
    """Steps, the last of the run (or of lr_scheduler.total_steps), over which the weight falls linearly to 0, which it reaches
    one step after the last."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if job.experimental.freeze_lm_for_infonce and self.start_step > 1:
            yield (
                "experimental.freeze_lm_for_infonce = true leaves nothing to train before objective.start_step = "
                f"{self.start_step}: set it to 0"
            )


_SAVED = When("enable_checkpoint")
_EXPORTED = (_SAVED, When("export_hf"))


@dataclass(kw_only=True)
class Checkpoint(Section):
    """What is saved and exported, and what a new run starts from."""

    enable_checkpoint: bool = True
    """Save checkpoints and resume from the newest complete one in the run's folder."""
    interval: PositiveInt = option(500, applies=_SAVED)
    """Steps between checkpoints. The last step is always saved."""
    keep_latest_k: NonNegativeInt = option(2, applies=_SAVED)
    """Complete checkpoints to keep; 0 keeps all. The disk must hold one more."""
    load_step: PositiveInt | None = option(None, applies=_SAVED, is_silent=True)
    """Go back to the checkpoint of this step. What is newer is set aside, not deleted. It is done once: the same command goes on
    from the newest checkpoint, until a start without the option."""
    async_mode: Literal["disabled", "async"] = option("disabled", applies=_SAVED)
    """"async": training goes on while a copy of the weights in host memory (page-locked beside GPUs) is written."""
    initial_load_path: str = ""
    """Weights that a new run starts from: a Hugging Face folder, a step-N checkpoint folder, an address of either, such as
    "s3://bucket/folder", or a Hub name. The optimizer and the data begin anew. A run that has checkpoints of
    its own goes on from those."""
    load_objective: bool = option(True, applies=When("initial_load_path"))
    """Also take the objective's modules, such as the predictor, from checkpoint.initial_load_path, where they are there and fit.
    Those that do not fit start fresh, which the log says."""
    branch_from: str = option("", is_silent=True)
    """A step-N checkpoint folder of another run, whose whole state a new run starts from: weights, optimizer, schedule and data
    position. What a resume may not change must be as it was. A run that has checkpoints of its own goes on from those."""
    export_hf: bool = option(True, applies=_SAVED)
    """At the end, write the model as an ordinary Hugging Face folder, hf/ in job.dump_folder."""
    export_interval: NonNegativeInt = option(0, applies=_EXPORTED)
    """Also export every N steps, to hf-step-N/; a multiple of checkpoint.interval. 0 exports at the end alone."""
    export_dtype: Literal["float32", "bfloat16"] = option("float32", applies=_EXPORTED)
    """Dtype of exported weights. "float32" is what was trained, to the bit."""
    export_to: str = option("", applies=_EXPORTED)
    """An address, such as "s3://bucket/run", to which each export is also uploaded, as a folder in it. What fails is tried again
    at the next start."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        yield from find_branch_conflicts(self.branch_from, job.checkpoint_folder)
        if self.export_to and (fault := find_target_fault(self.export_to)):
            yield f'checkpoint.export_to = "{self.export_to}": {fault}'
        if self.enable_checkpoint and self.export_hf and self.export_interval % self.interval:
            yield (
                f"checkpoint.export_interval = {self.export_interval} is no multiple of checkpoint.interval = {self.interval}: "
                "models are exported from checkpoints"
            )


@dataclass(kw_only=True)
class Metrics(Section):
    """What is measured and where it is written. metrics.jsonl in the run's folder always holds every number."""

    log_freq: PositiveInt = 10
    """Steps between log lines. Each line covers all steps since the last one."""
    diagnostics_interval: NonNegativeInt = 250
    """Steps between diagnostics of what the objective learns, see docs/diagnostics.md; its first step is measured too. 0 is
    never."""
    enable_tensorboard: bool = False
    """Write TensorBoard events to tb/ in job.dump_folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases. WANDB_PROJECT, WANDB_NAME and WANDB_MODE (online, offline) are honoured."""
    logger_path: str = ""
    """A Python file with a metric logger of your own, such as "my_logger.py" (CONTRIBUTING.md)."""


@dataclass(kw_only=True)
class Comm(Section):
    """What passes between processes."""

    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this for another rank ends the run. A source that gives nothing is named after a
    tenth of this, and ends the run after nine tenths."""
