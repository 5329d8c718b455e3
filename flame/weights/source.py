"""Reads ranges of rows of a model's weights from Hugging Face's safetensors, or from a checkpoint of this trainer."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from flame.checkpoints.files import find_missing, list_folders
from flame.checkpoints.manifest import TRAINER_FILE, has_digests, read_state, verify_files, warn_unverified
from flame.checkpoints.storage import TensorReader, verify_tensors
from flame.config.addresses import is_remote
from flame.config.locations import CHECKPOINT_MARKS, is_checkpoint, looks_like_path
from flame.errors import UserError
from flame.runtime.hub import ask_hub, fetch_files
from flame.runtime.remote import fetch

T = TypeVar("T")

OPTION = "checkpoint.initial_load_path"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ASSETS = (CONFIG_FILE, "generation_config.json", "token*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*")
"""Files that come with the weights: the configuration, the generation settings, the tokenizer."""

MODEL_PREFIX = "model.lm."
OBJECTIVE_PREFIX = "model.objective."
MODULES_SUFFIX = "_modules.safetensors"
"""Of the file with an objective's modules, after the objective's name."""
TASK_KEY = "task"
"""In that file's metadata: what the modules were trained for, as JSON."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LFS_MARK = b"version https://git-lfs"


class TensorEntry(NamedTuple):
    """A tensor in a file. `dtype` is torch's name of a plain float dtype; other dtypes keep the file's name."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class WeightSource(Protocol):
    """Named tensors on a disk.

    `label` names the source in messages. `assets` is the folder with configuration and tokenizer. `is_native`: names are those
    of the modules in memory; Hugging Face's files may have other names.
    """

    label: str
    assets: Path
    files: list[Path]
    entries: dict[str, TensorEntry]
    is_native: bool
    task: Any
    """What an objective's modules were trained for; None where the files do not say."""

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU, in the file's dtype. A tensor without dimensions is returned as it is.

        Raises:
            UserError: the file cannot be read.
        """
        ...

    def verify(self, share: int, shares: int, keys: Collection[str] | None = None) -> None:
        """Verify the checksums, if there are any, of the share-th of `shares` parts of the files.

        Args:
            keys: of the tensors that are read; None for all.

        Raises:
            UserError: they differ.
        """
        ...


def find_weights(path: str, option: str = OPTION) -> WeightSource:
    """Open the weights at a path, a remote address or a Hub name. Copies remote ones; otherwise reads only headers.

    Args:
        option: the key or flag that gave the path, for messages.

    Raises:
        UserError: there are no weights, or they are incomplete, or in an unsupported format.
    """
    label = f'{option} = "{path}"'
    if is_remote(path):
        return _open_remote(label, path)
    folder = Path(os.path.expanduser(path))  # os.path accepts any string here, pathlib's own checks do not
    if is_checkpoint(folder):
        return CheckpointSource(label, folder)
    if os.path.isdir(folder):
        return SafetensorsSource(label, folder)
    if os.path.exists(folder):
        raise UserError(f"{label} is a file: give the folder that holds {WEIGHTS_FILE} or {INDEX_FILE}, or a Hub name")
    if looks_like_path(path):
        raise UserError(f"{label}: no such folder")
    return SafetensorsSource(label, _fetch(label, path))


def _open_remote(label: str, address: str) -> WeightSource:
    folder = fetch(label, address, [*ASSETS, INDEX_FILE, *CHECKPOINT_MARKS])
    if is_checkpoint(folder):
        return CheckpointSource(label, fetch(label, address, ["*", "hf/*"]))
    shards = _list_shards(label, folder) if (folder / INDEX_FILE).exists() else [WEIGHTS_FILE]
    return SafetensorsSource(label, fetch(label, address, [*shards, "*" + MODULES_SUFFIX]))


def find_objective_weights(source: WeightSource, objective: str) -> WeightSource | None:
    """The modules of an objective that are where a language model's weights are; None if there are none of this objective.

    Raises:
        UserError: they cannot be read.
    """
    if isinstance(source, CheckpointSource):
        return CheckpointSource(source.label, source.folder, OBJECTIVE_PREFIX) if source.objective == objective else None
    name = objective + MODULES_SUFFIX
    return SafetensorsSource(source.label, source.assets, [name]) if (source.assets / name).exists() else None


def fetch_assets(path: str, option: str = OPTION) -> None:
    """Download the files that come with the weights of a Hub model. Does nothing for a folder.

    Fails at once without network, while transformers would retry for a minute.

    Raises:
        UserError: there is no such model, or the Hub cannot be reached.
    """
    if not looks_like_path(path) and not os.path.exists(path):
        _fetch_assets(f'{option} = "{path}"', path)


def _fetch_assets(label: str, name: str) -> Path:
    return fetch_files(label, name, [*ASSETS, INDEX_FILE])


def _fetch(label: str, name: str) -> Path:
    """Download a Hub model into the cache: the weights that its index lists, and the files that come with them."""
    folder = _fetch_assets(label, name)
    shards = _list_shards(label, folder) if (folder / INDEX_FILE).exists() else [WEIGHTS_FILE]
    ask_hub(label, lambda: huggingface_hub.snapshot_download(name, allow_patterns=[*shards, "*" + MODULES_SUFFIX]))
    if not (folder / shards[0]).exists():
        try:
            found = huggingface_hub.list_repo_files(name)
        except Exception:  # no network, and the weights are not in the cache
            raise UserError(f"{label}: {shards[0]} is not in the cache and the Hub cannot be reached: fetch it first") from None
        raise UserError(f"{label} {_explain_no_weights(found)}")
    return folder


def _explain_no_weights(names: list[str]) -> str:
    """Why a folder with these files has no usable weights, and what to do about it."""
    if any(name.startswith("adapter_model.") for name in names):
        return "holds an adapter and no model: merge it into its base model (peft's merge_and_unload) and save that"
    if binaries := sorted(name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)):
        return (
            f"holds its weights as {binaries[0]}, whose format can run code: convert it, with "
            'AutoModelForCausalLM.from_pretrained("...").save_pretrained("NEW FOLDER"), and give the new folder'
        )
    return f"holds no weights ({WEIGHTS_FILE} or {INDEX_FILE}): give a folder or Hub name that does"


def _list_shards(label: str, folder: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{label}: {INDEX_FILE} cannot be read ({error!r}): fetch it again") from error
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise UserError(f"{label}: {INDEX_FILE} lists no files: fetch it again")
    for shard in shards:
        if os.path.isabs(shard) or ".." in Path(shard).parts:
            raise UserError(
                f'{label}: {INDEX_FILE} names "{shard}", which is not in this folder: do not use it, or mend the index'
            )
    return shards


class SafetensorsSource:
    """A Hugging Face folder with one file of weights, or several with an index. Keeps the files memory-mapped.

    Args:
        names: of the files; None for those of the language model.

    Raises:
        UserError: see `find_weights`.
    """

    is_native = False

    def __init__(self, label: str, folder: Path, names: list[str] | None = None):
        self.label, self.assets = label, folder
        self.files = [folder / name for name in names or self._list_files(folder)]
        self.entries: dict[str, TensorEntry] = {}
        self.task: Any = None
        self._slices: dict[str, tuple[Any, Path]] = {}
        for path in self.files:
            self._open(path)

    def _list_files(self, folder: Path) -> list[str]:
        if not (folder / INDEX_FILE).exists():
            if (folder / WEIGHTS_FILE).exists():
                return [WEIGHTS_FILE]
            if checkpoints := list_folders(folder):
                raise UserError(f"{self.label} is a folder of checkpoints: name one of them, such as {checkpoints[-1].name}")
            raise UserError(f"{self.label} {_explain_no_weights([path.name for path in folder.iterdir()])}")
        shards = _list_shards(self.label, folder)
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            raise UserError(
                f"{self.label} lacks {len(missing)} of the {len(shards)} files that {INDEX_FILE} lists, "
                f"{_list_first(missing)}: fetch them"
            )
        return shards

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            if path.name.endswith(MODULES_SUFFIX):
                self.task = json.loads((file.metadata() or {}).get(TASK_KEY, "null"))
            for key in file.keys():  # noqa: SIM118 - the object is not a mapping
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                name = DTYPES.get(dtype, dtype)
                size = getattr(torch, name).itemsize if dtype in DTYPES else 1
                self.entries[key] = TensorEntry(shape, name, math.prod(shape) * size)
                self._slices[key] = file, path
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{self.label}: {path.name} cannot be read ({_explain_damage(path, error)}): fetch it again"
            ) from error

    def read(self, key: str, start: int, stop: int) -> Tensor:
        file, path = self._slices[key]
        try:
            return file.get_slice(key)[start:stop] if self.entries[key].shape else file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.label}: {key} in {path.name} cannot be read ({error}): fetch the file again") from error

    def verify(self, share: int, shares: int, keys: Collection[str] | None = None) -> None:
        """Nothing to do: the format has no checksums, and its header was checked against the file's size."""


