"""The future loss: every position predicts a summary of its own future.

    F = anti-causal forward, strictly-future attention inside each document, without gradient      (labels)
    h = causal forward                                                                             (with gradient)
    loss_t = InfoNCE( predictor(h_t), F_{t+s}; negatives: the summaries of other anchors )          s = target_shift

`prepare` makes the summaries, `loss` compares predictions with them. Summaries are labels and carry no gradient. The language
model learns through the causal forward alone, predictor and estimator through the loss. The action loss, if `future_action` has
one, is added: `flame.objectives.future.actions`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flame.attention.backends import is_recurrent
from flame.data.batch import NO_LABEL, PackedBatch
from flame.kernels.fp8 import Fp8Switch, check_fp8, install_fp8
from flame.models.causal_lm import find_decoder_layers
from flame.models.estimators import ESTIMATORS
from flame.models.flops import ModelFlops, count_matrix_weights, measure_lengths, measure_suffixes
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import build_mi_estimator, read_temperature
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops, AuxLoss, FuturePass, LayerStack, Objective, ParameterGroup, Setup, Task, WithLayer
from flame.objectives.future.actions import ActionLoss, Sample
from flame.objectives.future.anchors import (
    Anchors,
    choose_shift,
    count_anchors,
    find_anchor_bucket,
    find_excluded,
    select_anchors,
)
from flame.objectives.future.duplicates import hash_futures
from flame.objectives.future.negatives import GlobalCandidates, LocalCandidates, agree_on_size, gather_candidates
from flame.objectives.future.options import TAUGHT, ActionOptions, FutureOptions, PredictorOptions
from flame.objectives.future.representations import ProbeSample, measure_representations
from flame.objectives.future.summaries import find_horizon, shuffle_valid, summarize
from flame.objectives.future.teacher import build_teacher, move_average
from flame.runtime.measures import Last, Mean, Measures
from flame.runtime.seeds import derive_seed

CARD_OPTIONS = (
    "loss_weight",
    "target",
    "target_shift",
    "target_shift_max",
    "future_k",
    "layers",
    "temperature",
    "learnable_temperature",
)
"""Options that the model card always shows."""
TASK_OPTIONS = ("target", "target_shift", "target_shift_max", "future_k", "layers", "projection_dim", "estimator_type")
"""Options that decide what predictor and estimator learn."""
KEPT_OF_TOKENS, KEPT_OF_ANCHORS, BFLOAT16_BYTES = 2, 8, 2
"""Vectors of the model's width that are kept, for the estimate of memory: measured, 10 in all (docs/performance.md)."""
PREDICTOR_DRAW, ESTIMATOR_DRAW, TEACHER_DRAW, ACTION_DRAW = 1, 2, 4, 5
"""Numbers of the random draws of its modules: each has its own seed, so its weights do not depend on the others."""


class Prepared(NamedTuple):
    """The anchors of one packed sequence, and the candidates that their predictions are compared with."""

    anchors: Anchors
    candidates: LocalCandidates | GlobalCandidates


