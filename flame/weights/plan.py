"""Plans which tensors in the files form which tensor of a model, and checks them before any is read.

Files may use names and shapes of older releases of transformers. For example, each expert is one tensor in the files, but all
experts are one tensor in memory. transformers has a conversion table for each family. It is applied here to meta tensors.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flame.errors import UserError
from flame.weights.source import CONFIG_FILE, DTYPES, TensorEntry, WeightSource

SHOWN = 3
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "base_model.model.": "peft",
    "_forward_module.": "Lightning",
}
"""Prefixes of names in files, and what wraps a model under them."""
FETCH_AGAIN = "fetch the weights and their configuration again"
TAKE_OWN_CONFIG = "take the weights' own configuration, as an empty model.config does"


class Reading(NamedTuple):
    """How one tensor is read. `keys` are its tensors in the files; `read(start, stop)` gives its rows in their dtype."""

    shape: tuple[int, ...]
    keys: tuple[str, ...]
    read: Callable[[int, int], Tensor]


@dataclass
class Plan:
    """How all tensors of a model are read."""

    readings: dict[str, Reading] = field(default_factory=dict)
    """By name, each tensor of the model once."""
    repeated: list[tuple[str, Reading]] = field(default_factory=list)
    """Further copies in the files of tensors that the model ties, with the name of the tied tensor in `readings`."""

    def list_keys(self) -> list[str]:
        return [key for reading in (*self.readings.values(), *(other for _, other in self.repeated)) for key in reading.keys]


def plan_weights(lm: PreTrainedModel, source: WeightSource, *, growing: bool = False, own_config: bool = False) -> Plan:
    """Plan how each parameter and persistent buffer of a model is read. Buffers that the files lack keep their values.

    Args:
        growing: the embedding and the output head may have more rows than in the files.
        own_config: the model was built from the configuration that comes with the files. This decides the advice in errors.

    Raises:
        UserError: the files are of another model, or have a dtype that is not a plain float.
    """
    live = lm.state_dict(keep_vars=True)
    readings, unknown = _match(lm, live, source)
    _check_dtypes(source, readings)
    first_names: dict[int, str] = {}
    for name, tensor in live.items():
        known = first_names.get(id(tensor))
        if known is None or (known not in readings and name in readings):
            first_names[id(tensor)] = name
    plan = Plan()
    missing, misshapen, can_grow = [], [], []
    modules = [module for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module is not None]
    tables = {id(parameter) for module in modules for parameter in module.parameters()}  # a head may have a bias
    parameters = {id(parameter) for parameter in lm.parameters()}
    for name, tensor in live.items():
        reading, first = readings.get(name), first_names[id(tensor)]
        if reading is None:
            if name == first and id(tensor) in parameters:
                missing.append(name)
            continue
        is_smaller = id(tensor) in tables and reading.shape[1:] == tensor.shape[1:] and reading.shape[0] < len(tensor)
        if reading.shape != tensor.shape and not (growing and is_smaller):
            misshapen.append(f"{name} {list(reading.shape)} instead of {list(tensor.shape)}")
            can_grow.append(is_smaller)
        elif name == first:
            plan.readings[name] = reading
        else:
            plan.repeated.append((first, reading))
    faults = _list_faults(missing, unknown, misshapen)
    if wrapper := next((each for each in WRAPPERS if unknown and all(key.startswith(each) for key in unknown)), None):
        raise UserError(
            f'{source.label} was saved with its wrapper: all names begin with "{wrapper}", of {WRAPPERS[wrapper]}: save the '
            "model inside, with save_pretrained"
        )
    only_grown = all(can_grow) and not missing and not unknown
    if faults:
        what = f"its own {CONFIG_FILE}" if own_config else "model.config"
        advice = FETCH_AGAIN if own_config else TAKE_OWN_CONFIG
        raise UserError(
            f"{source.label} is of another model than {what}: {'; '.join(faults)}: "
            + ("set model.resize_embeddings = true to grow the vocabulary" if only_grown else advice)
        )
    return plan


def _list_faults(missing: list[str], unknown: list[str], misshapen: list[str]) -> list[str]:
    kinds = {"it lacks": missing, "the model does not know": unknown, "of another shape are": misshapen}
    return [
        f"{what} {len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
        for what, names in kinds.items()
        if names
    ]


def _check_dtypes(source: WeightSource, readings: dict[str, Reading]) -> None:
    wrong = [key for reading in readings.values() for key in reading.keys if source.entries[key].dtype not in DTYPES.values()]
    if wrong:
        raise UserError(
            f"{source.label}: {len(wrong)} tensors are not {', '.join(DTYPES.values())} (first {wrong[0]}, "
            f"{source.entries[wrong[0]].dtype}): quantised weights cannot be trained on; take the model they were made from"
        )


class _Group:
    """Tensors in the files that transformers converts together."""

    def __init__(self, converter: WeightConverter):
        self.converter = converter
        self.keys: dict[str, list[str]] = defaultdict(list)
        """Names in the files by the converter's pattern, in the order of the numbers in them."""

    def convert(self, lm: PreTrainedModel, name: str, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, values in tensors.items():
            for value in values:
                converter.add_tensor(name, name, pattern, value)  # type: ignore[arg-type]  # a tensor works too
        converted = converter.convert(name, model=lm, config=lm.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}

    def is_stacked(self) -> bool:
        """Whether row i of the result depends only on the i-th tensor of each pattern."""
        first, *others = self.converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others)
            and len({len(keys) for keys in self.keys.values()}) == 1
        )


