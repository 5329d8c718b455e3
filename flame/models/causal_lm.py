"""Builds a causal language model of Hugging Face for this trainer: on the meta device, then sharded, then initialised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flame.attention.backends import Attention, is_recurrent, name_implementation
from flame.attention.families import find_unsupported_layers
from flame.attention.fla_families import find_unsupported_fla, init_weights, register_fla_family
from flame.attention.mixtures import find_unsupported_mixtures
from flame.config.addresses import is_remote
from flame.config.locations import check_readable
from flame.errors import UserError, give_reason
from flame.models.config_keys import find_misspelt_keys, show_value
from flame.models.config_values import find_impossible_values
from flame.models.output_head import find_head_fault, find_impossible_rules
from flame.runtime.hub import find_folder

CONFIG_FILES = ["config.json", "*.py"]


def load_model_config(path: str, trust_remote_code: bool = False, option: str = "model.config") -> PretrainedConfig:
    """Read a Hugging Face configuration from a JSON file, a folder or the Hub.

    Args:
        trust_remote_code: run the Python code that comes with it. Without it, the returned configuration has no `auto_map`.
        option: name of the option that gave the path, for messages.

    Raises:
        UserError: it cannot be read, or the trainer does not support the model.
    """
    option = f'{option} = "{path}"'
    try:
        path = os.path.expanduser(path)
        if is_remote(path):
            path = find_folder(option, path, CONFIG_FILES)
        check_readable(path)
        found = find_folder(option, path, CONFIG_FILES[:1])
        path = path if trust_remote_code else found  # code that comes along is looked up by the Hub name
        settings, _ = PretrainedConfig.get_config_dict(path)
        if impossible := list(find_impossible_values(settings)):
            raise UserError(*(f"{option}: {fault}" for fault in impossible))
        if not ("auto_map" in settings and trust_remote_code):
            register_fla_family(settings.get("model_type"))
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types: missing file, unknown model_type, bad value, no network
        reason = give_reason(error)
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own: set model.trust_remote_code = true to run it, if you trust it"
        elif "does not recognize this architecture" in reason:  # the library advises to upgrade it
            reason = "neither it nor flash-linear-attention has this model_type; experimental.custom_model_path can bring one"
        raise UserError(f"{option} cannot be loaded by transformers: {reason}") from error
    if not trust_remote_code and hasattr(config, "auto_map"):
        del config.auto_map
    faults = [f"{option}: {fault}" for fault in _find_unsupported(config, settings)]
    if faults:
        raise UserError(*faults)
    return config


def _has_own_code(config: PretrainedConfig) -> bool:
    """Whether the model is built by trusted code that comes with its configuration."""
    return AutoModelForCausalLM.__name__ in getattr(config, "auto_map", {})


def _find_unsupported(config: PretrainedConfig, given: dict[str, Any]) -> list[str]:
    """Reasons why this trainer would silently compute something else than the model, or the keys given for it, mean."""
    if type(config) not in AutoModelForCausalLM._model_mapping and not _has_own_code(config):
        return [f'model_type "{config.model_type}" is no causal language model known to transformers']
    if foreign := _find_foreign(config):
        return foreign
    faults = find_unsupported_passes(config)
    faults += find_impossible_rules(config)
    for key, value in config.to_dict().items():
        unused = key.startswith(("classifier", "summary"))  # heads of other tasks
        is_random = key.endswith("_pdrop") or any(word in key for word in ("dropout", "layerdrop", "jitter"))
        if is_random and not unused and isinstance(value, int | float) and value != 0:
            reason = "it would make labels random, and the attention kernels here have none"
            faults.append(f"{key} = {value} is not supported: {reason}; set it to 0.0, and training.dropout for the causal pass")
    return faults + find_misspelt_keys(config, given)


def _find_foreign(config: PretrainedConfig) -> list[str]:
    """A reason why the configuration cannot be examined further, if there is one."""
    if config.sub_configs:
        return [f'model_type "{config.model_type}" is not supported: it has a configuration for each of several parts']
    if getattr(config, "is_heterogeneous", False):
        return [f'model_type "{config.model_type}" is not supported with per_layer_config: its layers must have the same shapes']
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        return [
            f"quantization_config = {show_value(quantization)} is not supported: quantised weights cannot be trained; leave it "
            "out or, with weights, take the model they were made from"
        ]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(config, key, None), int):
            return [f'model_type "{config.model_type}" is not supported: its configuration has no {key}']
    if not is_recurrent(config) and not isinstance(getattr(config, "num_attention_heads", None), int):
        return [f'model_type "{config.model_type}" is not supported: its configuration has no num_attention_heads']
    return []


def find_unsupported_passes(config: PretrainedConfig) -> list[str]:
    """Reasons why the passes of `flame.attention.backends` would not compute the model's own hidden states."""
    if foreign := _find_foreign(config):
        return foreign
    settings, faults = config.to_dict(), []
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if heads and groups and heads % groups:
        faults.append(f"num_key_value_heads = {groups} does not divide num_attention_heads = {heads}")
    if is_recurrent(config):
        return faults + find_unsupported_fla(config)
    return faults + find_unsupported_layers(config) + find_unsupported_mixtures(config)


