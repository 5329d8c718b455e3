"""How tensors lie in a checkpoint's folder: writing them, reading them without trust, and finding damage."""

from __future__ import annotations

import errno
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

from flame.checkpoints.checkpoint_staging import TensorTree

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
    """The library's writer, with the system's error where it reports another one that followed from it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if isinstance(error.__context__, OSError):  # a context does not travel to the other ranks
                raise error.__context__ from None
            raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left, or that the user's share of it is used up."""
    if failures := getattr(error, "failures", None):
        return any(is_disk_full(failure) for failure, _ in failures.values())
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class TensorReader(FileSystemReader):
    """The library's reader. The index, `.metadata`, is a pickle: here it can name nothing but what an index consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the whole checkpoint.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is no index, or holds something else too.
        """
        if kwargs.get("rank") is not None:
            raise FileNotFoundError("there are no indices of single ranks")
        content = (Path(self.path) / METADATA_FILE).read_bytes()
        try:
            metadata = _IndexUnpickler(io.BytesIO(content)).load()
        except Exception as error:  # garbage can make a pickle raise anything
            raise ValueError(f"{METADATA_FILE} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{METADATA_FILE} holds no index of tensors")
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
    """The getattr by which some releases of Python name a member of an enumeration, and nothing else."""
    if not (isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"it asks for an attribute, {name}")
    return owner[name]


def check_tensors(metadata: Metadata, tensors: TensorTree) -> None:
    """Make sure that a checkpoint has all tensors of a run, in their shapes.

    Raises:
        ValueError: it has not.
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
    """Compare the bytes of tensors with the checksums that were written beside them. One share of the files is read.

    Loading does not do so. Each tensor is stored as the archive that torch.save makes, which has a checksum of each record.

    Raises:
        OSError: a file cannot be read, or is not what was written.
    """
    places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for index, info in metadata.storage_data.items():
        places[info.relative_path].append((info.offset, info.length, index.fqn))
    for name in sorted(places)[share::shares]:
        with open(folder / name, "rb") as file:
            for offset, length, key in sorted(places[name]):
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
