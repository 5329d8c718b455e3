"""Every option of a run: one dataclass per TOML section, and what must hold between options.

Precedence: the defaults here < the TOML file (`--job.config_file`) < the command line (`--section.key value`).
The docstring under a field is its help text. Reading and checking types is `flame.config_reader`'s work.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]

STRICT = ConfigDict(extra="forbid", strict=True)

BYTES_TOKENIZER = "bytes"
STANDARD_LIBRARY = "stdlib"
LOWEST_LEARNED_TEMPERATURE = 0.01
LOCAL_FORMATS = ("text", "json", "parquet")


@dataclass(kw_only=True)
class Job:
    __pydantic_config__ = STRICT

    config_file: str = ""
    """TOML file with the run's options. Keys given on the command line win over it."""
    dump_folder: str = "exp/run"
    """Folder of the run: logs, metrics, checkpoints and the exported model. The same folder resumes the run."""
    description: str = ""
    """A line about the run, shown at start and passed to Weights & Biases."""


@dataclass(kw_only=True)
class Model:
    __pydantic_config__ = STRICT

    config: str = ""
    """Hugging Face model configuration: a JSON file, a folder with config.json, or a Hub name. Weights start from the seed."""
    tokenizer_path: str = ""
    """Tokenizer: a folder, a Hub name, or "bytes" for the built-in byte-level one (258 entries, no download)."""


@dataclass(kw_only=True)
class Training:
    __pydantic_config__ = STRICT

    dataset: str = STANDARD_LIBRARY
    """Text to train on: "stdlib" (the Python sources on this machine, one document a file), "text" (one document a file),
    "json" (JSON lines) or "parquet" with training.data_files, or the name of a Hub dataset."""
    dataset_name: str = ""
    """Configuration of the Hub dataset, where it has several."""
    dataset_split: str = "train"
    """Split of the Hub dataset."""
    data_files: str = ""
    """Local files for the formats "text", "json" and "parquet": paths or globs, separated by commas."""
    text_column: str = "text"
    """Column or JSON key that holds the document."""
    num_streams: PositiveInt = 192
    """Logical streams that the corpus is dealt into. Must be a multiple of ranks x training.num_workers, and is fixed for the
    life of a run: the order of the data depends on it and on the seed, not on the number of ranks or workers."""
    num_workers: NonNegativeInt = 1
    """Processes per rank that read, tokenize and pack. 0 does it in the training process."""
    prefetch_factor: PositiveInt = 4
    """Packed sequences that each worker keeps ready."""

    seq_len: PositiveInt = 8192
    """Tokens in one packed sequence: the batch of one rank in one micro-step."""
    context_len: PositiveInt = 4096
    """Longest piece of a document, in tokens. Longer documents are cut into pieces; none is dropped. At most training.seq_len."""
    gradient_accumulation_steps: PositiveInt = 1
    """Packed sequences per rank in one optimizer step."""
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    max_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    skip_nan_inf: bool = False
    """Skip the optimizer step when the loss or the gradient norm is not finite, instead of stopping."""
    max_skipped_steps: PositiveInt = 10
    """With training.skip_nan_inf, stop after this many skipped steps in a row."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Decides the initial weights, the order of the data and dropout."""

    compile: bool = False
    """Compile each decoder layer with torch.compile. Worth it on GPUs."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of parameters and activations in forward and backward on GPUs. Master weights and the reduction of gradients over
    ranks are float32. CPUs use float32 throughout."""
    data_parallel_replicate_degree: PositiveInt = 1
    """Groups of ranks that each hold a full sharded copy of the weights (HSDP). 1 is plain FSDP."""
    data_parallel_shard_degree: Annotated[int, Field(ge=-1)] = -1
    """Ranks over which the weights are sharded. -1 takes all that training.data_parallel_replicate_degree leaves."""
    fsdp_reshard_after_forward: bool = True
    """Free each layer's gathered weights after its forward. False trades memory for communication."""
    gc_freq: PositiveInt = 50
    """Steps between Python garbage collections, made on all ranks at once so that none waits for another."""


