"""Every option of a run: one dataclass per TOML section.

Precedence: the defaults here < the TOML file (`--job.config_file`) < the command line (`--section.key value`).
The docstring under a field is its help text. Reading and checking types is `flame.config_reader`'s work, what must
hold between options that of `flame.config_conflicts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from flame.objective_config import FutureEncoder, FuturePredictor, Objective, ObjectiveName, resolve_objective
from flame.option_types import STRICT, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability

BYTES_TOKENIZER = "bytes"
STANDARD_LIBRARY = "stdlib"
PATHSTAR = "pathstar"
SIBLINGS = "siblings"
GENERATED = (PATHSTAR, SIBLINGS)
DEFAULT_SEPARATOR = "="
LOCAL_FORMATS = ("text", "json", "parquet")
TOKENS_FORMAT = "tokens"


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
    """Hugging Face model configuration: a JSON file, a folder with config.json, or a Hub name. Weights start from the seed
    unless there is checkpoint.initial_load_path, whose configuration is taken where this is empty."""
    tokenizer_path: str = ""
    """Tokenizer: a folder, a Hub name, "bytes" for the built-in byte-level one (258 entries, no download), or that of a
    generated dataset: "pathstar" (pathstar.labels + 4 entries) or "siblings" (siblings.parents x (siblings.children + 1) + 2).
    Empty: the one in checkpoint.initial_load_path."""
    resize_embeddings: bool = False
    """With checkpoint.initial_load_path: grow the vocabulary to the tokenizer's where that has more entries. New rows start at
    the mean of the old ones."""
    trust_remote_code: bool = False
    """Run the Python code that comes with model.config or model.tokenizer_path, from the Hub or a folder."""


@dataclass(kw_only=True)
class Corpus:
    """Where documents come from: options that training, validation and each source of a mixture have."""

    __pydantic_config__ = STRICT

    dataset: str = STANDARD_LIBRARY
    """What to read: "stdlib" (the Python sources on this machine, one document a file), "text" (one document a file), "json"
    (JSON lines), "parquet" or "tokens" (a folder made by flame.utils.preprocess) with data_files, "pathstar" (graphs that are
    generated, see [pathstar]), "siblings" (likewise, see [siblings]), or a Hub dataset's name."""
    dataset_name: str = ""
    """Configuration of the Hub dataset, where it has several. Of path-star graphs the size, arms x nodes of a path with the
    center, such as "5x5", or several sizes, equally often, such as "2x3,5x5"."""
    dataset_split: str = "train"
    """Split of the Hub dataset."""
    data_files: str = ""
    """Local files for "text", "json" and "parquet": paths or globs, separated by commas. For "tokens", the one folder."""
    text_column: str = "text"
    """Column or JSON key that holds the document."""
    streaming: bool = False
    """Read Hub datasets or local files while they arrive, shard by shard, instead of fetching and indexing them first. In
    training each stream reads its own shards, so there must be at least training.num_streams of them."""


@dataclass(kw_only=True)
class Source(Corpus):
    """One source of a mixture, `[sources.NAME]`."""

    __pydantic_config__ = STRICT

    weight: NonNegativeFloat = 1.0
    """Share of the tokens, relative to the other sources. It decides how often the source is drawn and nothing else; it may
    be changed when a run is resumed. With 0 the source rests where it is."""


@dataclass(kw_only=True)
class Training(Corpus):
    """The training loop, and its corpus unless there are `[sources.NAME]`."""

    __pydantic_config__ = STRICT

    num_streams: PositiveInt = 192
    """Logical streams that each corpus is dealt into. Must be a multiple of ranks x training.num_workers, and is fixed for the
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
    loss_on: Literal["all", "answer"] = "all"
    """Which tokens both losses are about: all, or only those behind the first training.answer_separator of their document.
    A piece that does not begin its document has lost its prompt and counts for nothing."""
    answer_separator: str = DEFAULT_SEPARATOR
    """With loss_on = "answer": text of the one token that ends the prompt."""
    max_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    skip_nan_inf: bool = True
    """Skip the optimizer step when the loss or the gradient norm is not finite. False stops the run at the first."""
    max_skipped_steps: PositiveInt = 10
    """Stop after this many skipped steps in a row."""
    deterministic: bool = False
    """Use only deterministic GPU kernels: a resumed run then repeats to the bit. Slower. CPU runs always do."""
    audit: bool = False
    """Write which tokens of which documents were trained on to audit/ in job.dump_folder; check it with
    python -m flame.utils.audit."""
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
    """Free each layer's gathered weights after each of its two forwards. False gathers once a step for both forwards and the
    backward, for two more bytes a parameter. One GPU, which holds all weights anyway, always does the latter."""
    cpu_offload: bool = False
    """Keep weights, gradients and moments in host memory, and update them there. Slow; for models that do not fit."""
    float8: bool = False
    """Training matrix products of the decoder layers in 8-bit floats, forward and backward (torchao, row-wise scales). Needs
    a GPU of compute capability 8.9 or above, and training.compile to be fast."""
    gc_freq: PositiveInt = 50
    """Steps between Python garbage collections, made on all ranks at once so that none waits for another."""


@dataclass(kw_only=True)
class Pathstar:
    """Path-star graphs, which dataset = "pathstar" generates. Those to validate on are never trained on."""

    __pydantic_config__ = STRICT

    labels: Annotated[int, Field(gt=0, le=10_000)] = 30
    """Labels that the nodes of a graph are drawn from, without repetition."""
    graphs: NonNegativeInt = 0
    """Graphs in the training set, each with one order of edges; epochs go through them in new orders, and each worker process
    keeps them in memory. 0 generates new ones all the time."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides the graphs; training.seed decides their order."""


