"""Options of the training loop, its arithmetic and its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt, lcm
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flame.config.data import Corpus
from flame.config.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    Seed,
    When,
    option,
)

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

MOST_NAMED = 8
"""Numbers of ranks or workers in an error line."""
BUDGETS = ("tokens", "epochs", "flops")
"""Options of `Training` that say how long to train, instead of `steps`."""
LENGTHS = ("steps", *BUDGETS)
"""Of these the command line's replace the file's."""
DEFAULT_SEPARATOR = "="
FLOAT8_SIZE_STEP = 16
"""Each size of an 8-bit matrix product must be a multiple of this."""


def list_divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _list_nearest(numbers: list[int], wanted: int, last: str = "or") -> str:
    """The numbers nearest to one, in order, such as "48, 64 or 96", with a word before the last one."""
    nearest = sorted(sorted(numbers, key=lambda number: abs(number - wanted))[:MOST_NAMED])
    names = [str(number) for number in nearest]
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


@dataclass(kw_only=True)
class Training(Corpus):
    """The training loop, and its corpus unless there are `[sources.NAME]`."""

    num_streams: PositiveInt = option(192, fixed=True)
    """Logical streams that each corpus is dealt into. Must be a multiple of ranks x training.num_workers, and is fixed for the
    life of a run: the order of the data depends on it and on the seed, not on the number of ranks or workers."""
    num_workers: NonNegativeInt = 1
    """Processes per rank that read, tokenize and pack. 0 does it in the training process."""

    seq_len: PositiveInt = 8192
    """Tokens in one packed sequence: the batch of one rank in one micro-step."""
    context_len: PositiveInt = 4096
    """Longest chunk of a document, in tokens. Longer documents are cut into chunks; none is dropped. At most training.seq_len."""
    gradient_accumulation_steps: PositiveInt = 1
    """Packed sequences per rank in one optimizer step."""
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run. Instead of it, one of training.tokens, epochs and flops may be given: the run then makes
    as many steps as that takes, and says so at its start."""
    tokens: PositiveInt | None = None
    """Tokens to train on in the whole run, instead of training.steps."""
    epochs: PositiveFloat | None = None
    """Passes over the data, instead of training.steps. For one source of counted tokens, training.dataset = "tokens". With few
    documents, a high training.num_streams makes passes uneven; the start says so."""
    flops: PositiveFloat | None = None
    """Required arithmetic of the whole run, such as 1e18, instead of training.steps. It is counted as step_tflops is, on the
    first packed sequences."""
    loss_on: Literal["all", "answer", "assistant"] = option("all", fixed=True)
    """Tokens that both losses count: all; "answer", only those after the first training.answer_separator of their document; or
    "assistant", only what the assistant says in chats. Of a cut document only the first chunk counts: later ones have lost their
    prompt."""
    answer_separator: str = option(DEFAULT_SEPARATOR, fixed=True, applies=When("loss_on", ("answer",)))
    """Text of the one token that ends the prompt."""
    max_norm: Annotated[float, Field(ge=0, json_schema_extra={"allows_infinity": True})] = 1.0
    """Clip gradients to this global norm. 0 or inf does not clip."""
    max_skipped_steps: PositiveInt = 10
    """Stop after this many steps in a row whose loss or gradient norm is not finite. Such steps are skipped; 1 stops at the
    first."""
    dropout: Probability = option(0.0, applies=When("experimental.freeze_lm_for_infonce", (False,)))
    """Dropout in the causal pass of a step: on the embeddings, and on what attention and feed-forward blocks add to the residual
    stream. Not on attention weights, and in no other pass."""
    deterministic: bool = False
    """Use only deterministic GPU kernels: a resumed run then repeats to the bit. Slower. CPU runs always do."""
    audit: bool = False
    """Write which tokens of which documents were trained on to audit/ in job.dump_folder. flame-audit checks it."""
    seed: Seed = option(42, fixed=True)
    """Decides the initial weights, the order of the data and dropout."""

    compile: bool = False
    """Compile each decoder layer with torch.compile. Worth it on GPUs."""
    cuda_graphs: bool = option(True, applies=When("compile", (True,)))
    """On one GPU, launch the forward and backward of a small model at once, as a CUDA graph, where the run allows it
    (docs/performance.md). Graphs hold memory."""
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
    float8: Literal["none", "rowwise", "rowwise_with_gw_hp"] = "none"
    """Training matrix products of the decoder layers in 8-bit floats, forward and backward, by a recipe of torchao, with a scale
    for each row. "rowwise_with_gw_hp" leaves the gradients of the weights in bfloat16. Validation and evaluation are not rounded.
    Needs a GPU of compute capability 8.9 or above, and training.compile to be fast."""
    float8_head: bool = option(False, applies=When("experimental.freeze_lm_for_infonce", (False,)))
    """Logits of the output head in cross entropies of tokens, also those of mtp's heads, and the gradients of the hidden states
    there, in 8-bit floats with a scale for each row. Needs a GPU of compute capability 8.9 or above. Gradients of the head,
    validation, evaluation and what else an objective does with the head stay as they are."""

    @property
    def budget(self) -> str | None:
        """The option that says how long to train instead of `steps`; None for none."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        typed = [each for each in LENGTHS if f"training.{each}" in job.typed and getattr(self, each) is not None]
        if self.budget and len(typed) > 1:
            given = " and ".join(f"training.{each} = {getattr(self, each)}" for each in typed)
            yield f"{given} all say how long to train: leave out all but one"
        if self.context_len > self.seq_len:
            yield (
                f"training.context_len = {self.context_len} is more than training.seq_len = {self.seq_len}: a chunk of a "
                "document must fit in a packed sequence; lower the one or raise the other"
            )
        yield from self._find_stream_conflicts(job.world_size, max(1, self.num_workers))
        yield from self._find_float8_conflicts()
        yield from self._find_parallel_conflicts(job.world_size)

    def _find_stream_conflicts(self, ranks: int, workers: int) -> Iterator[str]:
        streams = self.num_streams
        if streams % (ranks * workers) == 0:
            return
        fault = f"training.num_streams = {streams} is not a multiple of ranks x workers = {ranks} x {workers}: "
        able = list_divisors(streams // ranks) if streams % ranks == 0 else []
        if able:
            yield f"{fault}set training.num_workers to {_list_nearest(able, workers)}"
            return
        able = [count for count in list_divisors(streams) if streams % (count * workers) == 0] or list_divisors(streams)
        multiple = lcm(streams, ranks * workers)
        others = _list_nearest([count for count in list_divisors(multiple // workers) if count != ranks], ranks, "and")
        yield (
            f"{fault}a run with {streams} streams goes on with {_list_nearest(able, ranks)} ranks; for a new run set num_streams "
            f"to a multiple of {ranks * workers}, such as {multiple}, which also serves {others} ranks"
        )

    def _find_float8_conflicts(self) -> Iterator[str]:
        if self.mixed_precision_param != "bfloat16":
            for shown, off in self._list_float8():
                yield (
                    f'{shown} beside training.mixed_precision_param = "{self.mixed_precision_param}": set the one to {off} or '
                    'the other to "bfloat16"'
                )
        if self.float8 == "rowwise" and self.seq_len % FLOAT8_SIZE_STEP:
            yield (
                f'training.float8 = "{self.float8}": training.seq_len = {self.seq_len} is not a multiple of {FLOAT8_SIZE_STEP}, '
                'which the weights\' gradients need: change it, or set float8 to "none" or "rowwise_with_gw_hp"'
            )

    def _list_float8(self) -> Iterator[tuple[str, str]]:
        """The options that ask for 8-bit training, and what switches each off."""
        if self.float8 != "none":
            yield f'training.float8 = "{self.float8}"', '"none"'
        if self.float8_head:
            yield "training.float8_head = true", "false"

    def _find_parallel_conflicts(self, world_size: int) -> Iterator[str]:
        replicate, shard = self.data_parallel_replicate_degree, self.data_parallel_shard_degree
        if shard == 0:
            yield "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more"
        elif shard > 0 and replicate * shard != world_size:
            yield (
                f"training.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard} is not the number "
                f"of ranks, {world_size}: set shard to -1 to take all remaining ranks"
            )
        elif shard < 0 and world_size % replicate:
            yield f"training.data_parallel_replicate_degree = {replicate} does not divide the number of ranks, {world_size}"


@dataclass(kw_only=True)
class Optimizer(Section):
    """What updates the weights."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: Probability = 0.9
    """Decay of the first moment."""
    beta2: Probability = 0.95
    """Decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices. Norms, biases and embeddings have none."""
    name: Literal["AdamW", "Muon"] = option("AdamW", fixed=True, applies=When("experimental.freeze_lm_for_infonce", (False,)))
    """"Muon" takes the matrices of the decoder layers, at the same learning rate (its updates are scaled to AdamW's size); all
    else stays with AdamW."""
    state_dtype: Literal["float32", "bfloat16"] = option("float32", fixed=True)
    """Dtype of the optimizer's moments. "bfloat16" halves their memory, with stochastic rounding, so that small changes count."""


