"""How many weights take part in the arithmetic of one token."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def count_weights_used(model: PreTrainedModel) -> float:
    """Weights of the layers' matrices that one token meets; of experts, those that it is sent to. Embeddings and the output head
    are not among them."""
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= set() if head is None else {id(head.weight)}
    used = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in tables:
            is_of_experts = parameter.ndim == 3 and ".experts." in name
            share = model.config.num_experts_per_tok / len(parameter) if is_of_experts else 1
            used += parameter.numel() * share
    return used
