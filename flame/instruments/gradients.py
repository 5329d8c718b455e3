"""Do the two losses pull the backbone the same way?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flame.components.distributed import get_gpu


class GradientComparison(NamedTuple):
    """Gradients of two losses, summed over ranks as FSDP does it: 0-d float64 tensors, the same on all ranks."""

    ce_norm: Tensor
    aux_norm: Tensor
    """Of the loss as it is, without `loss_weight`."""
    cosine: Tensor
    """Of the angle between the two; 0 where one of them is zero."""


def compare_gradients(
    model: nn.Module,
    run_ce: Callable[[], Tensor],
    run_aux: Callable[[], Tensor],
    parameters: list[nn.Parameter],
) -> GradientComparison:
    """Gradients of two losses over the same parameters, each by a forward and a backward of its own.

    All ranks call it together, between two backwards of the training step or outside it. It leaves every `.grad` of the model and
    the random state as they were, and both losses start from the same one. Where no gradients wait for the optimizer, it needs
    room for one more copy of them than a step. It does not wait for the device.

    Args:
        model: the FSDP root, or a model that is not sharded, all of whose parameters are left as they were.
        run_ce, run_aux: run the forward, from that root, and return the loss: 0-d, with a graph. Backward is run here.
        parameters: as the optimizer holds them: sharded, under FSDP (see `reshard_weights`). A loss that does not reach one has
            a gradient of 0 there.
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


def name_gradients(comparison: GradientComparison, loss_weight: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics by name, each with the count 1, as `measure_representations` returns them.

    Args:
        loss_weight: factor of the aux loss at this step.
    """
    ce_norm, aux_norm, cosine = comparison
    numbers = {
        "grad_norm_ce": ce_norm,
        "grad_norm_aux": aux_norm,
        "grad_cosine": cosine,
        "grad_ratio": loss_weight * aux_norm / ce_norm,
    }
    return {f"future/{name}": (number, torch.ones_like(number)) for name, number in numbers.items()}


def reshard_weights(model: nn.Module) -> None:
    """Bring back the sharded parameters: after a forward without a backward, FSDP may show whole weights in their place. The next
    forward gathers them again."""
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
    # Over the shards, and not over the replicas of HSDP, which hold the same.
    layouts = {(p.device_mesh, tuple(place.is_shard() for place in p.placements)) for p in sharded}
    assert len(layouts) <= 1 and len(sharded) in (0, len(parameters)), "parameters are sharded in one way"
    for mesh, is_sharded in layouts:
        for axis, shard in enumerate(is_sharded):
            if shard:
                dist.all_reduce(sums, group=mesh.get_group(axis))
    ce_square, aux_square, dot = sums
    norms = (ce_square * aux_square).sqrt()
    return GradientComparison(ce_square.sqrt(), aux_square.sqrt(), dot / torch.where(norms == 0, 1.0, norms))


def _dot(a: list[Tensor | None], b: list[Tensor | None], device: torch.device) -> Tensor:
    """Scalar product of two lists, 0-d float64 on `device`: each pair in float32 or wider, their sum in float64."""
    products = [
        torch.dot(_flatten(x), _flatten(y)).double() for x, y in zip(a, b, strict=True) if x is not None and y is not None
    ]
    return torch.stack(products).sum().to(device) if products else torch.zeros((), dtype=torch.float64, device=device)


def _flatten(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))
