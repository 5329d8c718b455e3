"""The tensor files of a checkpoint: writing them, reading untrusted ones safely, and finding damage."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flame.checkpoints.index_check import check_index
from flame.checkpoints.staging import TensorTree
from flame.runtime.disk import FULL

METADATA_FILE = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float64"),
    ("torch", "float32"),
    ("torch", "float16"),
    ("torch", "bfloat16"),
    ("torch", "int64"),
    ("torch", "int32"),
    ("torch", "int16"),
    ("torch", "int8"),
    ("torch", "uint8"),
    ("torch", "bool"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}


class TensorWriter(FileSystemWriter):
    """torch's writer. If an error of the operating system caused torch's error, it raises the original one.

    `written` names the files that this process has written.
    """

    written: tuple[str, ...] = ()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            future = super().write_data(plan, planner)
            self.written = tuple(sorted({result.storage_data.relative_path for result in future.wait()}))
            return future
        except Exception as error:
            if isinstance(error.__context__, OSError):  # other ranks do not receive the context of an error
                raise error.__context__ from None
            raise


def find_os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an error of torch's checkpointing, or the error itself."""
    if failures := getattr(error, "failures", None):
        return next(filter(None, (find_os_error(failure) for failure, _ in failures.values())), None)
    return error if isinstance(error, OSError) else None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full, or that the user's quota is used up."""
    found = find_os_error(error)
    return found is not None and found.errno in FULL


class TensorReader(FileSystemReader):
    """torch's reader. The index, `.metadata`, is a pickle; here it may only load the classes that an index consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the whole checkpoint.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is not an index, is damaged, or asks for another class.
        """
        if kwargs.get("rank") is not None:
            raise FileNotFoundError("there are no indices of single ranks")
        content = (Path(self.path) / METADATA_FILE).read_bytes()
        try:
            metadata = _IndexUnpickler(io.BytesIO(content)).load()
        except Exception as error:  # a damaged pickle can raise any exception
            raise ValueError(f"{METADATA_FILE} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{METADATA_FILE} holds no index of tensors")
        try:
            check_index(metadata)
        except ValueError as error:
            raise ValueError(f"{METADATA_FILE} cannot be read: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _get_member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _get_member(owner: Any, name: str) -> Any:
    """A getattr that only returns members of enumerations. Some releases of Python pickle these by getattr."""
    if not (isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"it asks for an attribute, {name}")
    return owner[name]


def check_tensors(metadata: Metadata, tensors: TensorTree) -> None:
    """Check that a checkpoint has all tensors of a run, with the same shapes.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    wanted = {f"{section}.{name}": tensor for section, named in tensors.items() for name, tensor in named.items()}
    stored = {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
    missing = [key for key in wanted if key not in stored]
    if missing:
        raise ValueError(f"it has no tensor {missing[0]}" + (f" and lacks {len(missing) - 1} more" if len(missing) > 1 else ""))
    for key, tensor in wanted.items():
        if stored[key].size != tensor.shape:
            raise ValueError(
                f"its tensor {key} has the shape {list(stored[key].size)}, this run's has {list(tensor.shape)}: "
                "it is of another model"
            )


def verify_tensors(folder: Path, metadata: Metadata, share: int, shares: int) -> None:
    """Compare the bytes of tensors with their stored checksums. Loading does not do so.

    Each tensor is stored as an archive by torch.save, with a checksum for each record.

    Args:
        share, shares: check the share-th of `shares` parts of the files, so that ranks can divide the work.

    Raises:
        OSError: a file cannot be read, or is damaged.
    """
    chunks: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for index, info in metadata.storage_data.items():
        chunks[info.relative_path].append((info.offset, info.length, index.fqn))
    for name in sorted(chunks)[share::shares]:
        with open(folder / name, "rb") as file:
            for offset, length, key in sorted(chunks[name]):
                file.seek(offset)
                _verify_archive(file.read(length), f"{name}: the bytes of {key}")


def _verify_archive(content: bytes, what: str) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip() is not None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise OSError(f"{what} are damaged ({error})") from error
    if damaged:
        raise OSError(f"{what} are damaged (checksum)")