@dataclass(kw_only=True)
class Optimizer:
    __pydantic_config__ = STRICT

    lr: PositiveFloat = 3e-4
    """Peak learning rate of AdamW."""
    beta1: Probability = 0.9
    """Decay of the first moment."""
    beta2: Probability = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices. Norms, biases and embeddings have none."""


@dataclass(kw_only=True)
class LRScheduler:
    __pydantic_config__ = STRICT

    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up. Shortened, with a warning, in a run of fewer steps."""
    decay_ratio: Fraction | None = None
    """Share of the steps, at the end, over which the rate decays. Unset: decay begins right after warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "cosine"
    """Shape of the decay."""
    lr_min: Fraction = 0.1
    """Learning rate at the end of the decay, which is one step after the last, as a fraction of optimizer.lr."""


@dataclass(kw_only=True)
class FutureEncoder:
    __pydantic_config__ = STRICT

    enable: bool = False
    """Add the future loss: a second, anti-causal forward gives each position a summary of its future to predict."""
    future_k: NonNegativeInt = 0
    """Window of the anti-causal attention, in tokens; 0 means up to the end of the document. The window is per layer:
    with L layers a summary reaches L x future_k tokens ahead."""
    target_shift: NonNegativeInt = 1
    """Position t predicts the summary of position t + target_shift. 0 is the method as first published: there the summary
    still holds token t itself, which the hidden state has already seen."""
    loss_weight: NonNegativeFloat = 0.1
    """Factor of the future loss beside the cross entropy. 0 is the same run as enable = false."""
    start_step: NonNegativeInt = 0
    """First step with the future loss. Steps are counted from 1."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the factor grows linearly to loss_weight."""
    estimator_type: Literal["infonce"] = "infonce"
    """Lower bound on the mutual information that serves as loss."""
    temperature: PositiveFloat = 0.1
    """Divides the cosine similarities."""
    learnable_temperature: bool = False
    """Learn the temperature, starting from future_encoder.temperature; it is kept at 0.01 or above."""


@dataclass(kw_only=True)
class FuturePredictor:
    __pydantic_config__ = STRICT

    head_type: Literal["linear", "mlp", "gated"] = "mlp"
    """Map from a hidden state to the guess of its future."""
    dropout: Probability = 0.0
    """Dropout before the last layer of the head."""
    lr_scale: PositiveFloat = 1.0
    """Learning rate of predictor and estimator, relative to optimizer.lr."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the predictor's matrices."""


@dataclass(kw_only=True)
class Experimental:
    __pydantic_config__ = STRICT

    freeze_lm_for_infonce: bool = False
    """Train predictor and estimator alone: the language model gets no gradient and no cross entropy is computed."""


@dataclass(kw_only=True)
class ActivationCheckpoint:
    __pydantic_config__ = STRICT

    mode: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing, the cheap half of each layer, or whole layers."""


@dataclass(kw_only=True)
class Checkpoint:
    __pydantic_config__ = STRICT

    enable_checkpoint: bool = True
    """Save checkpoints and resume from the newest complete one in the run's folder."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""
    interval: PositiveInt = 500
    """Steps between checkpoints. The last step is always saved."""
    keep_latest_k: NonNegativeInt = 2
    """Complete checkpoints to keep; 0 keeps all."""
    export_hf: bool = True
    """At the end, write the model as an ordinary Hugging Face folder, hf/ in job.dump_folder."""


@dataclass(kw_only=True)
class Metrics:
    __pydantic_config__ = STRICT

    log_freq: PositiveInt = 10
    """Steps between log lines. Each line covers all steps since the last one."""
    enable_tensorboard: bool = False
    """Write TensorBoard events to tb/ in job.dump_folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases. WANDB_PROJECT, WANDB_RUN_NAME and WANDB_MODE (online, offline) are honoured."""


@dataclass(kw_only=True)
class Comm:
    __pydantic_config__ = STRICT

    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this for another rank ends the run."""


@dataclass(kw_only=True)
class JobConfig:
    """All options of a run."""

    __pydantic_config__ = STRICT

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    future_encoder: FutureEncoder = field(default_factory=FutureEncoder)
    future_predictor: FuturePredictor = field(default_factory=FuturePredictor)
    experimental: Experimental = field(default_factory=Experimental)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    comm: Comm = field(default_factory=Comm)

    @property
    def uses_future(self) -> bool:
        """Whether any step of this run computes the future loss."""
        return self.future_encoder.enable and self.future_encoder.loss_weight > 0


def find_conflicts(config: JobConfig, world_size: int) -> Iterator[str]:
    """Yield one line for each combination of options, or option and machine, that cannot run.

    Args:
        config: options whose types and ranges are already checked.
        world_size: processes of the run over all nodes.
    """
    yield from _find_folder_conflicts(config)
    yield from _find_model_conflicts(config.model)
    yield from _find_data_conflicts(config.training, world_size)
    yield from _find_schedule_conflicts(config)
    yield from _find_parallel_conflicts(config.training, world_size)


def _find_folder_conflicts(config: JobConfig) -> Iterator[str]:
    folder, checkpoints = config.job.dump_folder, os.path.join(config.job.dump_folder, config.checkpoint.folder)
    for key, value, path in (("job.dump_folder", folder, folder), ("checkpoint.folder", config.checkpoint.folder, checkpoints)):
        if os.path.lexists(path) and not os.path.isdir(path):
            yield f'{key} = "{value}": "{path}" is not a folder; choose another name'


def _find_model_conflicts(model: Model) -> Iterator[str]:
    if not model.config:
        yield "model.config is not set: give a JSON file, a folder with config.json, or a Hub name (examples: configs/models/)"
    elif os.path.exists(os.path.expanduser(model.config)):
        yield from _find_json_faults(model.config)
    elif _looks_like_path(model.config):
        yield f'model.config = "{model.config}": no such file or folder'
    if not model.tokenizer_path:
        yield f'model.tokenizer_path is not set: give a folder, a Hub name, or "{BYTES_TOKENIZER}" for the built-in tokenizer'
    elif _looks_like_path(model.tokenizer_path) and not os.path.isdir(os.path.expanduser(model.tokenizer_path)):
        yield f'model.tokenizer_path = "{model.tokenizer_path}": no such folder'


def _looks_like_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; all else can only be meant as a path."""
    return name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1


