"""The position of a run in its data: a few integers per stream, independent of the number of ranks and workers.

Step 9 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flame.data.batch import PackedBatch
from flame.data.corpus_content import Content
from flame.data.document_streams import Cursor
from flame.errors import UserError


@dataclass
class DataState:
    """What has been consumed. A stream without a cursor is at its beginning."""

    num_streams: int
    seed: int
    next_sequence: int = 0
    """First global sequence that no rank has consumed."""
    cursors: dict[str, dict[int, Cursor]] = field(default_factory=dict)
    """Next token of each stream that has been read, by source and stream."""
    num_units: dict[str, int] = field(default_factory=dict)
    """Documents in each source; shards, if the source is streamed."""
    contents: dict[str, Content] = field(default_factory=dict)
    """What each source holds, so that a resumed run knows it again."""
    former_names: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Names that a source had before a resume renamed it, each with the last step of which records have it."""

    def advance(self, batches: Iterable[PackedBatch], dp_world: int) -> None:
        """Record that this rank has consumed these batches, and every other rank equally many."""
        for batch in batches:
            assert 0 <= batch.sequence_index - self.next_sequence < dp_world
            assert batch.stream == batch.sequence_index % self.num_streams
            self.cursors.setdefault(batch.source, {})[batch.stream] = batch.cursor
            self.next_sequence += dp_world

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON: integers, and for each source and stream a list (epoch, position, row, offset)."""
        return {
            "num_streams": self.num_streams,
            "seed": self.seed,
            "next_sequence": self.next_sequence,
            "sources": {
                source: {
                    "num_units": self.num_units.get(source),
                    **({"content": self.contents[source]} if source in self.contents else {}),
                    **({"former_names": self.former_names[source]} if source in self.former_names else {}),
                    "cursors": {f"stream-{stream:05d}": list(cursor) for stream, cursor in sorted(cursors.items())},
                }
                for source, cursors in sorted(self.cursors.items())
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved position.

        Raises:
            UserError: the number of streams or the seed differs from the saved one.
        """
        for key in ("num_streams", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"training.{key} = {getattr(self, key)}, but the checkpoint was made with {state[key]}: the order of the "
                    f"data depends on it; set it back to {state[key]}, or start a new run in another job.dump_folder"
                )
        self.next_sequence = state["next_sequence"]
        counted = {name: saved["num_units"] for name, saved in state["sources"].items()}
        self.num_units = {name: count for name, count in counted.items() if count is not None}
        self.former_names = {name: saved["former_names"] for name, saved in state["sources"].items() if "former_names" in saved}
        self.cursors = {
            name: {int(stream.removeprefix("stream-")): Cursor(*cursor) for stream, cursor in saved["cursors"].items()}
            for name, saved in state["sources"].items()
        }

    def check_units(self, num_units: dict[str, int]) -> None:
        """Record the sizes of the sources. Sizes that are already known must not have changed.

        Raises:
            UserError: a size has changed, so that the saved position would mean other documents.
        """
        changed = [
            f'source "{name}" has {count} documents or shards, but the checkpoint was made with {self.num_units[name]}: '
            "restore the same data, or start a new run in another job.dump_folder"
            for name, count in num_units.items()
            if self.num_units.get(name, count) != count
        ]
        if changed:
            raise UserError(*changed)
        self.num_units |= num_units


def merge_states(states: list[DataState]) -> DataState:
    """Merge the states of all ranks at the end of an optimizer step into the state of the run.

    Each rank advances only its own streams. For other streams it holds the cursors of the last checkpoint. So the furthest cursor
    of each stream is the current one.
    """
    first = states[0]
    assert all(state.next_sequence == first.next_sequence for state in states), (
        "ranks have consumed different numbers of sequences"
    )
    merged = DataState(first.num_streams, first.seed, first.next_sequence)
    merged.num_units, merged.contents, merged.former_names = first.num_units, first.contents, first.former_names
    for state in states:
        for source, cursors in state.cursors.items():
            known = merged.cursors.setdefault(source, {})
            for stream, cursor in cursors.items():
                known[stream] = max(cursor, known.get(stream, cursor))
    return merged
