"""What is checked of a checkpoint while it is read, beside the bytes of its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from flame.errors import UserError
from flame.runtime.agreement import RankFailure, describe, run_on_all

T = TypeVar("T")


def find_not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter of which this rank's shard holds NaN or infinity; None if there is none.

    It waits for the device once.
    """
    named = [(name, _get_local(parameter)) for name, parameter in model.named_parameters()]
    if not named:
        return None
    home = named[0][1].device
    is_finite = torch.stack([shard.isfinite().all().to(home) for _, shard in named]).tolist()
    return next((name for (name, _), finite in zip(named, is_finite, strict=True) if not finite), None)


def check_finite(model: nn.Module) -> None:
    """Check weights that were read.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if name := find_not_finite(model):
        raise ValueError(f"its weights are not finite, first {name}")


def _get_local(parameter: Tensor) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def run_unverified(action: Callable[[], T]) -> T:
    """`run_on_all` for an action on content that nothing vouches for: any error that is not the machine's is damage."""

    def run() -> T:
        try:
            return action()
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError, RankFailure, ValueError):
            raise
        except CheckpointException as error:
            if any(isinstance(met, OSError | MemoryError | KeyboardInterrupt) for met, _ in error.failures.values()):
                raise
            raise ValueError(describe(error)) from error
        except Exception as error:
            raise ValueError(describe(error)) from error

    return run_on_all(run)
