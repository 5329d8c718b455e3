"""Compares the gradients of the two losses on the backbone: do they point the same way?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flame.runtime.distributed import get_gpu
from flame.runtime.measures import Mean


class GradientComparison(NamedTuple):
    """Two gradients, summed over ranks as FSDP does: 0-d float64 tensors, equal on all ranks."""

    ce_norm: Tensor
    aux_norm: Tensor
    """Without the factor `loss_weight`."""
    cosine: Tensor
    """Cosine of the angle between them; 0 if one of them is zero."""


def compare_gradients(
    model: nn.Module,
    run_ce: Callable[[], Tensor],
    run_aux: Callable[[], Tensor],
    parameters: list[nn.Parameter],
) -> GradientComparison:
    """Compare the gradients of two losses over the same parameters. Each runs its own forward and backward.

    All ranks call it together, inside or outside a training step but not during a backward. Both losses start from the same
    random state. Every `.grad` and the random state are restored. If no gradients are waiting for the optimizer, it needs memory
    for one more copy of them than a step. It does not wait for the device.

    Args:
        model: the FSDP root, or a model that is not sharded.
        run_ce, run_aux: run the forward through `model` and return the loss, 0-d with a graph. Backward is run here.
        parameters: the optimizer's parameters: sharded ones, under FSDP (see `reshard_weights`). A parameter that a loss does
            not depend on counts with a gradient of 0.
    """
    reshard_weights(model)
    everything = list(model.parameters())
    known = set(map(id, everything))
    assert all(id(parameter) in known for parameter in parameters), "list the parameters after `reshard_weights`"
    kept = [parameter.grad for parameter in everything]
    gpu = get_gpu()

    def differentiate(run: Callable[[], Tensor]) -> list[Tensor | None]:
        for parameter in everything:
            parameter.grad = None
        with torch.random.fork_rng([] if gpu is None else [gpu]):
            run().backward()
        return [_get_local_gradient(parameter) for parameter in parameters]

    try:
        return _compare(differentiate(run_ce), differentiate(run_aux), parameters)
    finally:
        for parameter, grad in zip(everything, kept, strict=True):
            parameter.grad = grad


def name_gradients(comparison: GradientComparison, loss_weight: float) -> dict[str, Mean]:
    """Metrics of a comparison, by name.

    Args:
        loss_weight: factor of the auxiliary loss at this step.
    """
    ce_norm, aux_norm, cosine = comparison
    numbers = {
        "grad_norm_ce": ce_norm,
        "grad_norm_aux": aux_norm,
        "grad_cosine": cosine,
        "grad_ratio": loss_weight * aux_norm / ce_norm,
    }
    return {name: Mean(number, torch.ones_like(number)) for name, number in numbers.items()}


def reshard_weights(model: nn.Module) -> None:
    """Reshard all FSDP modules. After a forward without a backward, FSDP may still expose whole weights instead of shards. The
    next forward gathers them again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _get_local_gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


@torch.no_grad()
def _compare(ce: list[Tensor | None], aux: list[Tensor | None], parameters: list[nn.Parameter]) -> GradientComparison:
    """Norms and cosine of two lists of local gradients; a collective call under FSDP."""
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    device = torch.device(sharded[0].device_mesh.device_type) if sharded else parameters[0].device
    sums = torch.stack([_dot(ce, ce, device), _dot(aux, aux, device), _dot(ce, aux, device)])
    # Sum over shards only: the replicas of HSDP hold equal gradients.
    layouts = {(p.device_mesh, tuple(placement.is_shard() for placement in p.placements)) for p in sharded}
    assert len(layouts) <= 1 and len(sharded) in (0, len(parameters)), "parameters are sharded in one way"
    for mesh, is_sharded in layouts:
        for axis, shard in enumerate(is_sharded):
            if shard:
                dist.all_reduce(sums, group=mesh.get_group(axis))
    ce_square, aux_square, dot = sums
    norms = (ce_square * aux_square).sqrt()
    return GradientComparison(ce_square.sqrt(), aux_square.sqrt(), dot / torch.where(norms == 0, 1.0, norms))


def _dot(a: list[Tensor | None], b: list[Tensor | None], device: torch.device) -> Tensor:
    """Scalar product of two lists, 0-d float64 on `device`. Each pair is multiplied in float32 or wider."""
    products = [
        torch.dot(_flatten(x), _flatten(y)).double() for x, y in zip(a, b, strict=True) if x is not None and y is not None
    ]
    return torch.stack(products).sum().to(device) if products else torch.zeros((), dtype=torch.float64, device=device)


def _flatten(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))
