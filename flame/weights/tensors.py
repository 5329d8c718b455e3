"""Reads the model's tensors of a checkpoint in one process on the CPU, some at a time."""

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

from flame.checkpoints.files import find_missing
from flame.checkpoints.manifest import TRAINER_FILE, has_digests, read_state, verify_files, warn_unverified
from flame.checkpoints.storage import TensorReader, verify_tensors
from flame.config.locations import find_checkpoint_in
from flame.errors import UserError

MODEL_PREFIX = "model."
"""Prefix of the model's tensors in a checkpoint."""


class ModelTensors:
    """The model in a committed `step-N/` folder, with the names of `TrainingModel`. Its bytes are verified first.

    Raises:
        UserError: the folder is not a complete checkpoint, or is damaged.
    """

    def __init__(self, checkpoint: Path):
        if newest := find_checkpoint_in(str(checkpoint)):
            raise UserError(f'checkpoint "{checkpoint}" is a folder of checkpoints: name one of them, such as "{newest}"')
        if checkpoint.suffix or find_missing(checkpoint):
            raise UserError(f'checkpoint "{checkpoint}" is not a complete checkpoint folder (step-N, with {TRAINER_FILE} in it)')
        self.checkpoint = checkpoint
        self._reader = TensorReader(checkpoint)
        try:
            self.state: dict[str, Any] = read_state(checkpoint)
            if has_digests(self.state):
                verify_files(checkpoint, self.state)
            metadata = self._reader.read_metadata()
            if not has_digests(self.state):
                warn_unverified(checkpoint)
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
        """Read some tensors, unsharded."""
        tensors = {name: torch.empty(self._entries[name].size, dtype=self._entries[name].properties.dtype) for name in names}
        if tensors:  # torch would read an empty dictionary as an entry of its own
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
                dcp.load({MODEL_PREFIX.removesuffix("."): tensors}, storage_reader=self._reader, no_dist=True)
        return tensors


def read_model_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read all tensors of the model.

    Raises:
        UserError: as in `ModelTensors`.
    """
    tensors = ModelTensors(checkpoint)
    return tensors.load(tensors.names)