def _find_json_faults(config: str) -> Iterator[str]:
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        yield f'model.config = "{config}": {path.name} cannot be read as JSON ({error})'
        return
    if not isinstance(content, dict) or "model_type" not in content:
        yield f'model.config = "{config}": {path.name} has no "model_type"; it must be a Hugging Face model configuration'


def _find_data_conflicts(training: Training, world_size: int) -> Iterator[str]:
    if training.context_len > training.seq_len:
        yield (
            f"training.context_len = {training.context_len} is more than training.seq_len = {training.seq_len}: "
            "a document's piece must fit in a packed sequence; lower the one or raise the other"
        )
    if training.dataset in LOCAL_FORMATS:
        if not training.data_files:
            yield f'training.dataset = "{training.dataset}" needs training.data_files (paths or globs, separated by commas)'
        for pattern in filter(None, training.data_files.split(",")):
            if not any(map(os.path.isfile, expand_glob(pattern))):
                yield f'training.data_files: "{pattern.strip()}" matches no file'
    elif training.data_files:
        yield (
            f'training.data_files is set but training.dataset = "{training.dataset}" does not read files: '
            f"allowed with {', '.join(LOCAL_FORMATS)}"
        )
    readers = world_size * max(1, training.num_workers)
    if training.num_streams % readers:
        yield (
            f"training.num_streams = {training.num_streams} is not a multiple of ranks x workers = {world_size} x "
            f"{max(1, training.num_workers)}: change training.num_workers or, for a new run, set num_streams to a multiple "
            f"of {readers}"
        )


def expand_glob(pattern: str) -> list[Path]:
    """Paths that a pattern from `training.data_files` stands for, sorted; `**` reaches into sub-folders."""
    # Unlike pathlib's, these and the os.path checks above take any string: one that cannot be a path matches nothing.
    return sorted(map(Path, glob.glob(os.path.expanduser(pattern.strip()), recursive=True)))


def _find_schedule_conflicts(config: JobConfig) -> Iterator[str]:
    steps = config.training.steps
    if config.uses_future and config.future_encoder.start_step > steps:
        yield (
            f"future_encoder.start_step = {config.future_encoder.start_step} is after the last step, training.steps = {steps}: "
            "start earlier or set future_encoder.enable = false"
        )
    if config.future_encoder.target_shift >= config.training.context_len:
        yield (
            f"future_encoder.target_shift = {config.future_encoder.target_shift} leaves no position with a target: "
            f"it must be less than training.context_len = {config.training.context_len}"
        )
    if config.future_encoder.learnable_temperature and config.future_encoder.temperature < LOWEST_LEARNED_TEMPERATURE:
        yield (
            f"future_encoder.temperature = {config.future_encoder.temperature} is below {LOWEST_LEARNED_TEMPERATURE}, the "
            "lowest that future_encoder.learnable_temperature allows: raise it or do not learn it"
        )
    if config.experimental.freeze_lm_for_infonce:
        if not config.uses_future:
            yield (
                "experimental.freeze_lm_for_infonce = true leaves nothing to train: "
                "it needs future_encoder.enable = true and future_encoder.loss_weight > 0"
            )
        elif config.future_encoder.start_step > 1:
            yield (
                f"experimental.freeze_lm_for_infonce = true leaves nothing to train before "
                f"future_encoder.start_step = {config.future_encoder.start_step}: set it to 0"
            )


def _find_parallel_conflicts(training: Training, world_size: int) -> Iterator[str]:
    replicate, shard = training.data_parallel_replicate_degree, training.data_parallel_shard_degree
    if shard == 0:
        yield "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more"
    elif shard > 0 and replicate * shard != world_size:
        yield (
            f"training.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard} is not the number of "
            f"ranks, {world_size}: set shard to -1 to take all remaining ranks"
        )
    elif shard < 0 and world_size % replicate:
        yield f"training.data_parallel_replicate_degree = {replicate} does not divide the number of ranks, {world_size}"