def find_model_conflicts(config: PretrainedConfig, tokenizer_size: int, context_len: int, *, exports: bool) -> Iterator[str]:
    """Yield a line for each conflict: token ids or positions without an embedding, and code that cannot be exported.

    Args:
        context_len: `training.context_len`.
        exports: the run writes a Hugging Face folder.
    """
    if tokenizer_size > config.vocab_size:
        yield (
            f"model.tokenizer_path has {tokenizer_size} entries but the model's vocab_size is {config.vocab_size}: "
            "use the model's own tokenizer, raise vocab_size in its configuration or, with checkpoint.initial_load_path, set "
            "model.resize_embeddings = true"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and context_len > positions:
        yield (
            f"training.context_len = {context_len} is more than the model's max_position_embeddings = {positions}: "
            "lower the one or raise the other"
        )
    switch = find_position_switch(config)
    if switch and context_len > switch:
        yield (
            f"training.context_len = {context_len} is more than the original_max_position_embeddings = {switch} of the model's "
            "longrope: beyond it, one document would change the position encoding of all others in its packed sequence; lower it"
        )
    if exports and hasattr(config, "auto_map"):
        yield (
            "checkpoint.export_hf = true, but a model that comes with Python code of its own (model.trust_remote_code = true) "
            "cannot be exported: set it to false"
        )


def find_position_switch(config: PretrainedConfig) -> int:
    """Length at which longrope switches between its two sets of frequencies; 0 for a model with one set."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") or 0 if rope.get("rope_type") == "longrope" else 0


def build_on_meta(config: PretrainedConfig, device_type: str, attention: Attention) -> PreTrainedModel:
    """Build the model in float32 on the meta device, without storage.

    Raises:
        UserError: the architecture cannot be built, cannot run with a given mask, or logits are more than its output head.
    """
    if is_recurrent(config) and device_type != "cuda":
        raise UserError(f'model_type "{config.model_type}" runs on GPUs only, and this machine has none')
    implementation = {} if attention == "none" else {"attn_implementation": name_implementation(attention, config)}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=_has_own_code(config), **implementation
            )
    except Exception as error:  # a bad value in the configuration, or a missing kernel, may raise anything
        raise UserError(
            f'model.config: model_type "{config.model_type}" cannot be built on this machine with these values '
            f"({type(error).__name__}: {give_reason(error)}): check its configuration"
        ) from error
    if fault := find_head_fault(model):
        raise UserError(f'model_type "{config.model_type}" is not supported: {fault}')
    return model


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers: the `ModuleList` of `num_hidden_layers` modules.

    Raises:
        UserError: the model has no such list.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise UserError(
        f'model_type "{model.config.model_type}" is not supported: it has no list of num_hidden_layers decoder layers'
    )


class _DrawUnsharded(TorchDispatchMode):
    """Makes in-place random draws on a DTensor draw the whole tensor on every rank and keep the local shard.

    Plain DTensor draws depend on the number of ranks, and on CPUs give every rank the same shard.
    """

    DRAWS = frozenset(
        getattr(torch.ops.aten, name).default
        for name in ("normal_", "uniform_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.DRAWS or not isinstance(args[0], DTensor):
            return func(*args, **kwargs)
        target, *rest = args
        # Draw on the mesh's device even if shards are offloaded, so that offloading does not change the draws.
        whole = torch.empty(target.shape, dtype=target.dtype, device=target.device_mesh.device_type)
        func(whole, *rest, **kwargs)
        shards = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shards.to_local())
        return target


@torch.no_grad()
def initialize(module: nn.Module, device: torch.device, seed: int) -> None:
    """Give a module on the meta device storage and initial weights. It may be sharded.

    The weights depend on the seed alone, not on the number of ranks. `module.init_weights()` must set every parameter and buffer.
    All are filled with NaN first, to detect those that it does not set.

    Args:
        module: has `init_weights()`; parameters may be DTensors.
        device: where to put the storage.
        seed: seed of torch's generators.

    Raises:
        UserError: `init_weights()` leaves a parameter or buffer unset.
    """
    module.to_empty(device=device)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    torch.manual_seed(seed)
    with _DrawUnsharded():
        init_weights(module)
    _clear_padding_rows(module)
    for name, tensor in (dict(module.named_parameters()) | dict(module.named_buffers())).items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.isnan().any():
            raise UserError(f"{type(module).__name__} is not supported: its init_weights() leaves {name} unset")


def _clear_padding_rows(module: nn.Module) -> None:
    """Zero each embedding's padding row. The library's own slice assignment has no effect on a sharded weight."""
    for embedding in module.modules():
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            weight, keep = embedding.weight.data, torch.ones(embedding.num_embeddings, 1)
            keep[embedding.padding_idx] = 0
            if isinstance(weight, DTensor):
                keep = distribute_tensor(keep, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
                weight = weight.to_local()
            weight.mul_(keep.to(weight.device))
