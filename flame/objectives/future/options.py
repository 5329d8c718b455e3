"""Options of the future loss: the sections [future_encoder], [future_predictor] and [future_action]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flame.config.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, Probability, Section, When, option
from flame.models.estimators import (
    ESTIMATORS,
    HIGHEST_LEARNED_TEMPERATURE,
    LOWEST_LEARNED_TEMPERATURE,
    EstimatorName,
)
from flame.objectives.options import ObjectiveOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flame.config.schema import JobConfig

TAUGHT = ("random", "ema")
"""Values of `future_encoder.target` whose summaries come from a second network."""


def _list_estimators(attribute: str) -> When:
    return When("estimator_type", tuple(name for name, entry in ESTIMATORS.items() if getattr(entry, attribute)))


_HAS_NEGATIVES = _list_estimators("has_negatives")
_HAS_TEMPERATURE = _list_estimators("takes_temperature")
_CAN_LEARN = _list_estimators("can_learn_temperature")
_HAS_PASS = When("target", ("self", "random", "ema", "shuffled"))


def _learns_temperature(options: FutureOptions) -> bool:
    """Whether the option is only the initial value of something learned, which the checkpoint stores."""
    return options.learnable_temperature or ESTIMATORS[options.estimator_type].learns_scores


@dataclass(kw_only=True)
class PredictorOptions(Section):
    """The head that maps hidden states to predictions of the future."""

    section: ClassVar[str] = "future_predictor"

    head_type: Literal["linear", "mlp", "gated"] = option("mlp", fixed=True)
    """Architecture of the head."""
    input: Literal["hidden_states", "embedding"] = "hidden_states"
    """Input of the head: the hidden states or, as a control, only the current token's embedding, without gradient."""
    layer: NonNegativeInt = option(0, applies=When("input", ("hidden_states",)))
    """Decoder layer whose states are the input of the head; 0 is the last, after the network's last norm. The future loss then
    trains this layer and those before it."""
    dropout: Probability = 0.0
    """Dropout before the last layer of the head."""
    lr_scale: PositiveFloat = 1.0
    """Learning rate of predictor and estimator, relative to optimizer.lr."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate of predictor and estimator grows from 0, beside lr_scheduler.warmup_steps. They begin
    at objective.start_step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the matrices of predictor and estimator ("bilinear" has one)."""

    def find_model_conflicts(self, model_config: PretrainedConfig) -> Iterator[str]:
        if self.layer >= model_config.num_hidden_layers:
            yield (
                f"{self.section}.layer = {self.layer} is no less than the model's num_hidden_layers = "
                f"{model_config.num_hidden_layers}: set it to 0 to read the last hidden states"
            )


_HAS_ACTIONS = When("top_k", above=0)


