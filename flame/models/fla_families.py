"""The families of flash-linear-attention: what is tested of each, what must be refused, what starts otherwise."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

TESTED = frozenset({"delta_net", "gated_deltanet", "gla", "hgrn2", "kda", "mamba2", "retnet", "rwkv7"})
"""`tests/test_fla_families.py` holds a toy model of each and checks both passes."""
NAMED_AS_IN_TRANSFORMERS = frozenset({"mamba2"})
"""Families that transformers has under the same name, in a form that reads across documents: fla's is meant."""
TAKES_ROWS = frozenset({"mamba2"})
"""Families whose layers know no `cu_seqlens`: they read one document a row, padded to the longest."""
READS_ACROSS = frozenset({"mamba", "samba"})
"""Families whose layers ignore `cu_seqlens` and are too slow without it to be fed in rows."""


def register_fla_family(model_type: str | None) -> None:
    """Let transformers know the families of flash-linear-attention where this may be one; importing them takes seconds."""
    if model_type not in CONFIG_MAPPING or model_type in NAMED_AS_IN_TRANSFORMERS:
        import fla.models  # noqa: F401 - registers them


def is_tested_fla(config: PretrainedConfig) -> bool:
    """Whether the passes of this family are tested, hybrid layers not among them."""
    return config.model_type in TESTED and not getattr(config, "attn", None)


def find_unsupported_fla(config: PretrainedConfig) -> list[str]:
    """Reasons why a family of flash-linear-attention would compute something else than it means, or leak."""
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
    """`module.init_weights()`, and what a family's constructor sets and that leaves alone, or spoils on sharded weights.

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
    """Each layer is built whole, as the constructor does, and cut to this rank's shards, one at a time."""
    from fla.models.rwkv7.modeling_rwkv7 import RWKV7Block, RWKV7ForCausalLM

    assert isinstance(lm, RWKV7ForCausalLM)
    for index, layer in enumerate(lm.base_model.layers):
        plain = RWKV7Block(lm.config, index)
        for part in plain.modules():
            if not getattr(part, "_is_hf_initialized", False):  # the others are as their own constructors left them
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
    """Set a parameter, sharded or not, to whole values on any device."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(whole.to_local())
    else:
        parameter.copy_(whole)
