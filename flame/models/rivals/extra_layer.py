"""One more layer of a model's own kind on top of its final states: the heads of MTP and of FSP."""

from __future__ import annotations

import copy
import inspect
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.errors import UserError
from flame.models.causal_lm import build_on_meta, find_decoder_layers
from flame.models.future_encoder import Attention, is_recurrent


def build_extra_layer(objective: str, config: PretrainedConfig, attention: Attention) -> PreTrainedModel:
    """A base model of one layer with a final norm, on meta, to be run on `inputs_embeds`. It has no embedding of tokens, and
    adds no positions to the states.

    Args:
        objective: name of the objective that wants it, for messages.
        config: of the language model; the layer is as its last one.
        attention: as the language model's.

    Raises:
        UserError: the family's code does not allow it.
    """
    kind = f'objective.name = "{objective}" is not supported with model_type "{config.model_type}"'
    advice = 'use "top", which needs no further layer, or another model'
    assert not is_recurrent(config)  # `check_fits_run` has refused them; the device below matters for them alone
    model = build_on_meta(copy.deepcopy(config), "cpu", attention)  # a copy, as the configuration is cut too
    base = cast(PreTrainedModel, model.base_model)
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        raise UserError(f"{kind}: its code takes no inputs_embeds, and so cannot run a layer on hidden states; {advice}")
    _keep_last_layer(base)
    base.set_input_embeddings(None)  # type: ignore[arg-type]  # it may be absent: nothing looks tokens up
    _drop_positions(base)
    if any(isinstance(module, nn.Embedding) and module.num_embeddings == config.vocab_size for module in base.modules()):
        raise UserError(f"{kind}: its code has more than one embedding of tokens; {advice}")
    return base


def _keep_last_layer(base: PreTrainedModel) -> None:
    """Cut a built model, and its configuration, to its last layer. What is listed by layer keeps its last entry.

    A model built from a cut configuration would have a first layer, which may be of another kind: families go by the layer's
    number for experts or a dense MLP, or for the scale of attention.
    """
    config, total = base.config, base.config.num_hidden_layers
    del find_decoder_layers(base)[:-1]
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setattr(config, key, value[-1:])
    config.num_hidden_layers = 1


def _drop_positions(base: PreTrainedModel) -> None:
    """Replace tables of learned positions, which the states hold already: those as wide as the states, but for one of tokens."""
    tokens, positions = base.config.vocab_size, getattr(base.config, "max_position_embeddings", None)
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Embedding) or child.embedding_dim != base.config.hidden_size:
                continue
            if child.num_embeddings == positions or child.num_embeddings != tokens:  # a byte-level model may have 256 of both
                setattr(parent, name, _NoPositions())


class _NoPositions(nn.Module):
    """In place of a table of positions: 0 to add, whatever the dtype of the states."""

    def forward(self, positions: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros((), device=positions.device)
