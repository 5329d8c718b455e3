"""Dropout of the causal pass of a training step: `training.dropout`.

As in "Attention is all you need" (Vaswani et al. 2017, section 5.4), it acts on the output of each sub-layer before it is added
to the residual stream, and on the embeddings, positions included. GPT-2 has the same as `resid_pdrop` and `embd_pdrop`.
Attention weights have none.

It acts where gradients are recorded, in training mode. That is the causal pass of a step and, to the bit, its recomputation by
activation checkpointing. Labels are made without gradient, and validation runs in evaluation mode too. torch.compile has
different graphs with and without gradient in any case.

Which modules add to the stream is not guessed from their names but found by an experiment. All children of a decoder layer are
replaced by given tensors. The layer must then return its input plus a multiple of some of them. In Llama these are those of
attention and MLP, in Gemma 2 and OLMo 2 those of the norms after them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flame.errors import UserError
from flame.models.causal_lm import find_decoder_layers

TOKENS = 5
"""Of the input of the experiment. Not a length of `LENGTHS`, so no code can take rows of a tensor for the parts of a tuple."""
LENGTHS = (0, 2, 3)
"""Lengths of the tuples that a block may return, its output first; 0 is the output alone. They are tried in turn."""
LARGEST_ERROR = 1e-5
"""Relative. Some layers compute in float32 inside."""


def add_dropout(lm: PreTrainedModel, probability: float) -> None:
    """Install dropout in a model, in place. It changes neither names nor values of its tensors.

    Call it before layers are wrapped for activation checkpointing, so that what is recomputed has it, and after modules are
    exchanged.

    Args:
        lm: the model, which may be on the meta device.
        probability: of a number to be zero.

    Raises:
        UserError: it cannot be told which modules of a decoder layer add to the residual stream.
    """
    layers = find_decoder_layers(lm)
    found = [find_stream_writers(layer, lm.config.hidden_size) for layer in layers]
    if not all(found):
        raise UserError(
            f'training.dropout = {probability} is not supported with model_type "{lm.config.model_type}": it cannot be told '
            f"which modules of its decoder layer {found.index([])} add to the residual stream; set it to 0"
        )
    drop_output, drop_input = partial(_drop_output, probability), partial(_drop_input, probability)
    for layer, names in zip(layers, found, strict=True):
        for name in names:
            layer.get_submodule(name).register_forward_hook(drop_output)
    layers[0].register_forward_pre_hook(drop_input, with_kwargs=True)


def _drop(probability: float, layer: nn.Module, states: Tensor) -> Tensor:
    return F.dropout(states, probability) if layer.training and torch.is_grad_enabled() else states


def _drop_output(probability: float, module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook of a module that adds to the stream."""
    if isinstance(output, tuple):
        return (_drop(probability, module, output[0]), *output[1:])
    return _drop(probability, module, output)


def _drop_input(probability: float, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Forward pre-hook of the first layer, whose input is the embeddings' output."""
    if inputs:
        return (_drop(probability, layer, inputs[0]), *inputs[1:]), named
    first = next(iter(inspect.signature(layer.forward).parameters))
    return inputs, named | {first: _drop(probability, layer, named[first])}


# ---------------------------------------------------------------- which modules add to the stream


def find_stream_writers(layer: nn.Module, width: int) -> list[str]:
    """Names of the children of a decoder layer whose outputs it adds to the residual stream, possibly times a constant.

    Args:
        layer: may be on the meta device. It is left as it is.
        width: d, of the stream.

    Returns:
        none if it cannot be told: something else is added, an output is changed before, or the layer does not run this way.
    """
    children = [name for name, _ in layer.named_children()]
    generator = torch.Generator().manual_seed(0)
    stream, *values = torch.randn(1 + len(children), 1, TOKENS, width, generator=generator, dtype=torch.float64)
    for lengths in _list_lengths(layer):
        try:
            with torch.no_grad():
                found = _find_terms(layer, stream, dict(zip(children, values, strict=True)), lengths)
        except Exception:  # the layer's own code may raise anything when it is given something else than it expects
            continue
        if found:
            return found
    return []


def _list_lengths(layer: nn.Module) -> Iterator[dict[str, int]]:
    """For each child, the length of the tuple that it returns: all combinations. Modules without children return no tuples."""
    choices = [(name, LENGTHS if any(True for _ in child.children()) else (0,)) for name, child in layer.named_children()]
    for lengths in product(*(allowed for _, allowed in choices)):
        yield {name: length for (name, _), length in zip(choices, lengths, strict=True)}


def _find_terms(layer: nn.Module, stream: Tensor, values: dict[str, Tensor], lengths: dict[str, int]) -> list[str]:
    """Names of the children with a term in the layer's output, which must be the stream plus these terms; else none."""

    def run(shown: Sequence[str]) -> Tensor:
        """What the layer adds to the stream if these children return their values, and the others zeros."""
        given = {name: value if name in shown else torch.zeros_like(value) for name, value in values.items()}
        return _run_with(layer, stream, given, lengths) - stream

    alone = {name: run([name]) for name in values}
    factors = {name: (alone[name] * value).sum() / value.square().sum() for name, value in values.items()}
    terms = {name: factors[name] * value for name, value in values.items()}
    pairs = [(run(list(values)), torch.stack(list(terms.values())).sum(0)), *((alone[name], terms[name]) for name in values)]
    if not all(torch.allclose(found, expected, rtol=0, atol=LARGEST_ERROR) for found, expected in pairs):
        return []
    return [name for name, factor in factors.items() if abs(factor) > LARGEST_ERROR]


def _run_with(layer: nn.Module, stream: Tensor, given: dict[str, Tensor], lengths: dict[str, int]) -> Tensor:
    """Output of a copy of the layer whose children return these values."""
    copied = copy.copy(layer)
    copied._modules = {name: _Given(value, lengths[name]) for name, value in given.items()}
    others = list(inspect.signature(layer.forward).parameters.values())[1:]
    needed = [each for each in others if each.default is each.empty]
    missing = {each.name: None for each in needed if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
    output = copied.forward(stream, **missing)
    return output[0] if isinstance(output, tuple) else output


class _Given(nn.Module):
    """Returns a tensor in the layout of its input, or a tuple that begins with it."""

    def __init__(self, value: Tensor, length: int):
        super().__init__()
        self.value, self.length = value, length

    def forward(self, *inputs: Any, **named: Any) -> Any:
        (states, *_) = [each for each in (*inputs, *named.values()) if isinstance(each, Tensor)]
        value = self.value.reshape(*states.shape[:-1], self.value.shape[-1])
        return (value, *[None] * (self.length - 1)) if self.length else value
