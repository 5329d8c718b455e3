"""Training state that is not a tensor: what checkpoints keep in `trainer.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from flame.data.state import DataState, merge_states
from flame.logging.counters import Counters


@dataclass
class RunState:
    """Progress of a run on one rank. Only `data` differs between ranks."""

    counters: Counters
    data: DataState
    step: int = 0
    """Optimizer steps done."""
    validated_step: int = 0
    """Step of the last validation."""
    evaluated_step: int = 0
    """Step of the last evaluation."""
    service_ids: dict[str, str] = field(default_factory=dict)
    """Identity of the run at services such as Weights & Biases, by metric writer."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Generation settings that came with the initial weights."""

    def gather(self) -> dict[str, Any]:
        """Return the state of all ranks, JSON-serializable. All ranks call it, between two steps."""
        states: list[DataState | None] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.data)
        return {
            "step": self.step,
            "validated_step": self.validated_step,
            "evaluated_step": self.evaluated_step,
            "counters": asdict(self.counters),
            "data": merge_states([state for state in states if state is not None]).state_dict(),
            "service_ids": self.service_ids,
            "generation": self.generation,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restore a state that `gather` has returned, on any number of ranks.

        Raises:
            UserError: the number of data streams or the seed has changed.
        """
        self.step = saved["step"]
        self.validated_step = saved["validated_step"]
        self.evaluated_step = saved.get("evaluated_step", 0)  # checkpoints of older releases have none
        self.counters.load(saved["counters"])
        self.data.load_state_dict(saved["data"])
        self.service_ids = saved["service_ids"]
        self.generation = saved["generation"]
