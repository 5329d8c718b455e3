"""Muon: a step along the momentum of a matrix after its singular values have been made about equal.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with steps of the size of AdamW's as in Liu et al. 2025
(arXiv:2502.16982), so that learning rate and weight decay mean the same to both.
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

from flame.optimizers.random_rounding import find_shard_axis, get_local, get_shard, round_into

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7
STEP_SIZE = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW's."""


class _Update(NamedTuple):
    parameter: Tensor
    direction: Tensor
    """This rank's part of it."""


class Muon(Optimizer):
    """Momentum, made orthogonal, and decoupled weight decay.

    A parameter [n, m] is one matrix; [E, n, m] are E of them, the experts of a layer. What an architecture fuses into one matrix
    (queries, keys and values, say) is treated as one.

    A part of a matrix cannot be made orthogonal by itself. The ranks that share the matrices do it in rounds, each with a whole
    matrix of its own: shards go to the owner, and come back. So each element is sent twice a step, in bfloat16 on GPUs, no rank
    works on more than its share of the matrices, and the result does not depend on the number of ranks. Experts are sharded as
    whole matrices and stay where they are. The products are float32 on CPUs and bfloat16 on GPUs, which take them also of weights
    kept in host memory.

    Args:
        params: groups of float32 parameters, sharded over their first dimension or not at all; each group has `param_names`, `lr`
            and `weight_decay`.
        state_dtype: of the momentum; bfloat16 is rounded at random.
        seed: of that rounding.
    """

    def __init__(self, params: Iterable[dict[str, Any]], state_dtype: torch.dtype, seed: int):
        super().__init__(params, {})
        self._state_dtype, self._seed = state_dtype, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures have no user
        for group in self.param_groups:
            trained = [
                (name, parameter)
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
                if parameter.grad is not None
            ]
            # The matrices of a round should take equally long.
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
        """Take the gradient into the momentum, and look one step ahead (Nesterov)."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self._state_dtype)
        state["step"] += 1
        gradient, kept = get_local(parameter.grad), get_local(state["momentum_buffer"])
        momentum = kept.float()  # itself, if it is float32
        momentum.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(momentum, MOMENTUM)
        if kept.dtype == torch.bfloat16:
            round_into(kept, momentum, self._seed, int(state["step"]), name, get_shard(parameter))
        device = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else direction.device.type
        return _Update(parameter, direction.to(device, torch.bfloat16 if device == "cuda" else torch.float32))


def select_matrices(layers: nn.ModuleList) -> list[nn.Parameter]:
    """The parameters of decoder layers that are matrices: weights of linear maps, and stacks of them, one for each expert."""
    return [
        parameter
        for module in layers.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (parameter.ndim == 2 and name == "weight" and not isinstance(module, nn.Embedding))
        or (parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d))
    ]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values near one (0.7 to 1.2), by the published number of Newton-Schulz iterations.

    Args:
        matrices: [..., n, m], of any size; zeros stay zeros.
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
    """The ranks among which a matrix is split; None where each rank holds whole ones."""
    axis = find_shard_axis(parameter)
    if axis is None or not isinstance(parameter, DTensor) or parameter.ndim > 2 or parameter.device_mesh.size(axis) == 1:
        return None
    return parameter.device_mesh.get_group(axis)


def _take_alike(trained: list[tuple[str, Tensor]], count: int) -> list[tuple[str, Tensor]]:
    """Remove up to `count` from the end, the largest, all matrices or all stacks."""
    taken = [trained.pop()]
    while trained and len(taken) < count and trained[-1][1].ndim == taken[0][1].ndim:
        taken.append(trained.pop())
    return taken


def _orthogonalize_whole(updates: list[_Update]) -> list[Tensor]:
    return [orthogonalize(update.direction) for update in updates]


def _orthogonalize_shards(updates: list[_Update], group: dist.ProcessGroup) -> list[Tensor]:
    """Rank r of the group makes the r-th matrix orthogonal. Returns this rank's shard of each."""
    rank, size = group.rank(), group.size()
    shards = [update.direction for update in updates]
    sent = [shard.numel() for shard in shards] + [0] * (size - len(shards))
    shape = updates[rank].parameter.shape if rank < len(updates) else torch.Size((0, 0))
    received = [rows * shape[1] for rows in _split_rows(shape[0], size)]
    own = _exchange(torch.cat([shard.flatten() for shard in shards]), sent, received, group)
    if rank < len(updates):
        own = orthogonalize(own.view(shape)).flatten()
    returned = _exchange(own, received, sent, group).split(sent)
    return [part.view_as(shard) for part, shard in zip(returned, shards, strict=False)]  # the rest is of length 0


def _split_rows(rows: int, ranks: int) -> list[int]:
    """Rows of each rank's shard, as FSDP cuts them: equal ones first, then what is left, then none."""
    most = math.ceil(rows / ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


def _exchange(values: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = values.new_empty(sum(received))
    dist.all_to_all_single(output, values, received, sent, group=group)
    return output
