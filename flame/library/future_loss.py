"""The future loss for a model that is already loaded: predictor and estimator on top of the two passes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flame.attention.backends import is_recurrent
from flame.attention.families import list_layer_limits, tighten
from flame.attention.masks import draw_anchors, find_anchors, find_neighbors
from flame.errors import UserError
from flame.library.leaks import require_no_leak
from flame.library.packs import IGNORED_LABEL, Pack
from flame.library.passes import check_window, encode_future, encode_past, eval_mode, find_device, find_lm, read_tokens
from flame.models.estimator import AuxLoss, Candidates
from flame.models.estimators import ESTIMATORS
from flame.models.future_predictor import FuturePredictorHead
from flame.models.head_check import find_head_error
from flame.models.mi_estimator import build_mi_estimator
from flame.models.output_head import OutputHead, find_head_fault, read_head
from flame.objectives.future.duplicates import hash_futures
from flame.runtime.measures import Mean

Reduction = Literal["mean", "sum"]


class FutureLoss(nn.Module):
    """Position t predicts the summary of position t + target_shift. The summaries of other positions are the negatives.

    The parameters are those of predictor and estimator, in float32 on the model's device. Give them to the optimizer together
    with the model's. The model is not a submodule: `parameters()`, `state_dict()` and `.to()` do not include it.

    Args:
        model: as `flame.encode_past`. If the tests of this package do not cover it, `flame.check_leaks` runs here.
        target_shift: position t predicts the summary of t + target_shift. 0 is the method as first published.
        window_k: window of the anti-causal attention, in tokens and per layer; 0, None and -1 mean no window.
        temperature, learnable_temperature, estimator_type, projection_dim: as `flame.build_mi_estimator`.
        head_type, dropout: as `flame.FuturePredictorHead`.
        max_anchors: number of positions that predict, drawn at random in each call. Others are not negatives. 0 takes all.
        exclude_neighbors: excludes from an anchor's negatives the summaries at most this many tokens away in its document.
        exclude_duplicates: excludes from an anchor's negatives the summaries of the same tokens as its own, within the window.

    Raises:
        UserError: the model is not supported, or not with these arguments.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_shift: int = 1,
        window_k: int | None = 0,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        estimator_type: str = "infonce",
        projection_dim: int = 0,
        head_type: Literal["linear", "mlp", "gated"] = "mlp",
        dropout: float = 0.0,
        max_anchors: int = 0,
        exclude_neighbors: int = 0,
        exclude_duplicates: bool = False,
    ):
        super().__init__()
        lm = find_lm(model)
        for name, value in {
            "target_shift": target_shift,
            "projection_dim": projection_dim,
            "max_anchors": max_anchors,
            "exclude_neighbors": exclude_neighbors,
        }.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} = {value}: allowed are integers >= 0")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature = {temperature}: allowed are finite numbers > 0")
        if projection_dim >= lm.config.hidden_size:
            raise ValueError(
                f"projection_dim = {projection_dim}: allowed is less than the model's width, {lm.config.hidden_size}"
            )
        if max_anchors == 1 and estimator_type in ESTIMATORS and ESTIMATORS[estimator_type].has_negatives:
            raise ValueError("max_anchors = 1 leaves no negatives: allowed are 0 (all) and 2 or more")
        if is_recurrent(lm.config) and target_shift == 0:
            raise UserError(
                f'target_shift = 0: model_type "{lm.config.model_type}" reads reversed documents, whose summaries hold their own '
                "token: set it to 1 or more"
            )
        self._model = (model,)  # in a tuple, so that nn.Module does not register it
        self.target_shift = target_shift
        self.window_k = check_window(lm, window_k)
        self.max_anchors = max_anchors
        self.exclude_neighbors = exclude_neighbors
        self.exclude_duplicates = exclude_duplicates
        self.metrics: dict[str, Tensor] = {}
        """Metrics of the last call, 0-d tensors: "num_anchors" and the means of `AuxLoss.measures`."""
        self._head_fault: str | None = None  # unknown until `next_token_loss` asks
        require_no_leak(lm, self.window_k)
        width = lm.config.hidden_size
        with torch.device(find_device(lm)):
            self.predictor = FuturePredictorHead(width, head_type, dropout, projection_dim or width)
            self.estimator = build_mi_estimator(estimator_type, width, temperature, learnable_temperature, projection_dim)
        self.float()

    def encode(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states [T, d] of the causal pass, with gradient: `flame.encode_past`."""
        return encode_past(self._model[0], input_ids, cu_seqlens)

    def summarize(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Summaries [T, d] of the anti-causal pass, without gradient: `flame.encode_future`. Call it before `encode`: then its
        memory is free before the causal pass stores activations."""
        return encode_future(self._model[0], input_ids, cu_seqlens, self.window_k)

    def next_token_loss(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Cross entropy of the next token inside each document, 0-d float32, without holding the logits.

        Args:
            hidden: [T, d] or [1, T, d], from `encode`.
            labels: int64 [T], the token to predict **at** each position, or -100. They are not shifted. None: the next token of
                the same document.
            reduction: "mean" over the labels that are not -100 (0 if there are none), or "sum".

        Raises:
            UserError: the model's logits are not its hidden states times its output head, with the scale and cap that its
                configuration names.
        """
        lm, (states, pack) = find_lm(self._model[0]), self._read(hidden, input_ids, cu_seqlens)
        if self._head_fault is None:
            self._head_fault = _find_head_fault(lm)
        if self._head_fault:
            raise UserError(f"next_token_loss cannot be used: {self._head_fault}; take the loss from the model's own")
        head = read_head(lm)
        wanted = pack.list_next_tokens() if labels is None else labels.reshape(-1).to(states.device)
        if len(wanted) != pack.total:
            raise ValueError(f"labels holds {len(wanted)} entries for {pack.total} tokens: they must be equal")
        if labels is not None:
            _check_labels(wanted, len(head.weight))
        device = states.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else torch.promote_types(states.dtype, head.weight.dtype)
        with torch.autocast(device, enabled=False):
            bias = None if head.bias is None else head.bias.to(dtype)
            loss = OutputHead(head.weight.to(dtype), bias, head.rule).sum_cross_entropy(states.to(dtype), wanted)
        return loss / (wanted != IGNORED_LABEL).sum().clamp(min=1) if _is_mean(reduction) else loss

    def forward(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        anchor_mask: Tensor | None = None,
        summaries: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The loss, 0-d, with gradients for `hidden` and the parameters of this module. Sets `metrics`.

        Args:
            hidden: [T, d] or [1, T, d], from `encode` or any causal pass that respects document boundaries.
            anchor_mask: bool [T], positions that may predict, such as those of answers. Others are not negatives.
            summaries: [T, d], from `summarize` or from another model (`flame.encode_future(teacher, ...)`). None computes them.
            reduction: "mean" over the anchors (0 if there are none), or "sum". Over several packed sequences, divide the sum by
                the sum of `metrics["num_anchors"]`.

        Returns:
            the loss; NaN if scores or their gradient are not finite. Then the gradient is 0.
        """
        states, pack = self._read(hidden, input_ids, cu_seqlens)
        is_mean = _is_mean(reduction)
        if summaries is None:
            summaries = self.summarize(input_ids, cu_seqlens)
        if summaries.shape != states.shape:
            raise ValueError(f"summaries has the shape {list(summaries.shape)}, hidden {list(states.shape)}: they must be equal")
        if self.training:
            self.estimator.limit_temperature()
        outcome = self._compare(states, summaries.detach(), pack, anchor_mask)
        count = outcome.num_items.clamp(min=1)
        self.metrics = {
            name: mean.total / torch.as_tensor(mean.items).clamp(min=1)
            for name, mean in outcome.measures.items()
            if isinstance(mean, Mean)
        }
        self.metrics["num_anchors"] = outcome.num_items
        loss = outcome.loss_sum / count if is_mean else outcome.loss_sum
        return torch.where(outcome.failed > 0, torch.nan, loss)

    def _read(self, hidden: Tensor, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Pack]:
        lm = find_lm(self._model[0])
        pack = read_tokens(lm, input_ids, cu_seqlens)
        states = hidden[0] if hidden.ndim == 3 and len(hidden) == 1 else hidden
        if states.shape != (pack.total, lm.config.hidden_size):
            raise ValueError(
                f"hidden has the shape {list(hidden.shape)}, but must hold {pack.total} states of width {lm.config.hidden_size}"
            )
        own = self.predictor.out.weight.device
        if states.device != own:
            raise ValueError(f"hidden is on {states.device}, the predictor on {own}: move this module with .to({states.device})")
        return states, pack

    def _compare(self, states: Tensor, summaries: Tensor, pack: Pack, anchor_mask: Tensor | None) -> AuxLoss:
        """Compare predictions from the anchors among states [T, d] with summaries [T, d]."""
        shift, segments = self.target_shift, pack.segment_ids[0]
        is_valid = find_anchors(segments, shift)
        if anchor_mask is not None:
            mask = anchor_mask.reshape(-1).to(states.device)
            if mask.dtype != torch.bool or len(mask) != pack.total:
                raise ValueError(f"anchor_mask must be bool [{pack.total}], not {mask.dtype} {list(anchor_mask.shape)}")
            is_valid = is_valid & mask
        positions = torch.arange(pack.total, device=states.device)
        if 0 < self.max_anchors < pack.total:
            number = torch.full((), int(torch.randint(2**31, ())), device=is_valid.device)  # a copy would wait for the device
            positions, is_valid = draw_anchors(is_valid, self.max_anchors, 0, number)
        ahead = (positions + shift) % max(pack.total, 1)
        excluded = keys = None
        if self.exclude_neighbors:
            first, last = (edge[positions] for edge in find_neighbors(segments, self.exclude_neighbors))
            excluded = torch.searchsorted(positions, first), torch.searchsorted(positions, last, side="right") - 1
        if self.exclude_duplicates and pack.total:
            keys = hash_futures(pack.input_ids[0], segments, self._find_horizon())[ahead]
        device = states.device.type
        seen = states[positions]
        if not torch.is_autocast_enabled(device):
            seen = seen.to(self.predictor.out.weight.dtype)
        predictions = self.predictor(seen)
        with torch.autocast(device, enabled=False):
            candidates = Candidates(
                self.estimator.encode_targets(summaries[ahead]),
                is_valid,
                torch.arange(len(positions), device=states.device),
                excluded,
                keys,
            )
            return self.estimator.compare_with(predictions.to(summaries.dtype), is_valid, candidates)

    def _find_horizon(self) -> int:
        """Number of tokens that a summary covers, including its own; 0 is all up to the end of the document."""
        config = find_lm(self._model[0]).config
        limits = [self.window_k] if is_recurrent(config) else [tighten(n, self.window_k) for n in list_layer_limits(config)]
        return sum(limits) + 1 if all(limits) else 0


def _find_head_fault(lm: PreTrainedModel) -> str | None:
    """Why the loss cannot be taken from the output head; empty if it can, None while the head is all zeros and cannot tell.
    Changes no weight: a graph may hold them."""
    if fault := find_head_fault(lm):
        return fault
    with eval_mode(lm), torch.autocast(find_device(lm).type, enabled=False):
        return find_head_error(lm, read_head(lm)) if lm.get_output_embeddings().weight.any() else None


def _check_labels(labels: Tensor, vocabulary_size: int) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype}: allowed is torch.int64")
    is_allowed = (labels == IGNORED_LABEL) | ((labels >= 0) & (labels < vocabulary_size))
    if not is_allowed.all():
        raise ValueError(
            f"labels holds {int(labels[~is_allowed][0])}: allowed are {IGNORED_LABEL} and the ids 0 to {vocabulary_size - 1}"
        )


def _is_mean(reduction: Reduction) -> bool:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction = "{reduction}": allowed are "mean" and "sum"')
    return reduction == "mean"
