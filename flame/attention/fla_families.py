"""The model families of flash-linear-attention: which are tested, which are rejected, and how their weights are initialized."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

TESTED = frozenset({"delta_net", "gated_deltanet", "gla", "hgrn2", "kda", "mamba2", "retnet", "rwkv7"})
"""`tests/attention/test_fla_families.py` tests both passes of each on a toy model."""
NAMED_AS_IN_TRANSFORMERS = frozenset({"mamba2"})
"""Families that transformers also has under the same name. That version reads across documents, so fla's is used."""
TAKES_ROWS = frozenset({"mamba2"})
"""Families whose layers do not take `cu_seqlens`. They get one document per row, padded to the longest."""
READS_ACROSS = frozenset({"mamba", "samba"})
"""Families whose layers ignore `cu_seqlens`, and are too slow to run with one document per row."""


def register_fla_family(model_type: str | None) -> None:
    """Register the families of flash-linear-attention with transformers if this may be one. The import takes seconds."""
    if model_type not in CONFIG_MAPPING or model_type in NAMED_AS_IN_TRANSFORMERS:
        import fla.models  # noqa: F401 - registers them


def is_tested_fla(config: PretrainedConfig) -> bool:
    """Whether both passes of this family are tested. Hybrid models, with softmax layers, are not."""
    return config.model_type in TESTED and not getattr(config, "attn", None)


def find_unsupported_fla(config: PretrainedConfig) -> list[str]:
    """Error lines for settings under which a family of flash-linear-attention would compute something else, or leak."""
    faults = []
    if config.model_type in READS_ACROSS:
        faults.append(
            f'model_type "{config.model_type}" is not supported: its layers in flash-linear-attention take no cu_seqlens, so the '
            f"documents of a packed sequence would read each other; of this kind, {', '.join(sorted(TAKES_ROWS))} is supported"
        )
    if getattr(config, "attn", None) and find_spec("flash_attn") is None:
        faults.append(
            "attn is not supported on this machine: flash-linear-attention's softmax layers need the package flash-attn; "
            "install it, or set attn to null"
        )
    if getattr(config, "use_l2warp", False):
        faults.append("use_l2warp = true is not supported: the loss is plain cross entropy; set it to false")
    if config.model_type == "rwkv7" and config.num_hidden_layers < 2:
        faults.append("num_hidden_layers = 1 is not supported: RWKV-7's initial weights are defined for two layers or more")
    return faults


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Initialize sharded weights as the family's constructor does.

    `module.init_weights()` alone misses some parameters of the HGRN families, and is wrong for RWKV-7 on sharded weights.
    Torch's generators must be in the same state on all ranks.
    """
    family = module.config.model_type if isinstance(module, PreTrainedModel) else None
    if family == "rwkv7":
        _init_rwkv7(module)
        return
    module.init_weights()  # type: ignore[operator]  # nn.Module does not declare it
    if family in ("hgrn", "hgrn2"):
        for name, parameter in module.named_parameters():
            if name.endswith("lower_bounds"):
                parameter.zero_()


def _init_rwkv7(lm: nn.Module) -> None:
    """Build one layer at a time, unsharded, as the constructor does, and copy this rank's shards of it."""
    from fla.models.rwkv7.modeling_rwkv7 import RWKV7Block, RWKV7ForCausalLM

    assert isinstance(lm, RWKV7ForCausalLM)
    for index, layer in enumerate(lm.base_model.layers):
        plain = RWKV7Block(lm.config, index)
        for part in plain.modules():
            if not getattr(part, "_is_hf_initialized", False):  # modules with the mark keep the values of their constructors
                lm._init_weights(part)
        for name, parameter in layer.named_parameters():
            _assign(parameter, plain.get_parameter(name))
    lm._init_weights(lm.base_model.embeddings)
    lm._init_weights(lm.base_model.norm)
    if not lm.config.tie_word_embeddings:
        ratio = lm.config.vocab_size / lm.config.hidden_size
        whole = nn.init.orthogonal_(torch.empty(lm.lm_head.weight.shape), gain=0.5 * max(ratio, 1.0) ** 0.5)
        _assign(lm.lm_head.weight, whole)


def _assign(parameter: Tensor, whole: Tensor) -> None:
    """Set a parameter, sharded or not, to unsharded values on any device."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(whole.to_local())
    else:
        parameter.copy_(whole)
