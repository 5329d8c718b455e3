"""Vectors of the future from an exported model: the predictions of its predictor, and the summaries of its anti-causal pass.

The prediction of a text is the predictor's output at its last token. Its summary is the anti-causal state at its first token, as
the loss compares it. The prediction of a prefix and the summary of what follows it are trained to be near each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from flame.errors import UserError
from flame.library.passes import encode_future, encode_past, encode_past_and_layer, find_lm
from flame.library.texts import pack
from flame.models.estimator import Estimator
from flame.models.first_layers import run_first_layers
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import BilinearEstimator, build_mi_estimator
from flame.weights.export import name_objective_file
from flame.weights.source import TASK_KEY

OBJECTIVE = "future"
SECTION = "future_encoder"


class FutureModules(NamedTuple):
    """The predictor and the estimator of a run with the future loss, from its export."""

    predictor: FuturePredictorHead
    estimator: Estimator
    options: dict[str, Any]
    """Options of the task, such as "future_encoder.target_shift"."""

    @property
    def shift(self) -> int:
        """Tokens from a position to its target. One that was drawn anew for each sequence counts as 1."""
        return 1 if self.options.get(f"{SECTION}.target_shift_max") else int(self.options[f"{SECTION}.target_shift"])


class Vectors(NamedTuple):
    """Unit vectors of n texts, float32 on the CPU."""

    states: Tensor
    """[n, d], final hidden state of the last token."""
    predictions: Tensor
    """[n, e]: their products with `summaries` are the scores of the loss, up to the temperature; of "bilinear", up to a factor
    for each prediction."""
    summaries: Tensor
    """[n, e], of the whole text."""


def load_modules(folder: Path, device: torch.device) -> FutureModules:
    """Load what a run with the future loss has exported beside its model.

    Raises:
        UserError: the folder has no such file, or its summaries are not those of the model itself.
    """
    path = folder / name_objective_file(OBJECTIVE)
    if not path.is_file():
        raise UserError(f'{path}: no such file: give the export (hf/) of a run with objective.name = "future"')
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
        options = json.loads((file.metadata() or {}).get(TASK_KEY, "{}")).get("options", {})
    if f"{SECTION}.target" not in options:
        raise UserError(f"{path} does not say what it was trained for: export the run again with this version")
    if (target := options[f"{SECTION}.target"]) != "self":
        raise UserError(f'{path}: {SECTION}.target = "{target}": its summaries come from what is not exported; this needs "self"')
    if options.get("future_predictor.input", "hidden_states") != "hidden_states":
        raise UserError(f"{path}: its predictor reads embeddings alone, as a control, and predicts nothing from a text")
    return FutureModules(_build_predictor(tensors).to(device), _build_estimator(tensors, options).to(device), options)


def _build_predictor(tensors: dict[str, Tensor]) -> FuturePredictorHead:
    own = {name.removeprefix("predictor."): each for name, each in tensors.items() if name.startswith("predictor.")}
    head_type = "gated" if "body.gate.weight" in own else "mlp" if "body.0.weight" in own else "linear"
    size, width = own["out.weight"].shape
    predictor = FuturePredictorHead(width, head_type, output_size=size)  # type: ignore[arg-type]  # one of its three
    predictor.load_state_dict({name: each.float() for name, each in own.items()})
    return predictor.eval()


def _build_estimator(tensors: dict[str, Tensor], options: dict[str, Any]) -> Estimator:
    own = {name.removeprefix("estimator."): each for name, each in tensors.items() if name.startswith("estimator.")}
    kind, width = options[f"{SECTION}.estimator_type"], tensors["predictor.norm.weight"].shape[0]
    size = options.get(f"{SECTION}.projection_dim", 0)
    estimator = build_mi_estimator(kind, width, learnable_temperature="log_temperature" in own, projection_dim=size)
    estimator.load_state_dict({name: each.float() for name, each in own.items()})
    return estimator.eval()


@torch.no_grad()
def predict(modules: FutureModules, states: Tensor) -> Tensor:
    """Predictions [n, e] from the states [n, d] that the predictor reads, in the space in which they score summaries. Those of
    "bilinear" are divided by their length, which the loss does not do."""
    predictions = modules.predictor(states.float())
    if isinstance(modules.estimator, BilinearEstimator):
        return F.normalize(predictions @ modules.estimator.weight, dim=-1)
    return predictions


@torch.no_grad()
def summarize(modules: FutureModules, lm: nn.Module, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Summaries [T, e] of all positions of a packed sequence, as the loss compares them."""
    with run_first_layers(find_lm(lm), int(modules.options.get(f"{SECTION}.layers", 0))):
        summaries = encode_future(lm, input_ids, cu_seqlens, modules.options[f"{SECTION}.future_k"])
    return F.normalize(modules.estimator.encode_targets(summaries.float()), dim=-1)


@torch.no_grad()
def read_states(modules: FutureModules, lm: nn.Module, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states [T, d], and the states [T, d] that the predictor reads."""
    if depth := modules.options.get("future_predictor.layer", 0):
        return encode_past_and_layer(lm, input_ids, cu_seqlens, depth)
    states = encode_past(lm, input_ids, cu_seqlens)
    return states, states


def embed(modules: FutureModules, lm: nn.Module, texts: Sequence[Tensor], most_tokens: int, end: int | None = None) -> Vectors:
    """Vectors of texts, int64 [n] each.

    Args:
        most_tokens: of a forward.
        end: the token that ends a document. Where a text has it, states and predictions are those before it: after it comes
            nothing, and the predictor has never been trained on it.
    """
    states, predictions, summaries = [], [], []
    for tokens, cu_seqlens in pack(texts, most_tokens):
        first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long() - 1
        if end is not None:
            last = torch.where((tokens[last] == end) & (last > first), last - 1, last)
        final, read = read_states(modules, lm, tokens, cu_seqlens)
        states.append(F.normalize(final[last].float(), dim=-1).cpu())
        predictions.append(predict(modules, read[last]).cpu())
        summaries.append(summarize(modules, lm, tokens, cu_seqlens)[first].cpu())
    return Vectors(torch.cat(states), torch.cat(predictions), torch.cat(summaries))