def _explain_damage(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK:
            return "it is a Git LFS pointer and not the file itself"
    return f"{error}; it has {path.stat().st_size} bytes"


class CheckpointSource:
    """The language model in a `step-N` folder, or what else has names with a prefix.

    `objective` names the objective that was trained; None without one.

    Raises:
        UserError: see `find_weights`.
    """

    is_native = True

    def __init__(self, label: str, folder: Path, prefix: str = MODEL_PREFIX):
        missing = find_missing(folder)
        if missing or folder.suffix:
            raise UserError(f"{label} is not a complete checkpoint folder (step-N, with {TRAINER_FILE} in it): give another one")
        self.label, self.folder, self.assets, self._prefix = label, folder, folder / "hf", prefix
        self.objective: str | None = None
        self.task: Any = None
        self._metadata = self._check(self._read_metadata)
        self.entries: dict[str, TensorEntry] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if key.startswith(self._prefix) and isinstance(entry, TensorStorageMetadata):
                dtype = entry.properties.dtype
                shape = tuple(entry.size)
                size = math.prod(shape) * dtype.itemsize
                self.entries[key.removeprefix(self._prefix)] = TensorEntry(shape, str(dtype).removeprefix("torch."), size)
        self.files = [folder / name for name in sorted({info.relative_path for info in self._metadata.storage_data.values()})]

    def _read_metadata(self) -> Any:
        self._state = read_state(self.folder)
        objective = self._state.get("objective") or {}
        self.objective, self.task = objective.get("name"), objective.get("task")
        return TensorReader(self.folder).read_metadata()

    def read(self, key: str, start: int, stop: int) -> Tensor:
        # A stored chunk is the shard of one rank at saving. It can only be read completely.
        shape = self.entries[key].shape
        parts = []
        for chunk in sorted(self._metadata.state_dict_metadata[self._prefix + key].chunks, key=lambda chunk: chunk.offsets):
            first = chunk.offsets[0] if shape else 0
            rows = chunk.sizes[0] if shape else 1
            if rows and first < stop and first + rows > start:
                assert tuple(chunk.sizes[1:]) == shape[1:]
                whole = self._check(partial(self._read_chunk, self._prefix + key, chunk.offsets))
                parts.append(whole[max(start - first, 0) : stop - first] if shape else whole)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_chunk(self, key: str, offsets: torch.Size) -> Tensor:
        location = self._metadata.storage_data[MetadataIndex(key, offsets)]
        with open(self.folder / location.relative_path, "rb") as file:
            file.seek(location.offset)
            return torch.load(io.BytesIO(file.read(location.length)), map_location="cpu", weights_only=True)

    def verify(self, share: int, shares: int, keys: Collection[str] | None = None) -> None:
        if keys is None and has_digests(self._state):
            self._check(partial(verify_files, self.folder, self._state, share, shares))
            return
        if keys is None and share == 0:
            warn_unverified(self.folder)
        read = {self._prefix + key for key in (self.entries if keys is None else keys)}
        own = {index: info for index, info in self._metadata.storage_data.items() if index.fqn in read}
        self._check(partial(verify_tensors, self.folder, replace(self._metadata, storage_data=own), share, shares))

    def _check(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.label} is damaged: {error}; give another checkpoint") from error


def _list_first(names: list[str], count: int = 3) -> str:
    return "first " + ", ".join(names[:count]) if len(names) > count else ", ".join(names)
