"""Copies of tensors on the host. A thread writes them while training continues."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

TensorTree = dict[str, dict[str, Tensor]]
"""Tensors by section and name, stored as `section.name`."""


class HostStaging:
    """Host buffers for this rank's shard of each tensor. Allocated at the first copy and reused by later ones."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, tensors: TensorTree) -> TensorTree:
        """Copy this rank's shard of each tensor. Overwrites what the last call returned. All ranks call it.

        Returns:
            tensors on the CPU, sharded as the given ones. The copies are finished and share no memory with them.
        """
        staged = {
            section: {name: self._copy_one(f"{section}.{name}", tensor) for name, tensor in named.items()}
            for section, named in tensors.items()
        }
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
        return staged

    def _copy_one(self, key: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if key not in self._buffers:
            self._buffers[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        buffer = self._buffers[key]
        buffer.copy_(local, non_blocking=local.is_cuda)
        if not isinstance(tensor, DTensor):
            return buffer
        mesh = self._find_cpu_mesh(tensor.device_mesh)
        return DTensor.from_local(buffer, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())

    def _find_cpu_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]
