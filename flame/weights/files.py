"""Writes weights like Hugging Face's `save_pretrained`, with one decoder layer in memory at a time.

Names and shapes on the disk can differ from those in memory. Tied weights are written once. The experts of a layer, one tensor
in transformers 5, are written one by one. The layout is planned first, on meta tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

MAX_SHARD_BYTES = 5 * 10**9
PRODUCER = {"producer": "flame"}
"""In the header of each file of weights, where loaders do not look: an export replaces what has it."""

LoadTensors = Callable[[Iterable[str]], dict[str, Tensor]]


def find_dtype(model: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype of one tensor in a model of dtype `dtype`. transformers keeps some in float32; integers do not change."""
    if not tensor.is_floating_point():
        return tensor.dtype
    keeps_fp32 = any(re.search(rf"\b{re.escape(key)}\b", name) for key in model._keep_in_fp32_modules_strict or ())
    return torch.float32 if keeps_fp32 else dtype


@dataclass
class Layout:
    """How tensors in memory map to tensors on the disk."""

    groups: list[list[str]]
    """Names in memory, grouped for conversion: one group per decoder layer, and one per tensor outside of the layers."""
    on_disk: dict[str, Tensor]
    """All tensors on the disk by name, in order: meta tensors with the dtype and shape in the file."""


def plan_layout(model: PreTrainedModel, dtype: torch.dtype) -> Layout:
    """Plan the layout of a model on meta. If converting layer by layer gives another result, all tensors form one group."""
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    state = {name: tensor.to(find_dtype(model, name, tensor, dtype)) for name, tensor in state.items()}
    on_disk = revert_weight_conversion(model, dict(state))
    groups = _split_by_layer(state)
    found = {
        name: tensor
        for group in groups
        for name, tensor in revert_weight_conversion(model, {name: state[name] for name in group}).items()
    }
    by_group, at_once = ({name: (tensor.shape, tensor.dtype) for name, tensor in named.items()} for named in (found, on_disk))
    return Layout(groups if by_group == at_once else [list(state)], on_disk)


def _split_by_layer(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*?\.\d+\.", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return list(groups.values())


def stream_weights(model: PreTrainedModel, layout: Layout, load: LoadTensors, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Read the weights group by group, and yield them with the names, shapes and dtypes on the disk.

    Args:
        model: on meta.
        load: reads tensors by their names in the model.
    """
    for group in tqdm(layout.groups, desc="writing weights", disable=None, leave=False):
        tensors = {name: tensor.to(find_dtype(model, name, tensor, dtype)) for name, tensor in load(group).items()}
        yield revert_weight_conversion(model, tensors)


def write_weights(folder: Path, layout: Layout, weights: Iterable[dict[str, Tensor]], max_shard_bytes: int) -> None:
    """Write safetensors files, each of at most `max_shard_bytes` unless one tensor is larger, and their index.

    The index is written even for a single file: readers such as vLLM use it to find the model's files in the folder.
    """
    shards = _split_into_shards(layout.on_disk, max_shard_bytes)
    files = {_name_shard(i, len(shards)): names for i, names in enumerate(shards)}
    with ExitStack() as stack:
        locations: dict[str, tuple[BinaryIO, int]] = {}
        for file_name, names in files.items():
            file = stack.enter_context(open(folder / file_name, "wb"))
            locations |= _write_header(file, {name: layout.on_disk[name] for name in names})
        for tensors in weights:
            for name, tensor in tensors.items():
                shard, start = locations.pop(name)
                shard.seek(start)
                shard.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert not locations, f"never written: {sorted(locations)}"
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in layout.on_disk.values()),
        "total_size": sum(_count_bytes(tensor) for tensor in layout.on_disk.values()),
    }
    weight_map = {name: file_name for file_name, names in files.items() for name in names}
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n")


def _name_shard(index: int, count: int) -> str:
    stem, suffix = os.path.splitext(SAFE_WEIGHTS_NAME)
    return SAFE_WEIGHTS_NAME if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}{suffix}"


def _split_into_shards(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _count_bytes(tensor) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _count_bytes(tensor)
    return shards


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_header(file: BinaryIO, tensors: dict[str, Tensor]) -> dict[str, tuple[BinaryIO, int]]:
    """Write the header of a safetensors file, and return the file and the position of each tensor in it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | PRODUCER}
    offset = 0
    starts = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # sorted to be aligned
        end = offset + _count_bytes(tensor)
        header[name] = {"dtype": _name_dtype(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        starts[name] = offset
        offset = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    begin = file.write(len(content).to_bytes(8, "little") + content)
    return {name: (file, begin + start) for name, start in starts.items()}


def _name_dtype(dtype: torch.dtype) -> str:
    """Name of a dtype in the safetensors format."""
    content = save({"": torch.empty(0, dtype=dtype)})
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[""]["dtype"]
