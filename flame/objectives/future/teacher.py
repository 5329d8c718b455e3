"""The second network that makes summaries where the language model does not make them itself."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flame.models.causal_lm import build_on_meta
from flame.models.first_layers import keep_first_layers
from flame.objectives.base import Setup

RECOMPUTED = "_checkpoint_wrapped_module."
"""In names of the language model's layers where activation checkpointing wraps them. A teacher's layers are never wrapped."""


def build_teacher(setup: Setup, layers: int) -> PreTrainedModel:
    """A network of the language model's shape, on the meta device, that is not trained.

    Args:
        layers: decoder layers that it has, the first ones; 0 is all.
    """
    teacher = build_on_meta(deepcopy(setup.lm.config), setup.device_type, setup.attention).requires_grad_(False)
    keep_first_layers(teacher, layers)
    return teacher


@torch.no_grad()
def move_average(teacher: PreTrainedModel, lm: PreTrainedModel, decay: float) -> None:
    """Update a running average of the weights: decay * average + (1 - decay) * language model."""
    averages, weights = _name_local(teacher), _name_local(lm)
    means = [name for name, tensor in averages.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([averages[name] for name in means], [weights[name] for name in means], 1 - decay)
    for name in averages.keys() - means:  # counts have no mean
        averages[name].copy_(weights[name])


def _name_local(network: PreTrainedModel) -> dict[str, Tensor]:
    """This rank's shards of all weights by name, and the saved buffers, such as the correction of a router's scores."""
    saved = {
        f"{prefix}.{name}": buffer
        for prefix, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    named = dict(network.named_parameters()) | saved
    return {name.replace(RECOMPUTED, ""): each.to_local() if isinstance(each, DTensor) else each for name, each in named.items()}
