"""Totals of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Counters:
    """Totals of the run so far, over all ranks. They are logged and stored in checkpoints."""

    tokens_seen: int = 0
    bad_rows: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_aux: int = 0
    skipped_aux_in_a_row: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)

    def flatten(self) -> dict[str, float]:
        """Return the totals as metrics. Tokens by source are included if there are several sources."""
        values = asdict(self)
        by_source = values.pop("tokens_by_source")
        return values | ({f"tokens_seen/{name}": tokens for name, tokens in by_source.items()} if len(by_source) > 1 else {})

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the totals of a checkpoint. A source that it does not have keeps its count."""
        by_source = self.tokens_by_source | saved["tokens_by_source"]
        vars(self).update(saved | {"tokens_by_source": by_source})
