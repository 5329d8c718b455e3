"""The causal and the anti-causal pass of a model that is already loaded, with any attention implementation.

During a pass the model uses an attention implementation of `flame.attention.backends`. Its own is restored afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.attention.backends import (
    SHORTEST_FLEX,
    Attention,
    AttentionBackend,
    MaskedBackend,
    PackedTokens,
    build_backend,
    choose_attention,
    is_recurrent,
    name_implementation,
)
from flame.attention.families import find_family, find_limits, find_score_cap
from flame.attention.fla_families import is_tested_fla
from flame.attention.kernel_masks import Direction
from flame.attention.masks import read_window
from flame.errors import UserError
from flame.library.packs import Pack, read_pack
from flame.models.causal_lm import find_position_switch, find_unsupported_passes
from flame.models.layer_states import read_layer

_passed: WeakKeyDictionary[nn.Module, set[Attention]] = WeakKeyDictionary()
"""Models that the tests do not cover, with the attention implementations with which they passed `flame.check_leaks`."""


def encode_past(model: nn.Module, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal pass inside each document: the model's final hidden states, with gradient.

    Dropout and gradient checkpointing follow the model's mode.

    Args:
        model: a causal language model of transformers, also in peft's or torch.compile's wrapper. Call `flame.check_leaks` first
            if the tests of this package do not cover it.
        input_ids: integers [T] or [1, T], one packed sequence.
        cu_seqlens: int32 or int64 [S+1], the boundaries of its documents, from 0 to T.

    Returns:
        [T, d], in the dtype of the model's activations.

    Raises:
        ValueError: the arguments do not fit together, or do not fit the model.
        UserError: the model is not supported; one line per reason.
    """
    lm = find_lm(model)
    return _encode(lm, read_tokens(lm, input_ids, cu_seqlens), "causal", 0)


