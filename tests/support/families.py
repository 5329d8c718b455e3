"""A toy model of each softmax-attention family, by the name under which the tests show it."""

from __future__ import annotations

import copy

from transformers import AutoConfig, PretrainedConfig

from flame.attention.backends import Attention
from flame.attention.families import find_score_cap

WINDOW = 8
"""Of the layers that have one, in tokens."""

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_SHARED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_BY_LAYER = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_CAPS = {
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 8,
    "initializer_range": 0.2,
}
"""Scores and logits of the initial weights reach the caps."""
_MULTIPLIERS = {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}

TOYS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama, untied head, biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"sliding_window": None}),
    "qwen3": ("qwen3", {}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, **_BY_LAYER}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _BY_LAYER),
    "gemma3": ("gemma3_text", _BY_LAYER),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", _NO_DROPOUT),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_BY_LAYER, **_CAPS}),
    "gemma3, capped logits": ("gemma3_text", {**_BY_LAYER, **_CAPS, "attn_logit_softcapping": None}),
    "vaultgemma": ("vaultgemma", {**_BY_LAYER, **_CAPS}),
    "granite": ("granite", {"logits_scaling": 1.5, **_MULTIPLIERS}),
    "cohere": ("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.5, **_BY_LAYER}),
    "ministral": ("ministral", _BY_LAYER),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "olmo": ("olmo", {"clip_qkv": 0.05}),
    "phi": ("phi", {"tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}),
    "olmoe": ("olmoe", {**_EXPERTS, "num_experts": 4}),
    "mixtral": ("mixtral", _EXPERTS),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "sliding_window": None,
        },
    ),
    "glm4_moe": ("glm4_moe", {**_SHARED, "n_group": 2, "topk_group": 1}),
    "dots1": ("dots1", {**_SHARED, **_BY_LAYER}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, **_BY_LAYER}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v2, lite": (
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": None, "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
}


_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

OTHERS: dict[str, dict] = {
    "arcee": {},
    "codegen": {"rotary_dim": 4, **_NO_DROPOUT},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "helium": {},
    "gptj": {"rotary_dim": 4, **_NO_DROPOUT},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"logits_scaling": 1.5, **_MULTIPLIERS},
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 16, **_LATENT},
    "ministral3": {},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {},
    "persimmon": {},
    "seed_oss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "stablelm": {},
}
"""Families that are not in `flame.attention.families`, and run on the paths that any family does."""


def build_other(family: str, **changes: object) -> PretrainedConfig:
    """As `build_toy`, for a family of `OTHERS`."""
    dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return AutoConfig.for_model(family, **{"vocab_size": 61, **_SHAPE, **dropout, **OTHERS[family], **changes})


def list_paths(name: str) -> list[Attention]:
    """The attention implementations that run a toy on a CPU; the second is the definition of the flash kernels."""
    return ["dense"] if find_score_cap(build_toy(name)) is not None else ["sdpa", "varlen"]


def build_toy(name: str, **changes: object) -> PretrainedConfig:
    """Two layers of 32, vocabulary 61 unless changed. With latent attention, `head_dim` is the width of the rotary part, and
    there are as many heads of keys as of queries."""
    family, special = copy.deepcopy(TOYS[name])
    settings = {"vocab_size": 61, "tie_word_embeddings": True, **_SHAPE, **special, **changes}
    if "kv_lora_rank" in special:
        settings |= {"qk_rope_head_dim": settings["head_dim"], "num_key_value_heads": settings["num_attention_heads"]}
    return AutoConfig.for_model(family, **settings)