@dataclass(kw_only=True)
class LRScheduler(Section):
    """The learning rate over the run."""

    total_steps: PositiveInt | None = None
    """Steps that learning rate and loss weight are scheduled over. Unset: training.steps. Set it where the run is to stop before,
    and to go on later as if it had not stopped."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up. Shortened, with a warning, in a run of fewer steps."""
    decay_ratio: Fraction | None = None
    """Share of the steps, at the end, over which the rate decays. Unset: decay begins right after warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "cosine"
    """Shape of the decay."""
    lr_min: Fraction = 0.1
    """Learning rate at the end of the decay, which is one step after the last, as a fraction of optimizer.lr."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        is_known = job.training.budget is None  # else the trainer asks again
        if is_known and self.total_steps is not None and self.total_steps < job.training.steps:
            yield (
                f"lr_scheduler.total_steps = {self.total_steps} is less than training.steps = {job.training.steps}: the schedule "
                "would end before the run; raise it, or leave it out to schedule over training.steps"
            )


@dataclass(kw_only=True)
class ActivationCheckpoint(Section):
    """Less memory for more arithmetic."""

    mode: Literal["none", "pointwise", "selective", "full"] = "none"
    """What the backward pass recomputes. "none": nothing. "pointwise": all of a layer but its matrix products and attention on
    flash kernels, which takes little time. "selective": every second matrix product too. "full": whole layers. "pointwise" and
    "selective" need training.compile."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        # Without it, a layer that changes a product in place (OLMo's clip_qkv) changes what was kept: wrong gradients.
        if self.mode in ("pointwise", "selective") and not job.training.compile:
            yield (
                f'activation_checkpoint.mode = "{self.mode}" beside training.compile = false: only compiled layers leave what is '
                'kept unchanged; set training.compile to true, or mode to "full"'
            )


@dataclass(kw_only=True)
class Experimental(Section):
    """Options that may still change."""

    freeze_lm_for_infonce: bool = option(False, fixed=True)
    """Train the objective's own modules alone: the language model gets no gradient and no cross entropy is computed."""
    custom_model_path: str = ""
    """Python package (a folder with __init__.py) or module (a .py file) to import before the model is built. It registers its
    architecture with transformers' AutoConfig and AutoModelForCausalLM."""
