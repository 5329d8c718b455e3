"""Checks that an exported model computes the same as the checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as library_logging

from flame.attention.backends import is_recurrent
from flame.weights.files import find_dtype
from flame.weights.tensors import ModelTensors

LENGTHS = (1, 7, 24)
"""Lengths in tokens of the compared sequences, limited to the positions that the model has."""


class ExportMismatch(Exception):
    """The exported model differs from the checkpoint, by a fault of the program or of the disk."""


def check_export(
    folder: Path, config: PretrainedConfig, tensors: ModelTensors, to_checkpoint: Callable[[str], str], dtype: torch.dtype
) -> str:
    """Load an exported folder by transformers, and compare it with a model built from the checkpoint's tensors.

    Only one of the two is in memory at a time. If the export has lower precision, the checkpoint's weights are rounded too.

    Args:
        to_checkpoint: maps the name of a tensor in the model to its name in the checkpoint.

    Returns:
        what was compared, for the log.

    Raises:
        ExportMismatch: they differ.
    """
    if is_recurrent(config):
        _compare_tensors(load_exported(folder, dtype), tensors, to_checkpoint, dtype)
        return "weights equal the checkpoint's; logits not compared, since flash-linear-attention runs on GPUs only"
    expected = _compute_logits(_build_reference(config, tensors, to_checkpoint, dtype), config)
    found = _compute_logits(load_exported(folder, dtype), config)
    for a, b in zip(expected, found, strict=True):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            largest = (a.float() - b.float()).abs().max()
            raise ExportMismatch(
                f'the exported model in "{folder}" gives other logits than the checkpoint "{tensors.checkpoint}": '
                f"they differ by up to {largest:.3g}"
            )
    rounded = "" if dtype == torch.float32 else ", with its weights rounded likewise,"
    return f"re-loaded, its logits of {sum(len(logits) for logits in expected)} tokens equal the checkpoint's{rounded} to the bit"


def load_exported(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load an exported model.

    Raises:
        ExportMismatch: a weight is missing, or the model does not know it.
    """
    with _no_progress_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    model, report = loaded
    for what, names in report.items():
        if names:
            raise ExportMismatch(f'the exported model in "{folder}" does not load: {what.replace("_", " ")}: {sorted(names)[:3]}')
    return model.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' progress bars out of a run's log."""
    was_enabled = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            library_logging.enable_progress_bar()


def _build_reference(
    config: PretrainedConfig, tensors: ModelTensors, to_checkpoint: Callable[[str], str], dtype: torch.dtype
) -> PreTrainedModel:
    """A model with the checkpoint's tensors, built without the exported files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():  # non-persistent buffers are not in the checkpoint; `init_weights` sets them
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model.init_weights()  # cheap, since the weights are still on meta
    names = {to_checkpoint(name): name for name in model.state_dict()}
    for stored, name in names.items():  # one by one, to save memory: rounded, they take half as much
        tensor = tensors.load([stored])[stored]
        model.load_state_dict({name: tensor.to(find_dtype(model, name, tensor, dtype))}, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, config: PretrainedConfig) -> list[Tensor]:
    """Logits [tokens, V] of one random sequence per length in `LENGTHS`."""
    for parameter in model.parameters():  # memory layout changes how products are rounded; fresh copies have the same layout
        parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    longest = getattr(config, "max_position_embeddings", None) or max(LENGTHS)
    logits = []
    for length in LENGTHS:
        input_ids = torch.randint(config.vocab_size, (1, min(length, longest)), generator=generator)
        logits.append(model(input_ids=input_ids, use_cache=False).logits[0])
    del model
    gc.collect()  # modules have reference cycles
    return logits


def _compare_tensors(model: nn.Module, tensors: ModelTensors, to_checkpoint: Callable[[str], str], dtype: torch.dtype) -> None:
    found: dict[str, Any] = model.state_dict()
    for name, tensor in found.items():
        stored = to_checkpoint(name)
        expected = tensors.load([stored])[stored].to(tensor.dtype)
        if not torch.equal(expected.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)):
            raise ExportMismatch(f'the exported model has another {name} than the checkpoint "{tensors.checkpoint}"')
