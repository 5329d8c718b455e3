"""The softmax-attention families of transformers that this trainer knows, and how far their layers look.

`tests/test_families.py` holds a toy model of each and checks all that is claimed of it, in both passes. Other families can be
trained too, where they have neither windows nor experts: they take FlexAttention, and a check for leaks when training starts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from transformers import PretrainedConfig


class Family(NamedTuple):
    takes_flex: bool = True
    """FlexAttention runs it. The others take SDPA, under masks of T x T, where the flash kernels cannot be had."""
    windows: Literal["none", "all layers", "by layer"] = "none"
    """Which layers `sliding_window` holds for; "by layer" means those that `layer_types` says, with a mask for each type."""


FAMILIES = {
    "gemma3_text": Family(windows="by layer"),
    "gpt2": Family(takes_flex=False),
    "gpt_neox": Family(),
    "llama": Family(),
    "mistral": Family(windows="all layers"),
    "mixtral": Family(windows="all layers"),
    "olmo2": Family(),
    "olmo3": Family(windows="by layer"),
    "olmoe": Family(takes_flex=False),
    "phi3": Family(windows="all layers"),
    "qwen2": Family(windows="by layer"),
    "qwen3": Family(windows="by layer"),
    "qwen3_moe": Family(windows="all layers"),
    "smollm3": Family(windows="by layer"),
}

FULL, SLIDING = "full_attention", "sliding_attention"


def find_family(config: PretrainedConfig) -> Family | None:
    """The family's entry, None for one that is not in the table or brings code of its own."""
    return None if hasattr(config, "auto_map") else FAMILIES.get(config.model_type)


def find_limits(config: PretrainedConfig) -> int | dict[str, int]:
    """How many tokens away a key may be from its query: in all layers, or by type of layer. 0 is no limit.

    A window of w tokens holds the query's own: it reaches w - 1 back, and in the anti-causal pass w - 1 ahead.
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
    """`find_limits`, one number a layer."""
    limits = find_limits(config)
    if isinstance(limits, int):
        return [limits] * config.num_hidden_layers
    return [limits[kind] for kind in config.layer_types]


def tighten(one: int, other: int) -> int:
    """The tighter of two limits, where 0 is none."""
    return min(one, other) if one and other else one or other


def find_unsupported_layers(config: PretrainedConfig) -> list[str]:
    """Reasons why attention, or what stands in its place, would be computed otherwise than the model means."""
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
    if getattr(config, "use_bidirectional_attention", False):
        faults.append("use_bidirectional_attention = true is not supported: next-token training needs causal attention")
    numbers = [(key, value) for key, value in config.to_dict().items() if isinstance(value, int)]
    experts = [(key, value) for key, value in numbers if "experts" in key and value > 1]
    if experts and family is None:
        key, value = experts[0]
        known = ", ".join(name for name in FAMILIES if name in ("mixtral", "olmoe", "qwen3_moe"))
        faults.append(f'{key} = {value}: of mixture-of-experts models, only {known} are supported, not "{config.model_type}"')
    if experts and getattr(config, "output_router_logits", False):
        faults.append("output_router_logits = true is not supported: no loss that balances experts is added; set it to false")
    return faults
