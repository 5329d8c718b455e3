"""Check that a run with `training.audit = true` was trained on each token of each document exactly once per epoch.

    python -m flame.cli.audit exp/run

The exit code is 0 if so, 1 if not or if some steps were not audited, and 2 if there is no audit.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flame.config.run import CHECKPOINT_FOLDER
from flame.data.audit import read_audit
from flame.errors import UserError, end_on_user_error

Ranges = list[tuple[int, int]]


@dataclass
class TokenCount:
    """Counts of one source in one epoch."""

    documents: int = 0
    tokens: int = 0
    """Tokens trained on, including repeated ones."""
    repeated: int = 0
    """Tokens trained on again in the same epoch."""
    missing: int = 0
    """Tokens in gaps: neither trained on nor skipped, but before the last seen token of their document."""
    unfinished: int = 0
    """Documents whose end was not seen. Should be 0 after the epoch."""
    left_out: int = 0
    """Tokens of skipped steps."""
    unseen: int | None = None
    """Documents without any seen token: bad rows, or lost ones. None during the epoch, and for streamed sources."""

    @property
    def is_faulty(self) -> bool:
        """Whether a token was repeated or lost."""
        return bool(self.repeated or self.missing or (self.unseen is not None and self.unfinished))


def count_tokens(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, int], TokenCount]:
    """Sum up the lines of an audit by source and epoch."""
    trained: dict[tuple[str, int], dict[int | str, Ranges]] = defaultdict(lambda: defaultdict(list))
    skipped: dict[tuple[str, int], dict[int | str, Ranges]] = defaultdict(lambda: defaultdict(list))
    finished: dict[tuple[str, int], set[int | str]] = defaultdict(set)
    token_counts: dict[tuple[str, int], TokenCount] = {}
    for line in lines:
        for document, start, end, epoch, is_last in line["pieces"]:
            key = line["source"], epoch
            token_counts.setdefault(key, TokenCount())
            (trained if line["trained"] else skipped)[key][document].append((start, end))
            if is_last:
                finished[key].add(document)
    for key, token_count in token_counts.items():
        token_count.left_out = sum(end - start for ranges in skipped[key].values() for start, end in ranges)
        token_count.documents = len(trained[key].keys() | skipped[key].keys())
        token_count.unfinished = token_count.documents - len(finished[key])
        for document in trained[key].keys() | skipped[key].keys():
            tokens, repeated, missing = _walk(trained[key].get(document, []), skipped[key].get(document, []))
            token_count.tokens += tokens
            token_count.repeated += repeated
            token_count.missing += missing
    return dict(sorted(token_counts.items()))


def _walk(trained: Ranges, skipped: Ranges) -> tuple[int, int, int]:
    """Trained tokens, repeated tokens, and tokens in gaps of one document."""
    reached = tokens = repeated = missing = 0
    for start, end, counts in sorted([(*r, True) for r in trained] + [(*r, False) for r in skipped]):
        missing += max(0, start - reached)
        if counts:
            tokens += end - start
            repeated += max(0, min(reached, end) - start)
        reached = max(reached, end)
    return tokens, repeated, missing


def count_unseen(token_counts: dict[tuple[str, int], TokenCount], data_state: dict[str, Any]) -> None:
    """Fill in `TokenCount.unseen` for epochs that all streams have finished, from the data position in a checkpoint."""
    for source, saved in data_state["sources"].items():
        begun = [cursor[0] for cursor in saved["cursors"].values()]
        is_all = len(begun) == data_state["num_streams"]
        for (name, epoch), token_count in token_counts.items():
            if name == source and is_all and epoch < min(begun) and saved["num_units"] is not None:
                is_streamed = any(row for _, _, row, _ in saved["cursors"].values())
                token_count.unseen = None if is_streamed else saved["num_units"] - token_count.documents


def rename_sources(lines: Iterable[dict[str, Any]], data_state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the lines of an audit with the present names of sources that a resume has renamed."""
    sources = data_state["sources"].items()
    former = [(old, last, name) for name, saved in sources for old, last in saved.get("former_names", [])]
    former.sort(key=lambda each: each[1])
    for line in lines:
        present = next((name for old, last, name in former if line["source"] == old and line["step"] <= last), line["source"])
        yield line | {"source": present}


def note_steps(lines: Iterable[dict[str, Any]], steps: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the lines of an audit, and add their steps to a set."""
    for line in lines:
        steps.add(line["step"])
        yield line


def list_gaps(steps: set[int], last: int) -> list[str]:
    """Steps from 1 to `last` that are not in `steps`, as ranges such as "3-4" and "7"."""
    edges = [0, *sorted(steps), last + 1]
    gaps = [(before + 1, after - 1) for before, after in pairwise(edges) if after - before > 1]
    return [str(first) if first == end else f"{first}-{end}" for first, end in gaps]


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flame-audit",
        description="Check that a run was trained on each token exactly once per epoch.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder of a run with training.audit = true (job.dump_folder)")
    folder = parser.parse_args(argv).folder
    steps: set[int] = set()
    state = _read_newest_state(folder)
    lines = note_steps(read_audit(folder), steps)
    token_counts = count_tokens(rename_sources(lines, state["data"]) if state else lines)
    if not token_counts:
        raise UserError(f'"{folder}" holds no audit: give the folder of a run with training.audit = true')

    bad_rows = None
    last = max(steps)
    if state:
        count_unseen(token_counts, state["data"])
        bad_rows = state["counters"]["bad_rows"]
        last = max(last, state["step"])
    _print_table(token_counts)
    unseen_in_all = sum(token_count.unseen or 0 for token_count in token_counts.values())
    if bad_rows is not None:
        print(f"{unseen_in_all} documents not seen in finished epochs; {bad_rows} bad rows passed over in all")
    gaps = list_gaps(steps, last)
    if gaps:
        print(f"steps not audited: {', '.join(gaps)} (they ran without training.audit = true, or their lines are lost)")
    is_lost = bad_rows is not None and unseen_in_all > bad_rows
    return int(is_lost or bool(gaps) or any(token_count.is_faulty for token_count in token_counts.values()))


def _read_newest_state(folder: Path) -> dict[str, Any] | None:
    from flame.checkpoints.files import list_checkpoints  # torch takes seconds to load
    from flame.checkpoints.manifest import read_state

    for checkpoint in list_checkpoints(folder / CHECKPOINT_FOLDER)[-1:]:
        try:
            return read_state(checkpoint)
        except (OSError, ValueError) as error:
            raise UserError(
                f'checkpoint "{checkpoint}" is damaged: {error}; move it away, and the one before it is read'
            ) from error
    return None


def _print_table(token_counts: dict[tuple[str, int], TokenCount]) -> None:
    print("| source | epoch | documents | tokens | repeated | missing | left out | unfinished | documents not seen |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (source, epoch), a in token_counts.items():
        unseen = "-" if a.unseen is None else a.unseen
        cells = (source, epoch, a.documents, a.tokens, a.repeated, a.missing, a.left_out, a.unfinished, unseen)
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
