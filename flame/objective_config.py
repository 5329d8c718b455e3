"""Options of what is learned: the sections [objective], [future_encoder] and [future_predictor]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from flame.option_types import STRICT, NonNegativeFloat, NonNegativeInt, PositiveFloat, Probability

CONTRASTIVE = ("infonce", "bilinear")
"""Values of `future_encoder.estimator_type` that compare with negatives."""
LOWEST_LEARNED_TEMPERATURE = 0.01
HIGHEST_LEARNED_TEMPERATURE = 1.0
ObjectiveName = Literal["next_token", "future", "mtp", "top", "fsp_bow"]


@dataclass(kw_only=True)
class Objective:
    """What is learned beside the next token, and the options of the rivals of the future loss."""

    __pydantic_config__ = STRICT

    name: ObjectiveName | None = None
    """"next_token" alone; or with it "future", the summary of the anti-causal pass (see [future_encoder]); "mtp", the tokens
    behind the next one; "top", the order in which upcoming tokens come; "fsp_bow", the set of upcoming tokens. Unset:
    "future" with future_encoder.enable = true, else "next_token"."""
    loss_weight: PositiveFloat = 1.0
    """Factor of the loss of "mtp", "top" and "fsp_bow". (That of "future" is future_encoder.loss_weight.)"""
    mtp_tokens: Annotated[int, Field(ge=2)] = 4
    """Tokens that "mtp" predicts at each position, the next one included: each further one has a head of one layer."""
    window: NonNegativeInt = 0
    """Tokens ahead that "top" and "fsp_bow" are about; 0 is all up to the end of the document."""


@dataclass(kw_only=True)
class FutureEncoder:
    __pydantic_config__ = STRICT

    enable: bool | None = None
    """true is short for objective.name = "future", false for "next_token"; it cannot contradict it."""
    future_k: NonNegativeInt = 0
    """Window of the anti-causal attention, in tokens; 0 means up to the end of the document. The window is per layer:
    with L layers a summary reaches L x future_k tokens ahead."""
    target: Literal["self", "random", "ema", "mean_embedding", "causal", "shuffled"] = "self"
    """Where summaries come from: "self", the anti-causal pass of the network itself, or "random", that of a frozen
    network of the same shape with random weights of its own (docs/experiments.md says when to take it). The others are
    controls: the pass of a running average of the weights ("ema"); the mean embedding of the tokens ahead
    ("mean_embedding"); the causal pass, which has not seen the future ("causal"); the network's own, dealt to other anchors at
    random ("shuffled")."""
    ema_decay: Probability = 0.999
    """With target = "ema": share of the average that one step keeps."""
    target_shift: NonNegativeInt = 1
    """Position t predicts the summary of position t + target_shift. 0 is the method as first published: there the summary
    still holds token t itself, which the hidden state has already seen. Models that read documents reversed need 1 or more; for
    the others docs/experiments.md found 0 better on small graphs, 1 mostly on siblings, and on text the one or the other."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Arithmetic of the anti-causal forward on GPUs. "bf16" is that of the causal one (training.mixed_precision_param); "fp8"
    scales the rows of activations and weights to 8-bit floats in the matrix products of the decoder layers: faster, and the
    summaries are no longer exact."""
    projection_dim: NonNegativeInt = 0
    """Compare guesses and summaries in this many dimensions, to which a fixed random matrix takes the summaries; 0 compares
    them in the model's width."""
    max_anchors: NonNegativeInt = 0
    """Anchors per packed sequence, drawn at random; the others are neither guessed for nor negatives. 0 takes all."""
    negatives: Literal["local", "global"] = "local"
    """Negatives of an anchor: the summaries of its own packed sequence, or of all packed sequences of the step, on all ranks and
    in all micro-steps ("global"). Validation compares within a packed sequence either way."""
    exclude_neighbors: NonNegativeInt = 0
    """Summaries at most this many tokens from an anchor's own, in its document, are no negatives of it: much of their future
    is the same. An anchor that is left without negatives counts with a loss of 0."""
    exclude_duplicates: bool = False
    """Summaries of the same tokens as an anchor's own, as far as the window sees, are no negatives of it. What counts is the
    tokens from a summary's position on, with target = "causal" too."""
    loss_weight: NonNegativeFloat = 0.03
    """Factor of the future loss beside the cross entropy. 0 is the same run as objective.name = "next_token"."""
    start_step: NonNegativeInt = 0
    """First step with the future loss. Steps are counted from 1."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the factor grows linearly to loss_weight."""
    decay_steps: NonNegativeInt = 0
    """Steps, the last of the run, over which the factor falls linearly to 0, which it reaches one step after the last."""
    estimator_type: Literal["infonce", "bilinear", "cosine", "smooth_l1"] = "infonce"
    """How a guess is compared with its summary: "infonce" by cosine similarity, "bilinear" by a learned matrix between them (as
    in CPC), both against negatives; "cosine" and "smooth_l1" pull the two together without negatives, for comparison."""
    temperature: PositiveFloat = 0.1
    """Divides the scores of "infonce"; the matrix of "bilinear" starts as the identity over it."""
    learnable_temperature: bool = False
    """Learn the temperature, starting from future_encoder.temperature; it is kept between 0.01 and 1."""


@dataclass(kw_only=True)
class FuturePredictor:
    __pydantic_config__ = STRICT

    head_type: Literal["linear", "mlp", "gated"] = "mlp"
    """Map from a hidden state to the guess of its future."""
    input: Literal["hidden_states", "embedding"] = "hidden_states"
    """What is mapped: hidden states, or, as a control, the current token's embedding alone, without gradient."""
    dropout: Probability = 0.0
    """Dropout before the last layer of the head."""
    lr_scale: PositiveFloat = 1.0
    """Learning rate of predictor and estimator, relative to optimizer.lr."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the matrices of predictor and estimator ("bilinear" has one)."""


def resolve_objective(name: ObjectiveName | None, enable: bool | None, loss_weight: float) -> ObjectiveName:
    """What is learned under `objective.name`, `future_encoder.enable` and `future_encoder.loss_weight`."""
    chosen: ObjectiveName = name or ("future" if enable else "next_token")
    return "next_token" if chosen == "future" and loss_weight == 0 else chosen
