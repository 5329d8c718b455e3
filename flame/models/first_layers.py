"""Runs, or keeps, only the first decoder layers of a network. The norm after the last layer follows them as it follows all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from flame.models.causal_lm import find_decoder_layers


@contextmanager
def run_first_layers(network: PreTrainedModel, count: int) -> Iterator[None]:
    """Passes inside run the first `count` decoder layers; 0 is all. Compiled and sharded layers are used as they are."""
    layers = find_decoder_layers(network)
    if count in (0, len(layers)):
        yield
        return
    owner, name = _find_owner(network, layers)
    setattr(owner, name, nn.ModuleList(list(layers)[:count]))
    try:
        yield
    finally:
        setattr(owner, name, layers)


def keep_first_layers(network: PreTrainedModel, count: int) -> None:
    """Remove all decoder layers after the first `count` from a network that has its configuration to itself; 0 keeps all."""
    layers = find_decoder_layers(network)
    if count:
        del layers[count:]
        network.config.num_hidden_layers = len(layers)


@contextmanager
def watch_next_layer(network: PreTrainedModel, count: int) -> Iterator[list[str]]:
    """A list that is filled if a pass inside runs the layer after the first `count`. Then the network does not run its
    list of layers. 0 watches none."""
    found: list[str] = []
    layers = find_decoder_layers(network)
    if count in (0, len(layers)):
        yield found
        return
    hook = layers[count].register_forward_pre_hook(lambda *_: found.append(type(network).__name__))
    try:
        yield found
    finally:
        hook.remove()


def _find_owner(network: nn.Module, layers: nn.ModuleList) -> tuple[nn.Module, str]:
    """The module that has the list as a child, and the child's name."""
    return next((module, name) for module in network.modules() for name, child in module.named_children() if child is layers)
