"""One more layer of a model's own kind on top of its final states: the heads of MTP and of FSP."""

from __future__ import annotations

import copy
import inspect
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.errors import UserError
from flame.models.causal_lm import build_on_meta
from flame.models.future_encoder import Attention, is_recurrent


def build_extra_layer(objective: str, config: PretrainedConfig, attention: Attention) -> PreTrainedModel:
    """A base model of one layer with a final norm, on meta, to be run on `inputs_embeds`. It has no embedding of tokens.

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
    model = build_on_meta(_keep_last_layer(config), "cpu", attention)
    layer = cast(PreTrainedModel, model.base_model)
    if "inputs_embeds" not in inspect.signature(layer.forward).parameters:
        raise UserError(f"{kind}: its code takes no inputs_embeds, and so cannot run a layer on hidden states; {advice}")
    layer.set_input_embeddings(None)  # type: ignore[arg-type]  # it may be absent: nothing looks tokens up
    if any(isinstance(module, nn.Embedding) and module.num_embeddings == config.vocab_size for module in layer.modules()):
        raise UserError(f"{kind}: its code has more than one embedding of tokens; {advice}")
    return layer


def _keep_last_layer(config: PretrainedConfig) -> PretrainedConfig:
    """A copy for a model of one layer. What is listed by layer keeps its last entry."""
    total, settings = config.num_hidden_layers, config.to_dict()
    cut = copy.deepcopy(config)
    for key, value in settings.items():
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setattr(cut, key, value[-1:])
    cut.num_hidden_layers = 1
    return cut
