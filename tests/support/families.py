"""A toy model of each softmax-attention family, by the name under which the tests show it."""

from __future__ import annotations

import copy

from transformers import AutoConfig, PretrainedConfig

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
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
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


def build_toy(name: str, **changes: object) -> PretrainedConfig:
    """Two layers of 32, vocabulary 61 unless changed. With latent attention, `head_dim` is the width of the rotary part, and
    there are as many heads of keys as of queries."""
    family, special = copy.deepcopy(TOYS[name])
    settings = {"vocab_size": 61, "tie_word_embeddings": True, **_SHAPE, **special, **changes}
    if "kv_lora_rank" in special:
        settings |= {"qk_rope_head_dim": settings["head_dim"], "num_key_value_heads": settings["num_attention_heads"]}
    return AutoConfig.for_model(family, **settings)
