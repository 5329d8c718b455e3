"""Copies of tensors on the host, for a thread that writes them while training goes on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

TensorTree = dict[str, dict[str, Tensor]]
"""Tensors by section and name. Each is stored as `section.name`."""


class HostStaging:
    """Host buffers of this rank's part of each tensor, allocated when first needed and used again by each copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, tensors: TensorTree) -> TensorTree:
        """Copy this rank's part of each tensor; what the last call returned is overwritten. All ranks call it.

        Returns:
            tensors on the CPU, sharded as the given ones. They share no memory with those, and are complete.
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
