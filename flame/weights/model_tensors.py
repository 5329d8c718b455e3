"""Tensors of the model in a checkpoint, read without the run: one process, no GPU, as many at a time as are asked for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame.checkpoints.checkpoint_files import TRAINER_FILE, find_missing, read_state
from flame.checkpoints.checkpoint_storage import TensorReader, verify_tensors
from flame.errors import UserError

MODEL_PREFIX = "model."
"""Of the model's tensors among those of a checkpoint."""


class ModelTensors:
    """The model in a committed `step-N/` folder; names are those within `FutureLM`. Its bytes are verified first.

    Raises:
        UserError: the folder is no complete checkpoint, or is damaged.
    """

    def __init__(self, checkpoint: Path):
        if checkpoint.suffix or find_missing(checkpoint):
            raise UserError(f'checkpoint "{checkpoint}" is not a complete checkpoint folder (step-N, with {TRAINER_FILE} in it)')
        self.checkpoint = checkpoint
        self._reader = TensorReader(checkpoint)
        try:
            self.state: dict[str, Any] = read_state(checkpoint)
            metadata = self._reader.read_metadata()
            own = {index: info for index, info in metadata.storage_data.items() if index.fqn.startswith(MODEL_PREFIX)}
            verify_tensors(checkpoint, dataclasses.replace(metadata, storage_data=own), share=0, shares=1)
        except (OSError, ValueError) as error:
            raise UserError(f'checkpoint "{checkpoint}" is damaged: {error}; convert another one') from error
        self._entries = {
            name.removeprefix(MODEL_PREFIX): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(MODEL_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> torch.Size:
        return self._entries[name].size

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors, whole."""
        tensors = {name: torch.empty(self._entries[name].size, dtype=self._entries[name].properties.dtype) for name in names}
        if tensors:  # an empty section would count as a thing to read
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
                dcp.load({MODEL_PREFIX.removesuffix("."): tensors}, storage_reader=self._reader, no_dist=True)
        return tensors


def read_model_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of the model at once.

    Raises:
        UserError: as `ModelTensors`.
    """
    tensors = ModelTensors(checkpoint)
    return tensors.load(tensors.names)
