"""Future summary prediction, learned summaries (FSP-RevLM; Mahajan et al. 2025, arXiv:2510.14751).

A second network of the same shape, the reverse language model Q, reads each document from its end. Its final state r_t has read
the tokens from t to the end of the document. It predicts the token before, and the model's auxiliary head A predicts its
states:

    Q's loss: - ln Q(x_{t+1} | r_{t+2}),      L = || A(h_t) - sg[r_{t+2}] ||^2.

A position counts if it has a token two ahead: the summary leaves out the next token, which next-token prediction covers. The
paper adds L to next-token prediction with factor 1. It is a sum over the d channels. With a wide model, a
`fsp_revlm.loss_weight` of 1 / d makes it a mean.

A is a transformer layer with its norm, like each head of MTP. Here it reads the model's final states; in the paper it starts
below the last layer. r is the state after Q's final norm, and L a mean over positions, of which the paper says nothing. It
trains Q first, in as many steps, and then takes it as A's teacher: that is two runs, the second with `train_reverse = false`.
By default both are trained in one run. Then Q learns from the same batches, and its cross entropy is part of the objective's
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.causal_lm import build_on_meta, find_decoder_layers
from flame.models.extra_layer import build_extra_layer, find_extra_layer_conflicts
from flame.models.flops import ModelFlops, count_predicted, measure_lengths
from flame.models.output_head import read_head
from flame.models.wrapper import TrainingModel
from flame.objectives.base import AuxFlops, AuxLoss, LayerStack, Setup
from flame.objectives.fsp_revlm.options import ReverseSummaryOptions
from flame.objectives.future.representations import ProbeSample, measure_representations
from flame.objectives.label_objective import LabelObjective
from flame.objectives.step import list_predicted, pick
from flame.runtime.measures import Mean, Measures

DISTANCE = 2
"""From a position to the first token that its summary has read."""
KEPT_WIDTHS, BFLOAT16_BYTES = 6, 2
"""Vectors of the model's width kept for each token: the summary and its place, the prediction, and their gradients."""


class ReverseSummary(LabelObjective):
    """The auxiliary head and the reverse language model.

    Raises:
        UserError: as `build_extra_layer`.
    """

    name: ClassVar[str] = "fsp_revlm"
    Options: ClassVar[type[ReverseSummaryOptions]] = ReverseSummaryOptions

    def __init__(self, setup: Setup):
        assert isinstance(setup.options, ReverseSummaryOptions)
        super().__init__(setup, [build_extra_layer(self.name, setup.lm.config, setup.attention)])
        self.options = setup.options
        self.reverse = build_on_meta(setup.lm.config, setup.device_type, setup.attention)
        self.reverse.requires_grad_(self.options.train_reverse)

    @classmethod
    def find_model_conflicts(cls, options: ReverseSummaryOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        return find_extra_layer_conflicts(cls.name, config)

    def list_layer_stacks(self) -> Sequence[LayerStack]:
        own = LayerStack(find_decoder_layers(self.reverse), is_trained=self.options.train_reverse, is_network=True)
        return [*super().list_layer_stacks(), own]

    def count(self, batch: PackedBatch) -> int:
        return batch.count_ahead(DISTANCE)

    def list_required(self) -> Sequence[str]:
        return [] if self.options.train_reverse else ["reverse"]

    @property
    def fits_graph(self) -> bool:
        return True

    def prepare(self, backbone: TrainingModel, batch: PackedBatch, prepared: None) -> Tensor | None:
        """States [T, d] of a frozen reverse model; None if it is trained."""
        return None if self.options.train_reverse else backbone.encode_reversed(self.reverse, batch)

    def sum_losses(self, output: object) -> Tensor:
        raise NotImplementedError("`loss` is overridden")

    def loss(
        self,
        backbone: TrainingModel,
        hidden_states: Tensor,
        batch: PackedBatch,
        prepared: Tensor | None,
        *,
        with_sample: bool = False,
    ) -> AuxLoss:
        summaries = backbone.encode_reversed(self.reverse, batch) if prepared is None else prepared
        positions, documents, last = list_predicted(batch), batch.segment_ids[0], len(hidden_states) - 1
        here = torch.arange(last + 1, device=documents.device) if positions is None else positions
        there = (here + DISTANCE).clamp(max=last)
        labels = batch.labels[0][here]
        is_counted = (labels != NO_LABEL) & (here + DISTANCE <= last) & (documents[here] == documents[there])
        own = summaries[there]

        layer = cast(PreTrainedModel, self.layers[0])
        predictions = pick(backbone.encode_embeddings(layer, hidden_states, batch), positions)
        wide = torch.promote_types(predictions.dtype, torch.float32)
        targets = own.detach()
        distances = (predictions.to(wide) - targets.to(wide)).square().sum(dim=-1)
        distance = torch.where(is_counted, distances, 0.0).sum()
        count = is_counted.sum().to(distance.dtype)
        cosines = torch.where(is_counted, F.cosine_similarity(predictions.detach().to(wide), targets.to(wide), dim=-1), 0.0)
        measures: Measures = {
            "fsp_revlm_distance": Mean(distance.detach(), count),
            "fsp_revlm_cosine": Mean(cosines.sum(), count),
        }
        loss_sum = distance
        if self.options.train_reverse:
            ce = read_head(self.reverse).sum_cross_entropy(own, torch.where(is_counted, labels, NO_LABEL))
            measures["fsp_revlm_reverse_ce"] = Mean(ce.detach(), count)
            loss_sum = distance + self.options.reverse_weight * ce
        sample = None
        if with_sample:
            sample = ProbeSample(pick(hidden_states, positions).detach(), predictions.detach(), targets, here, is_counted)
        return AuxLoss(loss_sum, count, torch.zeros_like(count), measures, sample)

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        """The head; the reverse model forward and, if it is trained, its backward and output head."""
        heads = super().count_flops(batch, model).heads
        forward = model.count_causal_forward(measure_lengths(batch))
        if self.options.train_reverse:
            heads += 2 * forward + 6 * model.head * count_predicted(batch)
        return AuxFlops(forward, heads)

    def estimate_memory(self, tokens: int) -> float:
        return float(KEPT_WIDTHS * tokens * self.setup.lm.config.hidden_size * BFLOAT16_BYTES)

    def measure_sample(self, sample: ProbeSample, batch: PackedBatch, seed: int) -> dict[str, Mean]:
        return measure_representations(sample, batch, target_shift=DISTANCE, seed=seed)

    def explain_no_count(self) -> str:
        return f"no position counts for the {self.name} loss: it needs a token two ahead in its document"
