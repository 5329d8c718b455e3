"""The softmax-attention model families of transformers that the trainer supports, and their attention windows.

`tests/attention/test_families.py` tests both passes of each family on a toy model. Other families can be trained too, if they
have neither windows nor experts. On GPUs they run on FlexAttention. A leak check runs when training starts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from transformers import PretrainedConfig


class Family(NamedTuple):
    takes_flex: bool = True
    """Whether FlexAttention supports it. If not, SDPA with dense T x T masks is used where the flash kernels cannot run."""
    windows: Literal["none", "all layers", "by layer"] = "none"
    """Which layers have a sliding window. "by layer": those that `layer_types` lists; each type has its own mask."""
    has_experts: bool = False
    """Whether layers may be mixtures of experts."""
    has_sinks: bool = False
    """Whether the softmax has an attention sink, see `flame.attention.sinks`."""
    caps_scores: bool = False
    """Whether attention scores have the cap `attn_logit_softcapping`, if it is set."""


FAMILIES = {
    "cohere": Family(),
    "cohere2": Family(windows="by layer"),
    "deepseek_v2": Family(has_experts=True),
    "deepseek_v3": Family(has_experts=True),
    "dots1": Family(windows="by layer", has_experts=True),
    "gemma2": Family(windows="by layer", caps_scores=True),
    "gemma3_text": Family(windows="by layer"),
    "glm4_moe": Family(has_experts=True),
    "gpt2": Family(takes_flex=False),
    "gpt_neox": Family(),
    "gpt_oss": Family(windows="by layer", has_experts=True, has_sinks=True),
    "granite": Family(),
    "llama": Family(),
    "ministral": Family(windows="by layer"),
    "mistral": Family(windows="all layers"),
    "mixtral": Family(windows="all layers", has_experts=True),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(windows="by layer"),
    "olmoe": Family(takes_flex=False, has_experts=True),
    "phi": Family(),
    "phi3": Family(windows="all layers"),
    "qwen2": Family(windows="by layer"),
    "qwen2_moe": Family(windows="by layer", has_experts=True),
    "qwen3": Family(windows="by layer"),
    "qwen3_moe": Family(windows="all layers", has_experts=True),
    "smollm3": Family(windows="by layer"),
    "starcoder2": Family(windows="all layers"),
    "vaultgemma": Family(windows="by layer", caps_scores=True),
}

FULL, SLIDING = "full_attention", "sliding_attention"


def find_family(config: PretrainedConfig) -> Family | None:
    """The family's entry in `FAMILIES`. None if it is not listed, or if the model brings its own code."""
    return None if hasattr(config, "auto_map") else FAMILIES.get(config.model_type)


def find_score_cap(config: PretrainedConfig) -> float | None:
    """Cap on attention scores, c in c tanh(x / c); None if there is none."""
    family = find_family(config)
    return getattr(config, "attn_logit_softcapping", None) if family is not None and family.caps_scores else None


def find_limits(config: PretrainedConfig) -> int | dict[str, int]:
    """Largest distance in tokens between a query and a key: one number for all layers, or one by layer type. 0 means no limit.

    A window of w tokens includes the query itself. It reaches w - 1 tokens back, and w - 1 ahead in the anti-causal pass.
    """
    family = find_family(config)
    limit = (getattr(config, "sliding_window", None) or 1) - 1
    if family is None or family.windows == "none" or not limit:
        return 0
    if family.windows == "all layers":
        return limit
    types = set(config.layer_types)
    return {kind: limit if kind == SLIDING else 0 for kind in sorted(types)} if SLIDING in types else 0


def list_layer_limits(config: PretrainedConfig) -> list[int]:
    """The limit of each layer, as `find_limits` defines it."""
    limits = find_limits(config)
    if isinstance(limits, int):
        return [limits] * config.num_hidden_layers
    return [limits[kind] for kind in config.layer_types]


def tighten(one: int, other: int) -> int:
    """The smaller of two limits; 0 means no limit."""
    return min(one, other) if one and other else one or other


def find_unsupported_layers(config: PretrainedConfig) -> list[str]:
    """Error lines for settings under which the trainer would not compute the layers as the model defines them."""
    family, faults = find_family(config), []
    types = set(getattr(config, "layer_types", None) or [FULL])
    if strange := types - {FULL, SLIDING}:
        faults.append(f"layers of type {', '.join(sorted(strange))} are not supported; only full and sliding attention are")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    has_windows = SLIDING in types or (window and "layer_types" not in config.to_dict())
    if has_windows and (family is None or family.windows == "none"):
        known = ", ".join(name for name, entry in FAMILIES.items() if entry.windows != "none")
        faults.append(
            f'model_type "{config.model_type}" is not supported with sliding_window = {window}: set it to null, or take one '
            f"of {known}"
        )
    elif has_windows and (not isinstance(window, int) or window < 2):
        faults.append(f"sliding_window = {window} is not supported: it must be 2 or more")
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and (family is None or not family.caps_scores):
        known = ", ".join(name for name, entry in FAMILIES.items() if entry.caps_scores)
        faults.append(
            f'attn_logit_softcapping = {cap} is not supported with model_type "{config.model_type}", only with {known}: '
            "set it to null"
        )
    elif cap is not None and not cap > 0:
        faults.append(f"attn_logit_softcapping = {cap}: it must be greater than 0, or null")
    if getattr(config, "use_bidirectional_attention", False):
        faults.append("use_bidirectional_attention = true is not supported: next-token training needs causal attention")
    numbers = [(key, value) for key, value in config.to_dict().items() if isinstance(value, int)]
    experts = [(key, value) for key, value in numbers if "experts" in key and value > 1]
    if experts and (family is None or not family.has_experts):
        key, value = experts[0]
        known = ", ".join(name for name, entry in FAMILIES.items() if entry.has_experts)
        faults.append(f'{key} = {value}: of mixture-of-experts models, only {known} are supported, not "{config.model_type}"')
    if experts and getattr(config, "output_router_logits", False):
        faults.append("output_router_logits = true is not supported: no loss that balances experts is added; set it to false")
    return faults