@dataclass(kw_only=True)
class ActionOptions(Section):
    """The action loss of the method's first publication: rewards for candidates of the next token. docs/objectives.md defines it,
    and says why its rewards are nearly uniform as published."""

    section: ClassVar[str] = "future_action"

    top_k: NonNegativeInt = option(0, fixed=True)
    """Candidates of an anchor: this many tokens with the highest logits, and the true next one. 0 leaves the loss out; the first
    publication takes 16. It costs three products with the output head, and a forward of a head of its own for each candidate."""
    temperature: PositiveFloat = option(1.0, applies=_HAS_ACTIONS)
    """Divides the scores of candidates, which are cosines, in the softmax that makes rewards of them."""
    label_bias: NonNegativeFloat = option(0.0, applies=_HAS_ACTIONS)
    """Added to the score of the true next token."""
    loss_weight: PositiveFloat = option(1.0, applies=_HAS_ACTIONS)
    """Factor of the action loss beside the loss of the summaries. Both are then multiplied by future_encoder.loss_weight."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.top_k and job.experimental.freeze_lm_for_infonce:
            yield (
                f"{name}.top_k = {self.top_k} beside experimental.freeze_lm_for_infonce = true: the action loss trains the "
                "language model alone; set one of them to 0 or false"
            )

    def find_model_conflicts(self, model_config: PretrainedConfig) -> Iterator[str]:
        if self.top_k > model_config.vocab_size:
            yield (
                f"{self.section}.top_k = {self.top_k} is more than the model's vocab_size = {model_config.vocab_size}: lower it, "
                "or set it to 0 for no action loss"
            )


@dataclass(kw_only=True)
class FutureOptions(ObjectiveOptions):
    """The anti-causal pass, its summaries, and how predictions are compared with them."""

    section: ClassVar[str] = "future_encoder"
    companions: ClassVar[tuple[type[Section], ...]] = (PredictorOptions, ActionOptions)
    trains_without_lm: ClassVar[bool] = True

    future_k: NonNegativeInt = option(0, applies=When("target", ("self", "random", "ema", "mean_embedding", "shuffled")))
    """Window of the anti-causal attention, in tokens; 0 means up to the end of the document. The window is per layer: with L
    layers, or future_encoder.layers = L, a summary covers L x future_k tokens ahead."""
    target: Literal["self", "random", "ema", "mean_embedding", "causal", "shuffled"] = option("self", fixed=True)
    """Where summaries come from. "self" is the anti-causal pass of the network itself. "random" is that of a frozen network of
    the same shape with other random weights; docs/experiments.md says when to use it. The others are controls: "ema", the pass
    of a running average of the weights; "mean_embedding", the mean embedding of the tokens ahead; "causal", the causal pass,
    which has not seen the future; "shuffled", the network's own summaries, assigned to other anchors at random."""
    layers: NonNegativeInt = option(0, fixed=lambda options: options.target in TAUGHT, applies=_HAS_PASS)
    """Decoder layers that the anti-causal pass runs, from the first. The network's last norm follows them. 0 is all."""
    ema_decay: Probability = option(0.999, applies=When("target", ("ema",)))
    """Share of the running average that one step keeps."""
    target_shift: NonNegativeInt = option(1, applies=When("target_shift_max", (0,)))
    """Position t predicts the summary of position t + target_shift. 0 is the method as first published: the summary then also
    contains token t, which the hidden state has already seen. Models that read documents reversed need 1 or more. For the
    others, docs/experiments.md says which value was better."""
    target_shift_max: NonNegativeInt = 0
    """Draw the shift of each packed sequence anew, from 1 to this, as the method's first publication does for each step. 0 keeps
    future_encoder.target_shift."""
    precision: Literal["bf16", "fp8"] = option("bf16", applies=_HAS_PASS)
    """Arithmetic of the anti-causal forward on GPUs. "bf16" is that of the causal forward (training.mixed_precision_param).
    "fp8" runs the matrix products of the decoder layers in 8-bit floats, scaled by row: faster, but summaries are rounded."""
    projection_dim: NonNegativeInt = option(0, fixed=True)
    """Compare predictions and summaries in this many dimensions. A fixed random matrix projects the summaries. 0 compares them
    in the model's width."""
    max_anchors: NonNegativeInt = 0
    """Anchors per packed sequence, drawn at random. Other positions predict nothing and are not negatives. 0 takes all."""
    negatives: Literal["local", "global"] = option("local", applies=_HAS_NEGATIVES)
    """Negatives of an anchor: the summaries of its own packed sequence ("local"), or of all packed sequences of the step, over
    all ranks and micro-steps ("global"). Validation always compares within a packed sequence."""
    exclude_neighbors: NonNegativeInt = option(0, applies=_HAS_NEGATIVES)
    """Exclude from an anchor's negatives the summaries at most this many tokens away in its document, whose future is largely
    the same. An anchor without any negative counts with a loss of 0."""
    exclude_duplicates: bool = option(False, applies=_HAS_NEGATIVES)
    """Exclude from an anchor's negatives the summaries of the same tokens as its own, as far as the window sees. The tokens
    compared are those from a summary's position on, also with target = "causal"."""
    loss_weight: NonNegativeFloat = 0.03
    """Factor of the future loss, which is added to the cross entropy. 0 is the same as objective.name = "next_token"."""
    estimator_type: EstimatorName = option("infonce", fixed=True)
    """How a prediction is compared with its summary. With negatives: "infonce" by cosine similarity, "bilinear" by a learned
    matrix between the two (as in CPC). Without negatives, as controls: "cosine" and "smooth_l1"."""
    temperature: PositiveFloat = option(0.1, fixed=_learns_temperature, applies=_HAS_TEMPERATURE)
    """Divides the scores of "infonce". The matrix of "bilinear" starts as the identity divided by it."""
    learnable_temperature: bool = option(False, fixed=True, applies=_CAN_LEARN)
    """Learn the temperature, starting from future_encoder.temperature. It stays between 0.01 and 1."""

    @property
    def only_starts_from_temperature(self) -> bool:
        """Whether the temperature, or a matrix that has it, is learned."""
        return _learns_temperature(self)

    @property
    def learns_temperature(self) -> bool:
        """Whether the temperature is a parameter."""
        return self.learnable_temperature and ESTIMATORS[self.estimator_type].can_learn_temperature

    @property
    def uses_fp8(self) -> bool:
        """Whether there is an anti-causal pass, in 8-bit floats."""
        return self.precision == "fp8" and _HAS_PASS.holds(self.target)

    def describe_shift(self) -> str:
        """The option that decides the shift, and its value."""
        return f"target_shift_max = {self.target_shift_max}" if self.target_shift_max else f"target_shift = {self.target_shift}"

    @property
    def pass_layers(self) -> int:
        """Decoder layers of the anti-causal pass, from the first; 0 is all."""
        return self.layers if _HAS_PASS.holds(self.target) else 0

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if (self.target_shift_max or self.target_shift) >= job.training.context_len:
            yield (
                f"{name}.{self.describe_shift()} leaves no position with a target: it must be less than "
                f"training.context_len = {job.training.context_len}"
            )
        if self.max_anchors == 1 and ESTIMATORS[self.estimator_type].has_negatives:
            yield f"{name}.max_anchors = 1 leaves no negatives: allowed are 0 (all) and 2 or more"
        if self.target == "shuffled" and self.exclude_neighbors and ESTIMATORS[self.estimator_type].has_negatives:
            yield (
                f'{name}.exclude_neighbors = {self.exclude_neighbors} with {name}.target = "shuffled": summaries are dealt to '
                "other positions, and an anchor's neighbours are not near its own; leave it out"
            )
        yield from self._find_temperature_conflicts(name)
        yield from self._find_precision_conflicts(job, name)

    def _find_temperature_conflicts(self, name: str) -> Iterator[str]:
        if self.learns_temperature and self.temperature < LOWEST_LEARNED_TEMPERATURE:
            yield (
                f"{name}.temperature = {self.temperature} is below {LOWEST_LEARNED_TEMPERATURE}, the lowest that "
                f"{name}.learnable_temperature allows: raise it or do not learn it"
            )
        if self.learns_temperature and self.temperature > HIGHEST_LEARNED_TEMPERATURE:
            yield (
                f"{name}.temperature = {self.temperature} is above {HIGHEST_LEARNED_TEMPERATURE}, the highest that "
                f"{name}.learnable_temperature allows: lower it or do not learn it"
            )

    def _find_precision_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if not self.uses_fp8:
            return
        if job.training.mixed_precision_param != "bfloat16":
            yield (
                f'{name}.precision = "fp8" beside training.mixed_precision_param = "{job.training.mixed_precision_param}": set '
                'the one to "bf16" or the other to "bfloat16"'
            )
        if job.training.float8 != "none" and self.target not in TAUGHT:
            yield (
                f'{name}.precision = "fp8" beside training.float8 = "{job.training.float8}", which already runs both passes of '
                'the trained network in 8-bit floats: set the one to "bf16" or the other to "none"'
            )
