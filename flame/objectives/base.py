"""The base class of objectives. An objective is what a step learns beside the next token.

In each step the trainer calls, in this order and on all ranks:

0. `begin_step`.
1. `count`, for each packed sequence. The trainer sums the counts over micro-steps and ranks before any forward.
2. `prepare_step`, once, with all packed sequences of this rank. It may communicate.
3. For each packed sequence: `prepare` without gradient, then the causal forward, then `loss` from its hidden states. The trainer
   divides the losses by the summed counts, adds `loss_weight` times the objective's loss to the cross entropy, and runs one
   backward.
4. `after_step`, if the optimizer has changed the weights.

An objective owns its modules. The trainer shards, compiles, optimises, saves and exports them. `loss` must never wait for the
device. Shapes: T tokens of a packed sequence, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.attention.backends import Attention
from flame.config.types import Section
from flame.data.batch import PackedBatch
from flame.models.aux_loss import AuxLoss
from flame.models.flops import ModelFlops
from flame.models.wrapper import TrainingModel
from flame.objectives.options import ObjectiveOptions
from flame.runtime.measures import Mean, Measures

__all__ = [
    "AuxFlops",
    "AuxLoss",
    "FuturePass",
    "LayerStack",
    "Objective",
    "ObjectiveOptions",
    "ParameterGroup",
    "Setup",
    "WithLayer",
]

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Setup:
    """What an objective is built from."""

    options: ObjectiveOptions
    """The objective's own section."""
    companions: Mapping[type[Section], Section]
    """Further sections that it reads, by class."""
    lm: PreTrainedModel
    """The language model, on the meta device. Do not register it as a submodule: the trainer already trains it."""
    attention: Attention
    """How the language model attends on this device."""
    device_type: str
    """"cuda" or "cpu"."""
    seed: int
    """`training.seed`."""
    seq_len: int
    """T."""
    context_len: int
    """Longest chunk of a document, in tokens."""
    sequences_per_step: int
    """Packed sequences of one optimizer step that have the loss, over micro-steps and ranks."""

    def get(self, kind: type[S]) -> S:
        """Return the section of this class from `companions`."""
        found = self.companions[kind]
        assert isinstance(found, kind)
        return found


class AuxFlops(NamedTuple):
    """FLOPs of one packed sequence, forward and backward."""

    forward: float = 0.0
    """An additional forward of the network, such as the anti-causal one."""
    heads: float = 0.0
    """The objective's own modules and its loss."""


class ParameterGroup(NamedTuple):
    """How to optimise the parameters whose names start with a prefix."""

    prefix: str
    """Within the objective, such as "predictor."; "" matches all."""
    lr_scale: float = 1.0
    """Learning rate, relative to `optimizer.lr`."""
    weight_decay: float | None = None
    """Weight decay of matrices; None is `optimizer.weight_decay`."""
    warmup_steps: int = 0
    """Further warm-up of the learning rate, from `objective.start_step` on."""


class Task(NamedTuple):
    """What exported modules are trained for, in values of JSON by name. A run that takes them compares it with its own."""

    decisive: dict[str, Any]
    """Where one of these differs, the modules are of no use."""
    options: dict[str, Any]
    """Differences are said in the log."""


class FuturePass(NamedTuple):
    """An anti-causal pass that an objective reads."""

    window_k: int = 0
    """Keys at most this far ahead, in each layer; 0 is up to the end of the document."""
    network: PreTrainedModel | None = None
    """What runs it; None is the language model."""
    layers: int = 0
    """Decoder layers that run, from the first; 0 is all."""


class WithLayer(NamedTuple):
    """What `loss` gets as `prepared` if the objective reads an early layer (`find_layer_read`)."""

    prepared: Any
    """From `prepare`."""
    states: Tensor
    """[T, d], states after that layer of the causal forward; with gradient if `trains_layer_read`."""


