"""Settings of mixtures of experts and of latent attention with which transformers would fail in the first step, or which it
leaves out in silence."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from flame.attention.families import find_family

CHOICES = ("greedy", "group_limited_greedy")
"""Values of `topk_method` in `deepseek_v2`. Other families with `n_group` always choose by groups, ranked by their two best."""


def find_unsupported_mixtures(config: PretrainedConfig) -> list[str]:
    """One line for each such setting of a listed family."""
    family = find_family(config)
    if family is None or not family.has_experts:
        return []
    return [*_find_wrong_choice(config), *_find_wrong_heads(config)]


def _find_wrong_choice(config: PretrainedConfig) -> Iterator[str]:
    number = next((key for key in ("n_routed_experts", "num_local_experts", "num_experts") if getattr(config, key, None)), None)
    count, chosen = getattr(config, number or "", None), getattr(config, "num_experts_per_tok", None)
    if not isinstance(chosen, int) or not isinstance(count, int) or not 1 <= chosen <= count:
        yield f"num_experts_per_tok = {chosen}: it must be a number from 1 to {number or 'the number of experts'} = {count}"
        return
    method = getattr(config, "topk_method", None)
    if config.model_type == "deepseek_v2" and method not in CHOICES:
        yield f'topk_method = "{method}" is not supported: choose {" or ".join(CHOICES)}'
    if config.model_type == "deepseek_v2" and config.norm_topk_prob:
        yield "norm_topk_prob = true is not supported: transformers leaves it out in this family; set it to false"
    ranks_by_two = config.model_type != "deepseek_v2"
    if hasattr(config, "n_group") and (ranks_by_two or method == "group_limited_greedy"):
        groups, open_groups = config.n_group, config.topk_group
        if not groups or count % groups:
            yield f"n_group = {groups} does not divide {number} = {count}"
        elif not open_groups or not 1 <= open_groups <= groups or open_groups * (count // groups) < chosen:
            yield (
                f"topk_group = {open_groups}: it must be at most n_group = {groups}, and so many groups of {count // groups} "
                f"experts must hold num_experts_per_tok = {chosen}"
            )
        elif ranks_by_two and count == groups:
            yield f"n_group = {groups} leaves one expert in a group: this family ranks groups by their two best; lower it"


def _find_wrong_heads(config: PretrainedConfig) -> Iterator[str]:
    rotary = getattr(config, "qk_rope_head_dim", None)
    if rotary is None:
        return
    if config.head_dim != rotary:
        yield f"head_dim = {config.head_dim} differs from qk_rope_head_dim = {rotary}, whose width it is here: leave it out"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups != heads:
        yield (
            f"num_key_value_heads = {groups} differs from num_attention_heads = {heads}: latent attention makes a key for each "
            "head; leave it out"
        )