def encode_past_and_layer(model: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """As `encode_past`, and also the states [T, d] after decoder layer `depth` (from 1), before any norm."""
    lm = find_lm(model)
    pack = read_tokens(lm, input_ids, cu_seqlens)
    attention = _choose_checked(lm, pack)
    backend = _build_backend(lm, attention, pack.total, is_vouched_for(lm))
    with attend_by(lm, attention), read_layer(lm, depth) as layer:
        return backend.encode_past(lm, pack), backend.flatten(layer.take(), pack)


@torch.no_grad()
def encode_future(model: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, window_k: int | None = 0) -> Tensor:
    """Anti-causal pass inside each document: summaries of each position's future.

    Summaries are labels: they have no gradient, and dropout is off in any mode of the model. Softmax attention sees strictly
    later tokens, so summary t depends on tokens t .. end of its document. Recurrent models read documents reversed.

    Args:
        model, input_ids, cu_seqlens: as `encode_past`.
        window_k: tokens that each layer attends ahead; 0, None and -1 mean up to the end of the document.

    Returns:
        [T, d].

    Raises:
        as `encode_past`.
    """
    lm = find_lm(model)
    return _encode(lm, read_tokens(lm, input_ids, cu_seqlens), "future", check_window(lm, window_k))


def find_lm(model: nn.Module) -> PreTrainedModel:
    """Unwrap the transformers model that the caller gives.

    Raises:
        UserError: the passes do not support it; one line per reason.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = _unwrap_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} is no model of transformers: give the PreTrainedModel inside it")
    if faults := find_faults(model):
        raise UserError(*faults)
    return model


def _unwrap_peft(model: Any) -> nn.Module:
    """The model whose layers contain peft's adapters. Raises UserError if peft instead prepends virtual tokens."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UserError(f"{type(model).__name__} puts virtual tokens in front of each text, which the passes would leave out")
    return model.get_base_model()


def find_faults(lm: PreTrainedModel) -> list[str]:
    """Reasons why the passes do not support this model."""
    name = type(lm).__name__
    parameters = list(lm.parameters())
    wrappers = {type(module).__name__ for module in lm.modules()}
    if "FullyShardedDataParallel" in wrappers or any(isinstance(parameter, DTensor) for parameter in parameters):
        return [f"{name} is sharded (FSDP or tensor parallelism), which the library does not support: train it with train.sh"]
    if "CheckpointWrapper" in wrappers:
        return [f"{name} is in torch's CheckpointWrapper, which is not supported: use model.gradient_checkpointing_enable()"]
    devices = {str(parameter.device) for parameter in parameters}
    if len(devices) != 1 or "meta" in devices:
        return [f"{name} must be whole on one device; its weights are on {', '.join(sorted(devices))}"]
    if lm.base_model is lm:
        return [f"{name} is not supported: its base_model_prefix names no model without head, whose last states could be taken"]
    if not getattr(lm.config, "return_dict", True):
        return [f"{name} is not supported with config.return_dict = False: set it to True"]
    faults = find_unsupported_passes(lm.config)
    family = find_family(lm.config)
    has_sinks = family is not None and family.has_sinks
    takes_mask = getattr(lm, "_supports_sdpa", False) or has_sinks or find_score_cap(lm.config) is not None
    if not faults and not is_recurrent(lm.config) and not takes_mask:
        faults = [f'model_type "{lm.config.model_type}" is not supported: its attention takes no boolean mask (SDPA)']
    if is_recurrent(lm.config) and not parameters[0].is_cuda:
        faults.append(f'model_type "{lm.config.model_type}" runs on GPUs only: move the model to one')
    return faults


def is_vouched_for(lm: PreTrainedModel) -> bool:
    """Whether the tests of this package cover the model's code."""
    if is_recurrent(lm.config):
        return is_tested_fla(lm.config) and type(lm).__module__.startswith("fla.")
    return find_family(lm.config) is not None and type(lm).__module__.startswith("transformers.")


def note_passed(lm: PreTrainedModel, attention: Attention) -> None:
    """Allow the passes to run a model that the tests do not cover, with an attention implementation that passed the check."""
    _passed.setdefault(lm, set()).add(attention)


def read_tokens(lm: PreTrainedModel, input_ids: Tensor, cu_seqlens: Tensor) -> Pack:
    """Like `read_pack`, for a model. Also raises ValueError for documents with more tokens than the model has positions."""
    config = lm.config
    pack = read_pack(input_ids, cu_seqlens, find_device(lm), config.vocab_size)
    for name, limit in find_length_limits(config).items():
        if pack.longest > limit:
            raise ValueError(f"the longest document has {pack.longest} tokens, more than the model's {name}: {limit}")
    return pack


def find_length_limits(config: PretrainedConfig) -> dict[str, int]:
    """What limits the tokens of a document, by its name; nothing for a model without a limit."""
    limits = {
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 0,
        "original_max_position_embeddings (longrope: a longer document would change the positions of all)": (
            find_position_switch(config)
        ),
    }
    return {name: limit for name, limit in limits.items() if limit}


def check_window(lm: PreTrainedModel, window_k: int | None) -> int:
    """Like `read_window`. Raises UserError if the model cannot have a window."""
    window = read_window(window_k)
    if window and is_recurrent(lm.config):
        raise UserError(f'window_k = {window}: model_type "{lm.config.model_type}" reads reversed documents and has no window')
    return window


def find_device(lm: PreTrainedModel) -> torch.device:
    return next(lm.parameters()).device


def choose(lm: PreTrainedModel, total: int) -> Attention:
    """Choose the attention implementation for a packed sequence of `total` tokens, by device, dtype (with autocast) and mode."""
    device = find_device(lm)
    is_cast = torch.is_autocast_enabled(device.type)
    attention = choose_attention(lm.config, device.type, torch.get_autocast_dtype(device.type) if is_cast else lm.dtype)
    is_random = lm.training and _has_random_attention(lm.config)
    if attention == "varlen" and (is_random or not is_vouched_for(lm)):
        attention = "flex"
    takes_flex = getattr(lm, "_supports_flex_attn", False) and not is_cast and not is_random
    if attention == "flex" and (total < SHORTEST_FLEX or not takes_flex):
        return choose_attention(lm.config, "cpu", lm.dtype)
    return attention


def list_choices(lm: PreTrainedModel) -> list[Attention]:
    """All implementations that `choose` may choose for a model that the tests do not cover."""
    if is_recurrent(lm.config):
        return ["none"]
    has_flex = find_device(lm).type == "cuda" and getattr(lm, "_supports_flex_attn", False)
    return ["flex", "sdpa"] if has_flex else ["sdpa"]


def _has_random_attention(config: PretrainedConfig) -> bool:
    """Whether the model has dropout on attention weights, which the flash and flex kernels do not support."""
    return any(getattr(config, key, 0) for key in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"))


def _encode(lm: PreTrainedModel, pack: Pack, direction: Direction, window_k: int) -> Tensor:
    if not pack.total:
        return lm.get_input_embeddings()(pack.input_ids)[0]
    with eval_mode(lm) if direction == "future" else nullcontext():
        return run_pass(lm, pack, direction, window_k, _choose_checked(lm, pack))


def _choose_checked(lm: PreTrainedModel, pack: Pack) -> Attention:
    """As `choose`. Raises UserError if neither the tests nor `flame.check_leaks` have tried the model with it."""
    attention = choose(lm, pack.total)
    if not is_vouched_for(lm) and attention not in _passed.get(lm, ()):
        raise UserError(
            f"{type(lm).__name__} is none of the models that the tests cover: call flame.check_leaks(model) once; without a "
            "leak it can be used"
        )
    return attention


def run_pass(
    lm: PreTrainedModel,
    pack: PackedTokens,
    direction: Direction,
    window_k: int,
    attention: Attention,
    may_split: bool = True,
) -> Tensor:
    """Hidden states [T, d] of one pass with one attention implementation, without checks.

    Args:
        may_split: on CPUs, documents may be laid out as one row each.
    """
    backend = _build_backend(lm, attention, pack.input_ids.shape[1], may_split and is_vouched_for(lm))
    with attend_by(lm, attention):
        return backend.encode_past(lm, pack) if direction == "causal" else backend.encode_future(lm, pack, window_k)


def _build_backend(lm: PreTrainedModel, attention: Attention, total: int, may_split: bool) -> AttentionBackend:
    if attention in ("flex", "sdpa", "dense") and not may_split:
        return MaskedBackend(attention, find_limits(lm.config))
    return build_backend(attention, lm.config, max_length=total)


@contextmanager
def attend_by(lm: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Use one attention implementation inside the block, and also when gradient checkpointing reruns a layer after the block."""
    if attention == "none":
        yield
        return
    implementation = name_implementation(attention, lm.config)
    checkpointed: list[Any] = [module for module in lm.modules() if "_gradient_checkpointing_func" in vars(module)]
    functions = [module._gradient_checkpointing_func for module in checkpointed]
    for module, function in zip(checkpointed, functions, strict=True):
        module._gradient_checkpointing_func = _keep_attention(function, lm, implementation)
    try:
        with _switched(lm, implementation):
            yield
    finally:
        for module, function in zip(checkpointed, functions, strict=True):
            module._gradient_checkpointing_func = function


def _keep_attention(checkpoint: Callable[..., Any], lm: PreTrainedModel, implementation: str) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def switched(*args: Any, **kwargs: Any) -> Any:
            with _switched(lm, implementation):
                return function(*args, **kwargs)

        return checkpoint(switched, *args, **kwargs)

    return run


@contextmanager
def _switched(lm: PreTrainedModel, implementation: str) -> Iterator[None]:
    found = [config for module in lm.modules() if isinstance(config := getattr(module, "config", None), PretrainedConfig)]
    configs = list({id(config): config for config in found}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = implementation
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode. Each module's own mode is restored afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
