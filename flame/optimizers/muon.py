"""Muon: a step along the momentum of a matrix, with all singular values made about equal.

From Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). As in Liu et al. 2025 (arXiv:2502.16982), steps are about
as large as those of AdamW, so learning rate and weight decay mean the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flame.optimizers.random_rounding import find_shard_axis, get_local, get_shard, name_draws, round_into

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7
STEP_SIZE = 0.2
"""Root mean square of an update at learning rate 1; about that of AdamW."""


class _Update(NamedTuple):
    parameter: Tensor
    direction: Tensor
    """This rank's shard of the update, before it is made orthogonal."""


class Muon(Optimizer):
    """Orthogonalized momentum with decoupled weight decay.

    A parameter [n, m] is one matrix. [E, n, m] is a stack of E matrices, the experts of a layer. Weights that an architecture
    fuses into one matrix, such as queries, keys and values, are treated as one.

    A shard of a matrix cannot be orthogonalized by itself. So the ranks that share matrices work in rounds. In a round, each
    rank receives all shards of one matrix, orthogonalizes it, and sends the shards back. Each element is sent twice per step, in
    bfloat16 on GPUs. The work is spread evenly over ranks, and the result does not depend on their number. Experts are sharded
    as whole matrices and are not sent. Products are float32 on CPUs and bfloat16 on GPUs, also with weights in host memory.

    Args:
        params: groups of float32 parameters, sharded over their first dimension or not at all; each group has `param_names`, `lr`
            and `weight_decay`.
        state_dtype: of the momentum; bfloat16 is rounded at random.
        seed: of the random rounding.
    """

    def __init__(self, params: Iterable[dict[str, Any]], state_dtype: torch.dtype, seed: int):
        super().__init__(params, {})
        self._state_dtype, self._seed = state_dtype, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            trained = [
                (name, parameter)
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
                if parameter.grad is not None
            ]
            # Sorted, so that the matrices of a round take about the same time.
            trained.sort(key=lambda named: (named[1].ndim, named[1].numel(), named[1].shape))
            while trained:
                shard_group = _find_shard_group(trained[-1][1])
                size = shard_group.size() if shard_group is not None else 1
                updates = [self._advance(name, parameter) for name, parameter in _take_alike(trained, size)]
                directions = _orthogonalize_whole(updates) if shard_group is None else _orthogonalize_shards(updates, shard_group)
                for (parameter, _), direction in zip(updates, directions, strict=True):
                    weights = get_local(parameter)
                    weights.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = STEP_SIZE * math.sqrt(max(parameter.shape[-2:]))
                    weights.add_(direction.to(weights), alpha=-group["lr"] * scale)

    def _advance(self, name: str, parameter: Tensor) -> _Update:
        """Update the momentum by the gradient, and return the Nesterov direction."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self._state_dtype)
        state["step"] += 1
        gradient, kept = get_local(parameter.grad), get_local(state["momentum_buffer"])
        momentum = kept.float()  # no copy if it is float32
        momentum.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(momentum, MOMENTUM)
        if kept.dtype == torch.bfloat16:
            round_into(kept, momentum, self._seed, int(state["step"]), name_draws(name), get_shard(parameter))
        device = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else direction.device.type
        return _Update(parameter, direction.to(device, torch.bfloat16 if device == "cuda" else torch.float32))


def select_matrices(layers: nn.ModuleList) -> list[nn.Parameter]:
    """The matrices among the parameters of decoder layers: weights of linear maps, and stacks of them, one per expert."""
    return [
        parameter
        for module in layers.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (parameter.ndim == 2 and name == "weight" and not isinstance(module, nn.Embedding))
        or (parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d))
    ]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values near one (0.7 to 1.2) by Newton-Schulz iterations, as many as in Jordan et al. 2024.

    Args:
        matrices: [..., n, m], of any size. Zero matrices stay zero.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=SMALLEST_NORM)).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def _find_shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which a matrix is sharded. None if each rank holds whole matrices."""
    axis = find_shard_axis(parameter)
    if axis is None or not isinstance(parameter, DTensor) or parameter.ndim > 2 or parameter.device_mesh.size(axis) == 1:
        return None
    return parameter.device_mesh.get_group(axis)


def _take_alike(trained: list[tuple[str, Tensor]], count: int) -> list[tuple[str, Tensor]]:
    """Remove and return up to `count` of the largest from the end of the list: only matrices, or only stacks."""
    taken = [trained.pop()]
    while trained and len(taken) < count and trained[-1][1].ndim == taken[0][1].ndim:
        taken.append(trained.pop())
    return taken


def _orthogonalize_whole(updates: list[_Update]) -> list[Tensor]:
    return [orthogonalize(update.direction) for update in updates]


def _orthogonalize_shards(updates: list[_Update], group: dist.ProcessGroup) -> list[Tensor]:
    """Orthogonalize the r-th matrix on rank r of the group. Returns this rank's shard of each matrix."""
    rank, size = group.rank(), group.size()
    shards = [update.direction for update in updates]
    sent = [shard.numel() for shard in shards] + [0] * (size - len(shards))
    shape = updates[rank].parameter.shape if rank < len(updates) else torch.Size((0, 0))
    received = [rows * shape[1] for rows in _split_rows(shape[0], size)]
    own = _exchange(torch.cat([shard.flatten() for shard in shards]), sent, received, group)
    if rank < len(updates):
        own = orthogonalize(own.view(shape)).flatten()
    returned = _exchange(own, received, sent, group).split(sent)
    return [part.view_as(shard) for part, shard in zip(returned, shards, strict=False)]  # further parts are empty


def _split_rows(rows: int, ranks: int) -> list[int]:
    """Rows of each rank's shard, as FSDP splits them: equal shards, then a smaller one, then empty ones."""
    most = math.ceil(rows / ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


def _exchange(values: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = values.new_empty(sum(received))
    dist.all_to_all_single(output, values, received, sent, group=group)
    return output