class FutureObjective(Objective):
    """Predictor, estimator, the network that makes the summaries if the language model does not, and any action loss."""

    name: ClassVar[str] = "future"
    Options: ClassVar[type[FutureOptions]] = FutureOptions
    count_metric: ClassVar[str | None] = "anchors"
    modules_belong_together: ClassVar[bool] = True
    trains_layer_read: ClassVar[bool] = True

    def __init__(self, setup: Setup):
        super().__init__(setup)
        assert isinstance(setup.options, FutureOptions)
        self.options = options = setup.options
        self.predictor_options = head = setup.get(PredictorOptions)
        actions = setup.get(ActionOptions)
        config = setup.lm.config
        teacher = build_teacher(setup, options.layers) if options.target in TAUGHT else None
        self._fp8: Fp8Switch | None = None
        if options.uses_fp8:
            check_fp8(setup.device_type)
            self._fp8 = install_fp8(find_decoder_layers(setup.lm if teacher is None else teacher))
        with torch.device("meta"):
            size = options.projection_dim or config.hidden_size
            self.predictor = FuturePredictorHead(config.hidden_size, head.head_type, head.dropout, size)
            self.estimator = build_mi_estimator(
                options.estimator_type,
                config.hidden_size,
                options.temperature,
                options.learns_temperature,
                options.projection_dim,
            )
            self.action = ActionLoss(actions, setup.lm, size) if actions.top_k else None
        self.teacher = teacher

    # ---------------------------------------------------------------- at the start

    @classmethod
    def find_model_conflicts(cls, options: FutureOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        if options.projection_dim and options.projection_dim >= config.hidden_size:
            yield (
                f"future_encoder.projection_dim = {options.projection_dim} is no less than the model's hidden_size = "
                f"{config.hidden_size}: set it to 0 to compare in the model's width"
            )
        if options.pass_layers >= config.num_hidden_layers:
            yield (
                f"future_encoder.layers = {options.layers} is no less than the model's num_hidden_layers = "
                f"{config.num_hidden_layers}: set it to 0 to run all layers"
            )
        if is_recurrent(config):
            what = f'model_type "{config.model_type}" reads reversed documents'
            if options.target_shift == 0 and not options.target_shift_max:
                yield f"future_encoder.target_shift = 0: {what}, whose summaries hold their own token: set it to 1 or more"
            if options.future_k:
                yield f"future_encoder.future_k = {options.future_k}: {what} and has no window: set it to 0"

    def initialize(self, draw: Callable[[nn.Module, int], None]) -> None:
        draw(self.predictor, PREDICTOR_DRAW)
        draw(self.estimator, ESTIMATOR_DRAW)
        if self.action is not None:
            draw(self.action, ACTION_DRAW)
        if self.teacher is not None:
            draw(self.teacher, TEACHER_DRAW)

    def start_new_run(self, backbone: TrainingModel) -> None:
        self._move_average(backbone, decay=0.0)

    def list_parameter_groups(self) -> Sequence[ParameterGroup]:
        head = self.predictor_options
        settings = head.lr_scale, head.weight_decay, head.warmup_steps
        return [ParameterGroup("predictor.", *settings), ParameterGroup("estimator.", *settings)]

    def list_layer_stacks(self) -> Sequence[LayerStack]:
        return [] if self.teacher is None else [LayerStack(find_decoder_layers(self.teacher), is_trained=False)]

    def list_compiled(self) -> Sequence[nn.Module]:
        return [self.predictor]

    def find_future_pass(self) -> FuturePass | None:
        if self.options.target in ("mean_embedding", "causal"):
            return None
        return FuturePass(self.options.future_k, self.teacher, self._count_run_layers())

    def find_layer_read(self) -> int | None:
        return (self.predictor_options.layer or None) if self.predictor_options.input == "hidden_states" else None

    def _count_run_layers(self) -> int:
        """Layers of its network that the anti-causal pass runs; 0 is all, as of a teacher, which has no others."""
        return self.options.pass_layers if self.teacher is None else 0

    # ---------------------------------------------------------------- in a step

    @property
    def fits_graph(self) -> bool:
        options = self.options
        return not (
            (options.negatives == "global" and ESTIMATORS[options.estimator_type].has_negatives)
            or options.target == "shuffled"
            or options.target_shift_max
            or options.uses_fp8
            or self.predictor_options.dropout
            or self.action is not None
        )

    def count(self, batch: PackedBatch) -> int:
        return count_anchors(batch, self._choose_shift(batch), self.options.max_anchors)

    def prepare_step(
        self, backbone: TrainingModel, batches: Sequence[PackedBatch]
    ) -> Sequence[GlobalCandidates] | Sequence[None]:
        """The candidates of the whole step, for each packed sequence; None if only the sequence's own are used."""
        if self.options.negatives == "local" or not ESTIMATORS[self.options.estimator_type].has_negatives:
            return [None] * len(batches)
        bucket = max(map(self._find_bucket, batches))
        if batches[0].answers_only:
            bucket = agree_on_size(bucket, batches[0].input_ids.device)
        return gather_candidates([backbone(self._collect_candidates, batch, self._select(batch, bucket)) for batch in batches])

    def prepare(self, backbone: TrainingModel, batch: PackedBatch, prepared: GlobalCandidates | None) -> Prepared:
        bucket = self._find_bucket(batch) if prepared is None else prepared.size
        anchors = self._select(batch, bucket)
        return Prepared(anchors, prepared or self._collect_candidates(backbone, batch, anchors))

    def loss(
        self,
        backbone: TrainingModel,
        hidden_states: Tensor,
        batch: PackedBatch,
        prepared: Prepared | WithLayer,
        *,
        with_sample: bool = False,
    ) -> AuxLoss:
        final_states = hidden_states
        if isinstance(prepared, WithLayer):
            prepared, hidden_states = prepared
        assert isinstance(prepared, Prepared)
        anchors = prepared.anchors
        if self.predictor_options.input == "embedding":
            hidden_states = backbone.embed_tokens(batch).detach()
        inputs = anchors.pick(hidden_states)
        predictions = self.predictor(inputs)
        excluded = find_excluded(batch, anchors, self.options.exclude_neighbors)
        candidates = prepared.candidates.list_candidates(excluded)
        aux = self.estimator.compare_with(predictions, anchors.is_valid, candidates)
        targets = candidates.summaries[candidates.own] if with_sample or self.action is not None else inputs
        if self.action is not None:
            labels = torch.where(anchors.is_valid, anchors.pick(batch.labels[0]), NO_LABEL)
            aux = self.action.add_to(aux, backbone, anchors.pick(final_states), labels, targets)
        if not with_sample:
            return aux._replace(sample=None)
        positions = torch.arange(len(inputs), device=inputs.device) if anchors.positions is None else anchors.positions
        compared = ProbeSample(inputs.detach(), predictions.detach(), targets, positions, anchors.is_valid)
        return aux._replace(sample=Sample(compared, aux.sample or {}))

    def after_step(self, backbone: TrainingModel) -> None:
        self.estimator.limit_temperature()
        self._move_average(backbone, self.options.ema_decay)

    def _select(self, batch: PackedBatch, bucket: int) -> Anchors:
        return select_anchors(batch, self._choose_shift(batch), bucket, self.setup.seed)

    def _find_bucket(self, batch: PackedBatch) -> int:
        return find_anchor_bucket(batch, self._choose_shift(batch), self.options.max_anchors)

    def _choose_shift(self, batch: PackedBatch) -> int:
        return choose_shift(batch, self.options, self.setup.seed)

    @torch.no_grad()
    def summarize(self, backbone: TrainingModel, batch: PackedBatch) -> Tensor:
        """Summaries [T, d], detached. Where only answers count, those in prompts may be anything."""
        with self._fp8.on() if self._fp8 is not None else nullcontext():
            return summarize(backbone, batch, self.options, self.teacher, self._count_run_layers()).detach()

    def _collect_candidates(self, backbone: TrainingModel, batch: PackedBatch, anchors: Anchors) -> LocalCandidates:
        """Summaries that the anchors of a packed sequence predict, one row each. They are also the negatives of one another."""
        options = self.options
        summaries = self.summarize(backbone, batch)
        with torch.no_grad():
            targets = anchors.pick_targets(summaries)
            keys = None
            if options.exclude_duplicates:
                horizon = find_horizon(options, backbone.lm.config)
                hashes = hash_futures(batch.input_ids[0], batch.segment_ids[0], horizon)
                keys = anchors.pick_targets(hashes)
            if options.target == "shuffled":
                order = shuffle_valid(anchors.is_valid, derive_seed(self.setup.seed, batch.sequence_index))
                targets, keys = targets[order], None if keys is None else keys[order]
            return LocalCandidates(self.estimator.encode_targets(targets), anchors.is_valid, keys)

    def _move_average(self, backbone: TrainingModel, decay: float) -> None:
        if self.teacher is not None and self.options.target == "ema":
            move_average(self.teacher, backbone.lm, decay)

    # ---------------------------------------------------------------- what is reported

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        """FLOPs of the anti-causal forward, the predictor and the comparison.

        If only answers count, the forward covers the answer suffixes. With N anchors and K candidates, InfoNCE costs 4 N K d,
        and a bilinear score 6 N d^2 more. The projection of summaries is not counted.
        """
        heads = self._count_comparison(batch)
        if self.action is not None:
            heads += self.action.count_flops(model, self._count_predictions(batch))
        return AuxFlops(self._count_summaries(batch, model), heads)

    def _count_summaries(self, batch: PackedBatch, model: ModelFlops) -> float:
        if self.options.target == "mean_embedding":
            return 0.0
        lengths = measure_lengths(batch)
        if self.options.target == "causal":
            return model.count_causal_forward(lengths)
        if batch.answers_only:
            lengths = measure_suffixes(batch)
        return model.count_future_forward(lengths, self.options.future_k, self.options.pass_layers)

    def _count_comparison(self, batch: PackedBatch) -> float:
        anchors = self.count(batch)
        packs = self.setup.sequences_per_step if self.options.negatives == "global" else 1
        compared = self.estimator.count_flops(anchors, anchors * packs)
        return float(6 * count_matrix_weights(self.predictor) * self._count_predictions(batch) + compared)

    def _count_predictions(self, batch: PackedBatch) -> int:
        """Rows that are computed: anchors or, where all tokens count, also those that have no target."""
        total = batch.input_ids.shape[1]
        return self.count(batch) if batch.answers_only else min(total, self.options.max_anchors or total)

    def estimate_memory(self, tokens: int) -> float:
        """The summaries, in their places and as targets, what predictor and InfoNCE keep of each anchor, and the action loss."""
        anchors = min(tokens, self.options.max_anchors or tokens)
        kept = (KEPT_OF_TOKENS * tokens + KEPT_OF_ANCHORS * anchors) * self.setup.lm.config.hidden_size * BFLOAT16_BYTES
        return kept if self.action is None else kept + self.action.estimate_memory(self.setup.lm, anchors)

    def read_metrics(self, compute_dtype: torch.dtype) -> Measures:
        temperature = read_temperature(self.estimator, compute_dtype)
        return {} if temperature is None else {"temperature": Last(temperature)}

    def measure_sample(self, sample: Sample, batch: PackedBatch, seed: int) -> dict[str, Mean]:
        return measure_representations(sample.compared, batch, self._choose_shift(batch), seed) | sample.action

    def describe_metrics(self, values: Mapping[str, float], prefix: str = "") -> str:
        loss, bound = values.get(f"{prefix}aux_loss"), values.get(f"{prefix}mi_lower_bound")
        accuracy, actions = values.get(f"{prefix}infonce_accuracy"), values.get(f"{prefix}action_loss")
        loss = None if loss is None else loss - (actions or 0.0)
        chance = f" (ln N {loss + bound:5.2f})" if loss is not None and bound is not None and not prefix else ""
        part = f" · of which actions {actions:6.3f}" if actions is not None else ""
        return chance + part + (f" · top-1 {100 * accuracy:5.1f}%" if accuracy is not None else "")

    def list_exported(self) -> Sequence[str]:
        return ["predictor.", "estimator."]

    def explain_taken(self, taken: Set[str]) -> Iterator[str]:
        if "estimator" in taken and self.options.only_starts_from_temperature:
            yield (
                f"future_encoder.temperature = {self.options.temperature:g} has no effect: it is where learning starts, and the "
                "estimator goes on from what was learned (checkpoint.load_objective = false starts anew)"
            )

    def describe_task(self) -> Task:
        """The fixed projection needs no comparison: the estimator has it."""
        options, seed = self.options, self.setup.seed
        teacher = f"a random network of training.seed = {seed}" if options.target == "random" else "no random network"
        named = {f"{options.section}.{name}": getattr(options, name) for name in TASK_OPTIONS}
        head = {f"{PredictorOptions.section}.{name}": getattr(self.predictor_options, name) for name in ("input", "layer")}
        return Task({"teacher": teacher}, named | head)

    def describe_training(self) -> str:
        options = self.options
        shown = {name: getattr(options, name) for name in CARD_OPTIONS} | options.list_cadence()
        return (
            "Beside next-token prediction, each position learned to predict a summary of its own future: "
            f"{options.estimator_type}, {self.predictor_options.head_type} predictor, "
            + ", ".join(f"{name} {json.dumps(value)}" for name, value in shown.items())
            + ("." if self.action is None else f"; {self.action.describe()}.")
        )

    def describe_modules(self) -> str:
        return (
            "the modules that predicted summaries of the future during training: `predictor.*` maps a hidden state to a "
            "prediction of its future, `estimator.*` scores the prediction"
        )

    def explain_no_count(self) -> str:
        return (
            "no position has a target, so the future loss teaches nothing. A target needs "
            f"future_encoder.{self.options.describe_shift()} more tokens of its document (or answer): lower it, or check why "
            "documents are so short"
        )
