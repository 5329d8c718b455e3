"""What a run has come to, beside its tensors: what its checkpoints keep in `trainer.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from flame.components.counters import Counters
from flame.data.state import DataState, merge_states


@dataclass
class RunState:
    """How far a run is, on one rank. Only `data` differs between ranks."""

    counters: Counters
    data: DataState
    step: int = 0
    """Optimizer steps done."""
    validated_step: int = 0
    """The last one that has been validated."""
    wandb_id: str | None = None
    """Identity at Weights & Biases."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Settings for generation that came with the first weights."""

    def gather(self) -> dict[str, Any]:
        """Return the state of all ranks, JSON-able. All ranks call it, between two steps."""
        states: list[DataState | None] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.data)
        return {
            "step": self.step,
            "validated_step": self.validated_step,
            "counters": asdict(self.counters),
            "data": merge_states([state for state in states if state is not None]).state_dict(),
            "wandb_id": self.wandb_id,
            "generation": self.generation,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `gather` has returned, on this or another number of ranks.

        Raises:
            UserError: the data was dealt out otherwise.
        """
        self.step = saved["step"]
        self.validated_step = saved["validated_step"]
        self.counters.load(saved["counters"])
        self.data.load_state_dict(saved["data"])
        self.wandb_id = saved["wandb_id"]
        self.generation = saved.get("generation", {})  # older checkpoints have none
