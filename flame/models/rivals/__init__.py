"""Published objectives to compare the future loss with, each with the heads that it trains."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PretrainedConfig

from flame.config import JobConfig
from flame.models.future_encoder import Attention
from flame.models.rivals.bag_of_words import BagOfWords
from flame.models.rivals.multi_token import MultiTokenPrediction
from flame.models.rivals.rival import Encode, Rival, Trunk
from flame.models.rivals.token_order import TokenOrderPrediction

__all__ = ["Encode", "Rival", "RivalName", "Trunk", "build_rival"]

RivalName = Literal["mtp", "top", "fsp_bow"]


def build_rival(name: RivalName, config: JobConfig, model_config: PretrainedConfig, attention: Attention) -> Rival:
    """The rival `objective.name`, on meta.

    Args:
        model_config: of the language model.
        attention: as the language model's.

    Raises:
        UserError: the family has no layer that can be run on hidden states.
    """
    objective = config.objective
    # To the end of the document: no piece of one is longer than this.
    window = objective.window or config.training.context_len
    spread = getattr(model_config, "initializer_range", 0.02)
    with torch.device("meta"):
        if name == "mtp":
            return MultiTokenPrediction(objective.mtp_tokens, model_config, attention)
        if name == "top":
            return TokenOrderPrediction(window, model_config, spread)
        return BagOfWords(window, model_config, attention, spread)
