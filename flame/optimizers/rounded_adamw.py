"""AdamW whose moments are kept in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from flame.optimizers.random_rounding import get_local, get_shard, name_draws, round_into


class RoundedAdamW(Optimizer):
    """PyTorch's AdamW in float32, with moments that are stored in bfloat16 between steps, rounded at random.

    This halves the memory of the moments. During a step, one parameter's shard at a time has float32 moments. The random
    rounding depends on the seed and on the parameter's step count, name and shard, so a resumed run repeats it.

    Args:
        params: groups of float32 parameters, each with `param_names`, `lr`, `betas`, `eps` and `weight_decay`.
        seed: of the random rounding.
    """

    def __init__(self, params: Iterable[dict[str, Any]], seed: int):
        super().__init__(params, {})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(name, parameter, group)

    def _update(self, name: str, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, so that reading it does not wait for the GPU
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        weights, gradient = get_local(parameter), get_local(parameter.grad)
        moments = {moment: get_local(state[moment]).float() for moment in ("exp_avg", "exp_avg_sq")}
        adamw(
            [weights],
            [gradient],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [],
            [torch.full((), float(state["step"]), device=weights.device)],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        state["step"] += 1
        for moment, values in moments.items():
            key = (self._seed, int(state["step"]), name_draws(name), moment, get_shard(parameter))
            round_into(get_local(state[moment]), values, *key)
