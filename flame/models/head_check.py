"""Checks that a model's own forward makes the logits of `flame.models.output_head` from its last hidden states.

A family may scale, cap, shift or cut its logits in ways that the trainer, which computes the loss from the last hidden states,
does not know. So the model's forward is run with chosen last hidden states in place of its base model's. No layer runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flame.attention.backends import is_recurrent
from flame.attention.fla_families import is_tested_fla
from flame.errors import UserError
from flame.models.leak_check import left_as_it_was
from flame.models.output_head import OutputHead
from flame.models.wrapper import TrainingModel

SIZES = (0.0, 1.0, 20.0, 5e3)
"""Root mean square of the raw logits that the states give, one for each group of states: 0 shows a bias, the largest a cap."""
STATES = 4
"""States of each size."""
LARGEST_ERRORS = {torch.float32: 0.005, torch.float64: 0.005}
LARGEST_ROUNDED_ERROR = 0.02
"""Largest relative error of each group, by dtype: in bfloat16, families round once for each operation."""
SEED = 0


class _States(BaseModelOutputWithPast):
    """The output of a base model. What a family's forward passes on beside the states is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _returning(lm: PreTrainedModel, states: Tensor) -> Iterator[list[bool]]:
    """Let the base model return these states. The list holds an entry for each time it did."""
    calls: list[bool] = []

    def forward(*_: Any, **__: Any) -> _States:
        calls.append(True)
        return _States(last_hidden_state=states)

    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else lm.base_model
    parts: list[nn.Module] = [part for part in {id(part): part for part in (lm.base_model, decoder)}.values() if part is not lm]
    before = [vars(part).get("forward") for part in parts]
    for part in parts:
        part.forward = forward
    try:
        yield calls
    finally:
        for part, own in zip(parts, before, strict=True):
            del part.forward
            if own is not None:
                part.forward = own


@torch.no_grad()
def find_head_error(lm: PreTrainedModel, head: OutputHead) -> str:
    """What is wrong with the head, as the model's own forward computes logits; empty if nothing is.

    Args:
        lm: in evaluation mode. Its output head is not all zero.
        head: of the model, with whole parameters.
    """
    weight = head.weight.detach()
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(STATES, weight.shape[1], generator=generator).to(weight.device, torch.float32)
    directions = directions / (directions.to(weight.dtype) @ weight.T).float().square().mean().sqrt()
    groups = [(size * directions).to(weight.dtype) for size in SIZES]
    states = torch.cat(groups)
    ids = torch.zeros(1, len(states), dtype=torch.long, device=weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with _returning(lm, states[None]) as calls:
        found = lm(**_select_taken(lm, inputs)).logits
    if not calls:
        return "its forward does not call its base model"
    if found.shape != (1, len(states), len(weight)):
        return f"its logits have the shape {list(found.shape)} instead of {[1, len(states), len(weight)]}"
    largest = LARGEST_ERRORS.get(weight.dtype, LARGEST_ROUNDED_ERROR)
    for ours, theirs in zip(groups, found[0].float().split(STATES), strict=True):
        expected = head.compute_logits(ours).float()
        error, size = (theirs - expected).norm(), expected.norm()
        if not error <= largest * size:
            return "its logits are not its base model's last hidden states times its output embedding, " + _describe(head)
    return ""


def _select_taken(lm: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the model takes."""
    parameters = inspect.signature(lm.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _describe(head: OutputHead) -> str:
    scale, cap = head.rule
    bias = "with" if head.bias is not None else "without"
    return f"{bias} bias, times {scale:g}, {f'capped at {cap:g}' if cap is not None else 'without a cap'}"


def needs_head_check(config: PretrainedConfig) -> bool:
    """All but the tested families of flash-linear-attention, which have no rule for logits."""
    return not (is_recurrent(config) and is_tested_fla(config))


def check_head(model: TrainingModel, device: torch.device) -> None:
    """Compare the logits from which the loss is taken with the model's own. All ranks must call it together.

    Args:
        model: with storage and initial weights, sharded or not. It is left as it was.

    Raises:
        UserError: they differ.
    """
    name = f'model_type "{model.lm.config.model_type}"'
    with left_as_it_was(model, device):
        try:
            fault = model(lambda root: find_head_error(root.lm, root.output_head))
        except Exception as error:  # the model's own code may raise anything
            fault = f"its forward cannot be run on given states ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    if fault:
        raise UserError(f"{name} is not supported: {fault}, from which the loss is taken; it cannot be trained here")