def _match(lm: PreTrainedModel, live: dict[str, Tensor], source: WeightSource) -> tuple[dict[str, Reading], list[str]]:
    """Readings by name in the model, and the keys in the files that it does not know."""
    transforms = [] if source.is_native else get_model_conversion_mapping(lm)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    readings: dict[str, Reading] = {}
    groups: dict[str, _Group] = {}
    unknown: list[str] = []
    for key in sorted(source.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, lm.base_model_prefix, live)
        if name not in live and key in live:
            name, pattern = key, None
        if name not in live:
            unknown.append(key)
        elif pattern is None:
            readings[name] = read_plainly(source, key)
        else:
            groups.setdefault(name, _Group(by_pattern[pattern])).keys[pattern].append(key)
    for name, group in groups.items():
        readings |= _read_converted(lm, source, name, group)
    return readings, _drop_ignored(lm, unknown)


def _drop_ignored(lm: PreTrainedModel, keys: list[str]) -> list[str]:
    """Drop keys that old files have besides weights: masks, rotary frequencies, and other buffers that are now computed."""
    patterns = {*(lm._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
    buffers = dict(lm.named_buffers())
    return [key for key in keys if key not in buffers and not any(re.search(pattern, key) for pattern in patterns)]


def read_plainly(source: WeightSource, key: str) -> Reading:
    """A tensor that is in the files as it is in memory."""
    return Reading(source.entries[key].shape, (key,), lambda start, stop: source.read(key, start, stop))


def _read_converted(lm: PreTrainedModel, source: WeightSource, name: str, group: _Group) -> dict[str, Reading]:
    keys = tuple(key for own in group.keys.values() for key in own)
    stand_ins = {pattern: [_stand_in(source.entries[key]) for key in own] for pattern, own in group.keys.items()}
    try:
        shapes = {target: tuple(value.shape) for target, value in group.convert(lm, name, stand_ins).items()}
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"{source.label}: {keys[0]} and {len(keys) - 1} more tensors cannot be made into {name} "
            f"({' '.join(str(error).split())[:200]}): some are missing or of another shape; fetch the weights again"
        ) from error
    stacked = group.is_stacked()

    def read(target: str, start: int, stop: int) -> Tensor:
        """Read only the requested experts if they are stacked. Otherwise read all tensors and take the rows from the result."""
        chosen = slice(start, stop) if stacked else slice(None)
        tensors = {
            pattern: [source.read(key, 0, (source.entries[key].shape or (1,))[0]) for key in own[chosen]]
            for pattern, own in group.keys.items()
        }
        value = group.convert(lm, name, tensors)[target]
        return value if stacked else value[start:stop]

    return {
        target: Reading(shape, keys, lambda start, stop, target=target: read(target, start, stop))  # type: ignore[misc]
        for target, shape in shapes.items()
    }


def _stand_in(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, device="meta")
