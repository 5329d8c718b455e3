"""An additional layer of the model's own kind on top of its final states: the heads of MTP and FSP."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.attention.backends import Attention, is_recurrent
from flame.errors import UserError
from flame.models.causal_lm import build_on_meta, find_decoder_layers

EMBEDDING_FACTOR = "embedding_multiplier"
"""Attribute of base models that multiply their embeddings in the forward, and so would multiply the states too (Granite)."""


def find_extra_layer_conflicts(objective: str, config: PretrainedConfig) -> Iterator[str]:
    """Yield a line if the family's layers cannot be run on hidden states.

    Args:
        objective: name of the objective that needs the layer.
    """
    if is_recurrent(config):
        yield (
            f'objective.name = "{objective}" is not supported with model_type "{config.model_type}": the recurrences of '
            'flash-linear-attention are not run on hidden states; use "top", which needs no further layer, or another model'
        )


def build_extra_layer(objective: str, config: PretrainedConfig, attention: Attention) -> PreTrainedModel:
    """Build a base model of one layer and a final norm, on the meta device, which runs on `inputs_embeds`. It has no token
    embedding, and neither multiplies the states nor adds positions to them.

    Args:
        objective: name of the objective that needs it, for messages.
        config: configuration of the language model. The layer is like its last layer.
        attention: attention of the language model.

    Raises:
        UserError: the family's code does not allow it.
    """
    kind = f'objective.name = "{objective}" is not supported with model_type "{config.model_type}"'
    advice = 'use "top", which needs no further layer, or another model'
    assert not is_recurrent(config)  # refused by `find_extra_layer_conflicts`; the device below matters only for these
    model = build_on_meta(copy.deepcopy(config), "cpu", attention)  # a copy, since the configuration is cut below
    base = cast(PreTrainedModel, model.base_model)
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        raise UserError(f"{kind}: its code takes no inputs_embeds, and so cannot run a layer on hidden states; {advice}")
    _keep_last_layer(base)
    base.set_input_embeddings(None)  # type: ignore[arg-type]  # nothing looks up tokens
    _drop_positions(base)
    if hasattr(base, EMBEDDING_FACTOR):
        setattr(base, EMBEDDING_FACTOR, 1.0)
    if any(isinstance(module, nn.Embedding) and module.num_embeddings == config.vocab_size for module in base.modules()):
        raise UserError(f"{kind}: its code has more than one embedding of tokens; {advice}")
    return base


def _keep_last_layer(base: PreTrainedModel) -> None:
    """Cut a built model and its configuration to the last layer. Lists with an entry for each layer keep the last entry.

    Building from a cut configuration would give a first layer instead, which may be of another kind. Some families choose experts
    or a dense MLP, or the scale of attention, by the number of the layer.
    """
    config, total = base.config, base.config.num_hidden_layers
    del find_decoder_layers(base)[:-1]
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setattr(config, key, value[-1:])
    config.num_hidden_layers = 1


def _drop_positions(base: PreTrainedModel) -> None:
    """Replace tables of learned positions, since the states already contain positions. A table of positions is an embedding as
    wide as the states that is not the one of tokens."""
    tokens, positions = base.config.vocab_size, getattr(base.config, "max_position_embeddings", None)
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Embedding) or child.embedding_dim != base.config.hidden_size:
                continue
            if child.num_embeddings == positions or child.num_embeddings != tokens:  # a byte-level model may have 256 of each
                setattr(parent, name, _NoPositions())


class _NoPositions(nn.Module):
    """Replaces a table of positions: adds 0, in any dtype."""

    def forward(self, positions: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros((), device=positions.device)