@dataclass(kw_only=True)
class Siblings:
    """Pairs of siblings, which dataset = "siblings" generates. Those to validate on, one in 8, are never trained on."""

    __pydantic_config__ = STRICT

    parents: Annotated[int, Field(ge=2, le=64)] = 5
    """Families."""
    children: Annotated[int, Field(ge=20, le=1000)] = 500
    """Of each parent."""
    pairs: NonNegativeInt = 0
    """Documents in the training set, each a pair in one order; epochs go through them in new orders. 0 draws from all pairs that
    are not held out all the time."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides whose child each label is, and the documents; training.seed decides their order."""


class Generators(NamedTuple):
    """Options of all datasets that are generated."""

    pathstar: Pathstar
    siblings: Siblings


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
    name: Literal["AdamW", "Muon"] = "AdamW"
    """"Muon" takes the matrices of the decoder layers, at the same learning rate (its updates are scaled to AdamW's size); all
    else stays with AdamW."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer's moments. "bfloat16" halves their memory; they are rounded at random, so that small
    changes count."""


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
class Experimental:
    __pydantic_config__ = STRICT

    freeze_lm_for_infonce: bool = False
    """Train predictor and estimator alone: the language model gets no gradient and no cross entropy is computed."""
    custom_model_path: str = ""
    """Python package (a folder with __init__.py) or module (a .py file) to import before the model is built. It registers its
    architecture with transformers' AutoConfig and AutoModelForCausalLM."""


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
    """Folder of the checkpoints, relative to job.dump_folder and inside it."""
    interval: PositiveInt = 500
    """Steps between checkpoints. The last step is always saved."""
    keep_latest_k: NonNegativeInt = 2
    """Complete checkpoints to keep; 0 keeps all. The disk must hold one more."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """"async": training goes on while a copy of the weights in host memory (page-locked beside GPUs) is written."""
    initial_load_path: str = ""
    """Weights that a new run starts from: a Hugging Face folder, a Hub name, or a step-N checkpoint folder. Only the language
    model is taken; predictor and estimator start fresh. A run that has checkpoints of its own goes on from those."""
    export_hf: bool = True
    """At the end, write the model as an ordinary Hugging Face folder, hf/ in job.dump_folder."""
    export_interval: NonNegativeInt = 0
    """Also export every so-many steps, to hf-step-N/; a multiple of checkpoint.interval. 0 exports at the end alone."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of exported weights. "float32" is what was trained, to the bit."""


@dataclass(kw_only=True)
class Validation(Corpus):
    """A fixed set of held-out packed sequences, the same at each time and on any number of ranks."""

    __pydantic_config__ = STRICT

    interval: NonNegativeInt = 0
    """Steps between validations; 0 is never. Unless it is 0, the last step is validated too."""
    num_sequences: PositiveInt = 64
    """Packed sequences of training.seq_len tokens in the set; fewer if the held-out documents do not fill them."""
    holdout_every: NonNegativeInt = 0
    """Hold out each so-many-th document of the training data, from the first on, and validate on those."""
    dataset: str = ""
    """Validate on this corpus instead: as training.dataset, with the options beside it."""


@dataclass(kw_only=True)
class Metrics:
    __pydantic_config__ = STRICT

    log_freq: PositiveInt = 10
    """Steps between log lines. Each line covers all steps since the last one."""
    future_interval: NonNegativeInt = 250
    """Steps between measurements of what the future loss learns, see docs/instruments.md; its first step is measured too. 0 is
    never."""
    enable_tensorboard: bool = False
    """Write TensorBoard events to tb/ in job.dump_folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases. WANDB_PROJECT, WANDB_RUN_NAME and WANDB_MODE (online, offline) are honoured."""


@dataclass(kw_only=True)
class Comm:
    __pydantic_config__ = STRICT

    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this for another rank ends the run. A source that gives nothing is named after a
    tenth of this, and ends the run after nine tenths."""


@dataclass(kw_only=True)
class JobConfig:
    """All options of a run."""

    __pydantic_config__ = STRICT

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    sources: dict[str, Source] = field(default_factory=dict)
    pathstar: Pathstar = field(default_factory=Pathstar)
    siblings: Siblings = field(default_factory=Siblings)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    objective: Objective = field(default_factory=Objective)
    future_encoder: FutureEncoder = field(default_factory=FutureEncoder)
    future_predictor: FuturePredictor = field(default_factory=FuturePredictor)
    experimental: Experimental = field(default_factory=Experimental)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    comm: Comm = field(default_factory=Comm)

    @property
    def uses_future(self) -> bool:
        """Whether any step of this run computes the future loss."""
        return self.objective_name == "future"

    @property
    def objective_name(self) -> ObjectiveName:
        """What is learned: a value of `objective.name`."""
        future = self.future_encoder
        return resolve_objective(self.objective.name, future.enable, future.loss_weight)

    @property
    def generators(self) -> Generators:
        """What datasets that are generated need to know."""
        return Generators(self.pathstar, self.siblings)

    @property
    def corpora(self) -> dict[str, Source]:
        """What is trained on, by option section ("training", or "sources.NAME" in the order of names)."""
        if self.sources:
            return {f"sources.{name}": self.sources[name] for name in sorted(self.sources)}
        chosen = {option.name: getattr(self.training, option.name) for option in fields(Corpus)}
        return {"training": Source(**chosen)}
