"""Small models and packs for the tests of the library."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from flame.attention.families import find_score_cap
from tests.support.families import build_toy

CU = torch.tensor([0, 9, 10, 24, 30], dtype=torch.int32)
VOCAB = 61


def build(name: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = build_toy(name, **{"initializer_range": 0.2, **changes})
    if attention == "sdpa" and find_score_cap(config) is not None:
        attention = "eager"  # SDPA has no cap
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def draw(total: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (total,), generator=torch.Generator().manual_seed(seed))


def list_documents(cu: Tensor) -> list[tuple[int, int]]:
    return list(zip(cu.tolist()[:-1], cu.tolist()[1:], strict=True))


def small(family: str, **changes: object):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    return AutoConfig.for_model(family, **{**shape, "pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 8, **changes})


class Deaf(LlamaForCausalLM):
    """Its attention takes no mask."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
            )
