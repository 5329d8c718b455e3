"""The position in the data of a whole run: a few integers per stream, whatever the number of ranks and workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flame.data.streams import Cursor
from flame.errors import UserError


@dataclass
class DataState:
    """What has been consumed. Streams without a cursor are at their beginning."""

    num_streams: int
    seed: int
    next_sequence: int = 0
    """First global sequence that no rank has consumed."""
    cursors: dict[int, Cursor] = field(default_factory=dict)
    """Next token of each stream advanced so far, by stream."""
    num_documents: int | None = None
    """Rows of the source; None until the data has been read for the first time."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON: integers, and a list (epoch, position, offset) per stream name such as "stream-00017"."""
        return {
            "num_streams": self.num_streams,
            "seed": self.seed,
            "next_sequence": self.next_sequence,
            "num_documents": self.num_documents,
            "cursors": {f"stream-{stream:05d}": list(cursor) for stream, cursor in sorted(self.cursors.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved position.

        Raises:
            UserError: the run has another number of streams or another seed than the saved one.
        """
        for key in ("num_streams", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"training.{key} = {getattr(self, key)}, but the checkpoint was made with {state[key]}: the order of the "
                    f"data depends on it; set it back to {state[key]}, or start a new run in another job.dump_folder"
                )
        self.next_sequence = state["next_sequence"]
        self.num_documents = state["num_documents"]
        self.cursors = {int(name.removeprefix("stream-")): Cursor(*cursor) for name, cursor in state["cursors"].items()}

    def check_documents(self, source_name: str, num_documents: int) -> None:
        """Note the size of the source, or check that it is still the same.

        Raises:
            UserError: it is not, so that the saved position means other documents.
        """
        if self.num_documents not in (None, num_documents):
            raise UserError(
                f'training.dataset = "{source_name}" has {num_documents} documents, but the checkpoint was made with '
                f"{self.num_documents}: restore the same data, or start a new run in another job.dump_folder"
            )
        self.num_documents = num_documents


def merge_states(states: list[DataState]) -> DataState:
    """Join the states of all ranks, taken at the end of the same optimizer step, into the state of the run.

    Each rank advances its own streams; of the others it holds what the last checkpoint said. The furthest cursor is the true one.
    """
    first = states[0]
    assert all(state.next_sequence == first.next_sequence for state in states), (
        "ranks have consumed different numbers of sequences"
    )
    merged = DataState(first.num_streams, first.seed, first.next_sequence, num_documents=first.num_documents)
    for state in states:
        for stream, cursor in state.cursors.items():
            merged.cursors[stream] = max(cursor, merged.cursors.get(stream, cursor))
    return merged