class LayerStack(NamedTuple):
    """Decoder layers that an objective owns."""

    layers: nn.ModuleList
    is_trained: bool
    """False for a network that only makes labels. Trained layers are recomputed like the language model's."""
    is_network: bool = False
    """Whether they are those of a whole network, whose layers are an FSDP group each, like those of the language model. The
    layers of a network that only makes labels are so too. Others are gathered with the root."""


class Objective(nn.Module):
    """Derive from this class, set `name` and `Options`, and write `loss`. Everything else has a default.

    The trainer builds it on the meta device; `init_weights` then draws the weights.
    """

    name: ClassVar[str] = ""
    """Value of `objective.name`, and prefix of the names of its diagnostics."""
    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    """Its section of options."""
    count_metric: ClassVar[str | None] = None
    """Name of the metric that logs the mean count of a step; None logs none."""
    modules_belong_together: ClassVar[bool] = False
    """Its exported modules are taken from initial weights together or not at all."""
    trains_layer_read: ClassVar[bool] = False
    """Whether the states of `find_layer_read` carry gradient. Those that serve as labels must not."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.setup = setup

    # ---------------------------------------------------------------- at the start

    @classmethod
    def find_model_conflicts(cls, options: ObjectiveOptions, config: PretrainedConfig) -> Iterator[str]:
        """Yield one line for each reason why this model cannot be trained with these options."""
        return iter(())

    def init_weights(self) -> None:
        """Draw all weights. Must set every parameter and buffer: they have no values after building on the meta device."""
        for child in self.children():
            reset_weights(child)

    def initialize(self, draw: Callable[[nn.Module, int], None]) -> None:
        """Give all modules storage and weights.

        Args:
            draw: (module, number) calls the module's `init_weights`, with a seed that depends on the number. The language model
                uses number 0.
        """
        draw(self, OBJECTIVE_DRAW)

    def start_new_run(self, backbone: TrainingModel) -> None:
        """Copy what depends on the language model's initial weights. Called on all ranks, but not in a resumed run."""

    def list_parameter_groups(self) -> Sequence[ParameterGroup]:
        """Learning rate and weight decay of its parameters. The first matching prefix wins."""
        return [ParameterGroup("")]

    def list_layer_stacks(self) -> Sequence[LayerStack]:
        """Its own decoder layers. The trainer compiles them like the language model's, and recomputes trained ones likewise."""
        return []

    def list_compiled(self) -> Sequence[nn.Module]:
        """Other modules to compile."""
        return []

    def find_future_pass(self) -> FuturePass | None:
        """The anti-causal pass that it reads, in which a model of an unknown family is checked for leaks.

        Return None if the objective reads no such pass. The default is the language model's, so that none goes unchecked.
        """
        return FuturePass()

    def find_layer_read(self) -> int | None:
        """Number of decoder layers after which it reads the states of the causal forward. Its `loss` then gets `WithLayer`."""
        return None

    # ---------------------------------------------------------------- in a step

    @property
    def fits_graph(self) -> bool:
        """Whether what it does for a packed sequence may become part of a CUDA graph (`flame.trainer.micro_step`).

        Then `prepare_step` returns None for each sequence. `prepare` and `loss` do the same at every step, read nothing of a
        packed sequence but its tensors, and draw by `flame.runtime.draws` alone. A derived class has to say it again.
        """
        return False

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before each step, and before a validation that precedes the first one, for what depends on the step.

        One rank also calls it on a shallow copy, for steps in any order, to count the FLOPs of a run ahead. So set attributes of
        this object alone, and communicate with no other rank.

        Args:
            step: from 1.
            total_steps: of the schedules: `lr_scheduler.total_steps`, or those of the run.
        """

    def count(self, batch: PackedBatch) -> int:
        """Number of items that the loss is averaged over; by default the labels.

        Args:
            batch: on the CPU.
        """
        return batch.num_labels

    def prepare_step(self, backbone: TrainingModel, batches: Sequence[PackedBatch]) -> Sequence[Any]:
        """For each packed sequence of this rank, what it needs from the other sequences of the step. A collective call."""
        return [None] * len(batches)

    def prepare(self, backbone: TrainingModel, batch: PackedBatch, prepared: Any) -> Any:
        """What `loss` needs. Called before the causal forward, so its working memory is free before activations are stored.

        Args:
            prepared: this sequence's item from `prepare_step`; None in validation.
        """
        return prepared

    def loss(
        self, backbone: TrainingModel, hidden_states: Tensor, batch: PackedBatch, prepared: Any, *, with_sample: bool = False
    ) -> AuxLoss:
        """The auxiliary loss of a packed sequence.

        Args:
            hidden_states: [T, d], final states of the causal forward, with gradient.
            prepared: from `prepare`; in a `WithLayer` if the objective reads an early layer.
            with_sample: also return `AuxLoss.sample`, the input of `measure_sample`.
        """
        raise NotImplementedError

    def after_step(self, backbone: TrainingModel) -> None:
        """Called after each optimizer step that changed the weights, for running averages or limits of parameters."""

    # ---------------------------------------------------------------- what is reported

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        """FLOPs that the objective adds for a packed sequence.

        Args:
            batch: on the CPU.
        """
        return AuxFlops()

    def estimate_memory(self, tokens: int) -> float:
        """Bytes that it keeps on a GPU while a packed sequence of so many tokens is differentiated, beside its weights."""
        return 0.0

    def read_metrics(self, compute_dtype: Any) -> Measures:
        """Metrics of its state, such as a learned temperature, for each log line. A collective call.

        Args:
            compute_dtype: dtype to which FSDP rounds parameters in a forward.
        """
        return {}

    def measure_sample(self, sample: Any, batch: PackedBatch, seed: int) -> dict[str, Mean]:
        """Diagnostics of one packed sequence, by name without prefix. The names must not depend on the input.

        Args:
            sample: from `loss`.
            seed: for random choices.
        """
        return {}

    def describe_metrics(self, values: Mapping[str, float], prefix: str = "") -> str:
        """Text after the loss on the console, such as "top-1 12.3%"; may be empty.

        Args:
            values: metrics of a log line.
            prefix: prefix of their names.
        """
        return ""

    def list_exported(self) -> Sequence[str]:
        """Prefixes of the objective's tensors that are exported beside the model; "" is all."""
        return [""]

    def list_required(self) -> Sequence[str]:
        """Names of exported modules that must come from initial weights, since the run does not train them."""
        return []

    def explain_taken(self, taken: Set[str]) -> Iterator[str]:
        """Lines for the log on options that have no effect since modules were taken from initial weights.

        Args:
            taken: names of the modules.
        """
        yield from ()

    def describe_task(self) -> Task:
        """What the exported modules are trained for. It is saved with them."""
        return Task({}, {})

    def describe_training(self) -> str:
        """A sentence of the model card on what was learned beside the next token."""
        unchanged = {each.name for each in fields(ObjectiveOptions)} - {"loss_weight", *self.setup.options.list_cadence()}
        shown = {name: value for name, value in asdict(self.setup.options).items() if name not in unchanged}
        options = ", ".join(f"{name} {value}" for name, value in shown.items())
        return f'Trained on next-token prediction and, beside it, "{self.name}": {options}.'

    def describe_modules(self) -> str:
        """A phrase of the model card that names the exported tensors."""
        return f'the modules of "{self.name}"'

    def explain_no_count(self) -> str:
        """A warning for a run in which `count` is 0: the reason, and what to change."""
        return f"nothing in the data counts for the {self.name} loss"


OBJECTIVE_DRAW = 3
"""Number of the draw that sets all weights of an objective. An objective that draws its modules one by one uses others."""


def reset_weights(module: nn.Module) -> None:
    """Draw the weights of a module and its children, by `init_weights` or else torch's `reset_parameters`."""
    own = getattr(module, "init_weights", None)
    if callable(own):
        own()
        return
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    for child in module.children():
        reset_weights(child)
