"""Reads the states after an early decoder layer of a network, from a pass that runs anyway.

    with read_layer(lm, depth) as layer:
        states = backend.encode_past(lm, batch)
        shallow = backend.flatten(layer.take(), batch)

The hook of a layer is installed once, at the first reading, and then stays: torch.compile compiles a layer anew whenever its
hooks change. It sits outside of the wrapper of activation checkpointing, so a recomputed layer is not read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flame.models.causal_lm import find_decoder_layers


class LayerOutput:
    """What one decoder layer has returned last, while it is read."""

    def __init__(self) -> None:
        self.is_read = False
        self._states: Tensor | None = None

    def take(self) -> Tensor:
        """States [rows, positions, d] after the layer, in the layout of the pass. They are no longer kept here.

        Raises:
            RuntimeError: the layer has not run since the reading began.
        """
        states, self._states = self._states, None
        if states is None:
            raise RuntimeError("the decoder layer that is read has not run")
        return states

    @torch._dynamo.disable
    def keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """The layer's forward hook."""
        if self.is_read:
            self._states = output[0] if isinstance(output, tuple) else output


_OUTPUTS: WeakKeyDictionary[nn.Module, LayerOutput] = WeakKeyDictionary()


@contextmanager
def read_layer(network: PreTrainedModel, depth: int) -> Iterator[LayerOutput]:
    """Read the states after decoder layer `depth` of passes that run inside.

    Call it after the layers have been wrapped (`flame.models.parallelize`).

    Args:
        depth: number of layers that have run, from 1.
    """
    layer = find_decoder_layers(network)[depth - 1]
    if layer not in _OUTPUTS:
        _OUTPUTS[layer] = LayerOutput()
        layer.register_forward_hook(_OUTPUTS[layer].keep)
    output = _OUTPUTS[layer]
    output.is_read = True
    try:
        yield output
    finally:
        output.is_read = False
        output._states = None


def choose_shallow_depth(num_layers: int, share: float) -> int:
    """The layer nearest to a share of the network's depth, from 1."""
    return max(1, round(share * num_layers))
