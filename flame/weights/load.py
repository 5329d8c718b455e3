"""Loads the initial weights of a new run into a sharded model.

Each rank reads only its own rows, one tensor at a time. So no process holds all weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from flame.config.run import Checkpoint, Model
from flame.errors import UserError
from flame.models.wrapper import TrainingModel
from flame.objectives.step import get_objective
from flame.runtime.agreement import run_on_all
from flame.runtime.sameness import check_same, reads_for_machine
from flame.weights.assets import Settings, read_generation_settings
from flame.weights.fingerprint import describe_weights
from flame.weights.objective_modules import ModulePlan, plan_modules
from flame.weights.plan import TAKE_OWN_CONFIG, Plan, Reading, plan_weights
from flame.weights.source import CONFIG_FILE, WeightSource, find_objective_weights, find_weights

GIB = 2**30
BUFFER_BYTES = 16 * 2**20
SLOWEST_LOAD = timedelta(hours=2)

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
"""Settings that change how weights are used, but not their shapes."""
IRRELEVANT = {"architectures", "dtype", "torch_dtype", "use_cache", "vocab_size", "id2label", "label2id", "auto_map"}


class Loaded(NamedTuple):
    """What a run gets along with its initial weights."""

    lines: list[str]
    """For the log: what was loaded, which modules start fresh, and which settings differ from those of the weights."""
    generation: Settings
    """Generation settings for exports."""


def load_initial_weights(
    model: TrainingModel, options: Model, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast
) -> Loaded:
    """Load the weights of `checkpoint.initial_load_path` into a materialized model. All ranks call it.

    The objective's modules are taken if they are there and fit, unless `checkpoint.load_objective` is false.

    Raises:
        UserError: the weights cannot be read or downloaded, or are of another model.
        RankFailure: the machine failed.
    """
    group = dist.new_group(backend="gloo", timeout=SLOWEST_LOAD)  # a long timeout, since disk or network may be slow
    try:
        source = run_on_all(partial(find_weights, checkpoint.initial_load_path), group)
        check_same(run_on_all(lambda: describe_weights(source) if reads_for_machine() else {}, group), group)
        differences = run_on_all(partial(check_config, source, model.lm.config), group)
        generation = run_on_all(partial(read_generation_settings, source.assets, source.label), group)
        run_on_all(partial(source.verify, dist.get_rank(), dist.get_world_size()), group)
        resize, own_config = options.resize_embeddings, not options.config
        loaded = run_on_all(partial(load_hf_weights, model, source, resize=resize, own_config=own_config), group)
        modules = ModulePlan({}, set(), [])
        if checkpoint.load_objective:
            share = dist.get_rank(), dist.get_world_size()
            modules = run_on_all(partial(load_objective_modules, model, source, share), group)
    finally:
        dist.destroy_process_group(group)
    lines = [*loaded, *modules.lines, *_describe_fresh(model, modules.taken), *differences]
    if warnings := _compare_tokenizers(source.assets, tokenizer):
        lines += warnings
        if generation:
            lines.append(f"{GENERATION_CONFIG_NAME} is left out of exports: it may name tokens by ids that mean others here")
            generation = {}
    return Loaded(lines, generation)


def load_hf_weights(model: TrainingModel, source: WeightSource, *, resize: bool = False, own_config: bool = False) -> list[str]:
    """Copy weights into the language model, in the dtype of its parameters. Names, shapes and dtypes are checked first.

    Args:
        model: materialized; parameters are plain tensors, or DTensors sharded over their first dimension.
        resize: the embedding and the output head may have more rows than in the files. New rows are set to the mean of the
            others, which is the same on any number of ranks.
        own_config: the model was built from the configuration that comes with the weights.

    Returns:
        lines for the log.

    Raises:
        UserError: the weights are of another model, or cannot be read. Some may have been copied.
    """
    plan = plan_weights(model.lm, source, growing=resize, own_config=own_config)
    live = model.lm.state_dict()
    with torch.no_grad():
        for name, reading in plan.readings.items():
            _fill(live[name], reading, source)
        for name, repeated in plan.repeated:
            _check_tied(source, live[name], name, repeated)
    return [_describe_loaded(source, plan), *_describe_new_rows(live, plan)]


def load_objective_modules(model: TrainingModel, source: WeightSource, share: tuple[int, int] = (0, 1)) -> ModulePlan:
    """Copy the objective's modules from where the language model's weights are, as far as they fit.

    Args:
        share: (index, count) of the part of the files whose checksums are verified.

    Raises:
        UserError: they cannot be read.
    """
    objective = get_objective(model)
    found = None if objective is None else find_objective_weights(source, objective.name)
    plan = ModulePlan({}, set(), []) if objective is None or found is None else plan_modules(objective, found)
    if objective is not None and (missing := [name for name in objective.list_required() if name not in plan.taken]):
        reason = f" ({'; '.join(plan.lines)})" if plan.lines else ""
        raise UserError(
            f"{source.label} lacks {', '.join(missing)} of the objective {objective.name}, which this run does not train"
            f"{reason}: give the export of a run that trained it, or train it here"
        )
    if objective is None or found is None:
        return plan
    live = objective.state_dict()
    found.verify(*share, plan.readings)
    with torch.no_grad():
        for name, reading in plan.readings.items():
            _fill(live[name], reading, found)
    return plan


def resize_vocabulary(model_config: PretrainedConfig, tokenizer_size: int, *, is_wanted: bool) -> None:
    """Increase the vocabulary size of a configuration, in place, to that of the tokenizer.

    Args:
        is_wanted: `model.resize_embeddings`; if false, nothing changes.
    """
    if is_wanted:
        model_config.vocab_size = max(model_config.vocab_size, tokenizer_size)


# ---------------------------------------------------------------- checks


def check_config(source: WeightSource, model_config: PretrainedConfig) -> list[str]:
    """Compare the configuration that comes with weights, if there is one, with that of the model.

    Returns:
        lines for the log, for settings that differ and are allowed to.

    Raises:
        UserError: it is of another architecture, or the weights are quantised.
    """
    settings = _read_settings(source)
    if settings is None:
        return []
    if (theirs := settings.get("model_type")) != model_config.model_type:
        raise UserError(
            f'{source.label} is of another architecture than model.config: model_type "{theirs}" instead of '
            f'"{model_config.model_type}": {TAKE_OWN_CONFIG}'
        )
    if settings.get("quantization_config"):
        raise UserError(f"{source.label} has quantised weights, which cannot be trained on: take the model they were made from")
    changes = dict(_list_changes(settings, model_config))
    names = model_config.attribute_map  # some families, such as GPT-2, have other names for these settings
    if heads := [key for key in (names.get(key, key) for key in HEADS) if key in changes]:
        old, new = changes[heads[0]]
        raise UserError(
            f"{source.label} is of another architecture than model.config: {heads[0]} = {old} instead of {new}: {TAKE_OWN_CONFIG}"
        )
    return [f"other than the weights were made with: {key} = {new} instead of {old}" for key, (old, new) in changes.items()]


def _read_settings(source: WeightSource) -> dict[str, Any] | None:
    path = source.assets / CONFIG_FILE
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source.label}: {CONFIG_FILE} cannot be read ({error}): fetch it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source.label}: {CONFIG_FILE} is not a Hugging Face model configuration: fetch it again")
    return settings


def _list_changes(settings: dict[str, Any], model_config: PretrainedConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    try:
        theirs = type(model_config).from_dict(settings).to_dict()
    except Exception:  # a configuration of another release can raise anything; shapes are compared later
        return
    for key, value in model_config.to_dict().items():
        is_relevant = not key.startswith("_") and not key.endswith(("_token_id", "_version")) and key not in IRRELEVANT
        if is_relevant and key in theirs and theirs[key] != value:
            yield key, (theirs[key], value)


def _check_tied(source: WeightSource, tensor: Tensor, name: str, repeated: Reading) -> None:
    local, start, stop = _locate(tensor)
    stop = min(stop, repeated.shape[0])
    if stop > start and not torch.equal(local[: stop - start].cpu(), repeated.read(start, stop).to(local.dtype)):
        raise UserError(
            f"{source.label} has {repeated.keys[0]} beside {name} with other values, but tie_word_embeddings = true in "
            "the model's configuration: set it to false there"
        )


def _compare_tokenizers(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Warnings about tokens whose ids differ from those that the weights were trained with."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return []
    try:
        theirs = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises plain exceptions
        return [f"warning: {path} cannot be read ({' '.join(str(error).split())[:200]}); tokens are not compared with it"]
    ours = tokenizer.get_vocab()
    changed = [token for token, number in theirs.items() if ours.get(token) != number]
    if not changed:
        return []
    return [
        f"warning: {len(changed)} of the {len(theirs)} tokens that the weights know have another id or none in "
        f"model.tokenizer_path, such as {changed[0]!a}"
    ]


# ---------------------------------------------------------------- copying


def find_rows(size: int, shards: int, index: int) -> tuple[int, int]:
    """Rows [start, stop) of one of FSDP2's shards of `size` rows. FSDP2 splits like torch.chunk; the last may be empty."""
    length = -(-size // shards)
    return min(index * length, size), min((index + 1) * length, size)


def _locate(tensor: Tensor) -> tuple[Tensor, int, int]:
    """This process's shard of a tensor, and its rows [start, stop). A tensor without dimensions counts as one row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, (len(tensor) if tensor.ndim else 1)
    local, start, stop = tensor.to_local(), 0, len(tensor)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            assert placement == Shard(0) and (start, stop) == (0, len(tensor))
            start, stop = find_rows(len(tensor), tensor.device_mesh.size(dim), coordinate[dim])
    assert len(local) == stop - start
    return local, start, stop


def _fill(tensor: Tensor, reading: Reading, source: WeightSource) -> None:
    """Copy this process's rows of a tensor.

    Raises:
        UserError: a value is not finite. Training would only say that the first loss is not.
    """
    local, start, stop = _locate(tensor)
    stored = min(stop, reading.shape[0]) if reading.shape else stop
    if stored > start:
        rows = reading.read(start, stored)
        (local[: stored - start] if tensor.ndim else local).copy_(rows)
    if stop > max(start, stored):
        local[max(stored - start, 0) :].copy_(_average_rows(reading))
    if not local.isfinite().all():
        count = int((~local.isfinite()).sum())
        raise UserError(
            f"{source.label}: {_find_not_finite(reading, source, local.dtype)} holds {count} values that are NaN or infinite in "
            f"{local.dtype}: take the weights of an earlier step, or fetch them again"
        )


def _find_not_finite(reading: Reading, source: WeightSource, dtype: torch.dtype) -> str:
    """The key, of those that make one tensor, that holds a value that is not finite."""
    for key in reading.keys[:-1]:
        stored = source.read(key, 0, (source.entries[key].shape or (1,))[0])
        if not stored.to(dtype).isfinite().all():
            return key
    return reading.keys[-1]


def _average_rows(reading: Reading) -> Tensor:
    """Mean row, float64 [columns], or of a bias its mean, computed chunk by chunk."""
    rows, *columns = reading.shape
    total = torch.zeros(columns, dtype=torch.float64)
    length = max(BUFFER_BYTES // (8 * total.numel()), 1)
    for start in range(0, rows, length):
        total += reading.read(start, min(start + length, rows)).sum(0, dtype=torch.float64)
    return total / rows


# ---------------------------------------------------------------- the log


def _describe_loaded(source: WeightSource, plan: Plan) -> str:
    entries = [source.entries[key] for key in plan.list_keys()]
    dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
    size = sum(entry.nbytes for entry in entries) / GIB
    files = f"{len(source.files)} file" + ("s" if len(source.files) > 1 else "")
    return f"weights from {source.label}: {len(entries)} tensors, {size:.2f} GiB in {dtypes}, in {files}"


def _describe_new_rows(live: dict[str, Tensor], plan: Plan) -> list[str]:
    return [
        f"{name}: rows {reading.shape[0]} to {len(live[name]) - 1} are new and start at the mean of the others"
        for name, reading in plan.readings.items()
        if reading.shape and reading.shape[0] < len(live[name])
    ]


def _describe_fresh(model: TrainingModel, taken: set[str]) -> list[str]:
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in (model.objective.named_children() if model.objective is not None else ())
    }
    return [f"{name} starts fresh (parameters: {count})" for name, count in counts.items() if count and name not in taken]
