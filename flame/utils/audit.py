"""Check what a run with `training.audit = true` was trained on: each token of each document once an epoch, and none twice.

    python -m flame.utils.audit exp/run

Ends with 0 if that is so, with 1 if it is not or cannot be known, as steps were made without the audit, and with 2 without one.
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

from flame.checkpoints.checkpoint_files import list_run_checkpoints, read_state
from flame.data.audit import read_audit
from flame.errors import UserError

Ranges = list[tuple[int, int]]


@dataclass
class Account:
    """One source in one epoch."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    """Tokens trained on, each time counted."""
    repeated: int = 0
    """Of them, those trained on before in this epoch."""
    missing: int = 0
    """Tokens before the last one seen of their document that were neither trained on nor skipped."""
    unfinished: int = 0
    """Documents whose end has not been seen. There are none once the epoch is over."""
    left_out: int = 0
    """Tokens of skipped steps."""
    unseen: int | None = None
    """Documents of which nothing was seen: bad rows, or lost. None while the epoch lasts, and for streamed sources."""

    @property
    def is_faulty(self) -> bool:
        """Whether a token was repeated or lost."""
        return bool(self.repeated or self.missing or (self.unseen is not None and self.unfinished))


def take_account(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, int], Account]:
    """Sum the lines of an audit up, by source and epoch."""
    trained: dict[tuple[str, int], dict[int | str, Ranges]] = defaultdict(lambda: defaultdict(list))
    skipped: dict[tuple[str, int], dict[int | str, Ranges]] = defaultdict(lambda: defaultdict(list))
    finished: dict[tuple[str, int], set[int | str]] = defaultdict(set)
    accounts: dict[tuple[str, int], Account] = defaultdict(Account)
    for line in lines:
        for key in {(line["source"], epoch) for _, _, _, epoch, _ in line["pieces"]}:
            accounts[key].sequences += 1
        for document, start, end, epoch, is_last in line["pieces"]:
            (trained if line["trained"] else skipped)[line["source"], epoch][document].append((start, end))
            if is_last:
                finished[line["source"], epoch].add(document)
    for key, account in accounts.items():
        account.left_out = sum(end - start for ranges in skipped[key].values() for start, end in ranges)
        account.documents = len(trained[key].keys() | skipped[key].keys())
        account.unfinished = account.documents - len(finished[key])
        for document in trained[key].keys() | skipped[key].keys():
            tokens, repeated, missing = _walk(trained[key].get(document, []), skipped[key].get(document, []))
            account.tokens += tokens
            account.repeated += repeated
            account.missing += missing
    return dict(sorted(accounts.items()))


def _walk(trained: Ranges, skipped: Ranges) -> tuple[int, int, int]:
    """Tokens, repeated tokens, and tokens in gaps of one document."""
    reached = tokens = repeated = missing = 0
    for start, end, counts in sorted([(*r, True) for r in trained] + [(*r, False) for r in skipped]):
        missing += max(0, start - reached)
        if counts:
            tokens += end - start
            repeated += max(0, min(reached, end) - start)
        reached = max(reached, end)
    return tokens, repeated, missing


def count_unseen(accounts: dict[tuple[str, int], Account], data_state: dict[str, Any]) -> None:
    """Fill in `Account.unseen` for the epochs that all streams are through with, from the data position in a checkpoint."""
    for source, saved in data_state["sources"].items():
        begun = [cursor[0] for cursor in saved["cursors"].values()]
        is_all = len(begun) == data_state["num_streams"]
        for (name, epoch), account in accounts.items():
            if name == source and is_all and epoch < min(begun) and saved["num_units"] is not None:
                is_streamed = any(row for _, _, row, _ in saved["cursors"].values())
                account.unseen = None if is_streamed else saved["num_units"] - account.documents


def note_steps(lines: Iterable[dict[str, Any]], steps: set[int]) -> Iterator[dict[str, Any]]:
    """Pass the lines of an audit on, and add their steps to a set."""
    for line in lines:
        steps.add(line["step"])
        yield line


def list_gaps(steps: set[int], last: int) -> list[str]:
    """Steps from 1 to the last that are not in a set, as ranges such as "3-4" and "7"."""
    edges = [0, *sorted(steps), last + 1]
    gaps = [(before + 1, after - 1) for before, after in pairwise(edges) if after - before > 1]
    return [str(first) if first == end else f"{first}-{end}" for first, end in gaps]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check what a run was trained on.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the run's folder (job.dump_folder)")
    folder = parser.parse_args(argv).folder
    steps: set[int] = set()
    try:
        accounts = take_account(note_steps(read_audit(folder), steps))
        if not accounts:
            raise UserError(f'"{folder}" holds no audit: give the folder of a run with training.audit = true')
    except UserError as error:
        print(error, file=sys.stderr)
        return error.EXIT_CODE
    bad_rows = None
    last = max(steps)
    for checkpoint in list_run_checkpoints(folder)[-1:]:
        state = read_state(checkpoint)
        count_unseen(accounts, state["data"])
        bad_rows = state["counters"]["bad_rows"]
        last = max(last, state["step"])
    _print_table(accounts)
    unseen_in_all = sum(account.unseen or 0 for account in accounts.values())
    if bad_rows is not None:
        print(f"{unseen_in_all} documents not seen in finished epochs; {bad_rows} bad rows passed over in all")
    gaps = list_gaps(steps, last)
    if gaps:
        print(f"steps not audited: {', '.join(gaps)} (made without training.audit = true, or what it wrote of them is lost)")
    is_lost = bad_rows is not None and unseen_in_all > bad_rows
    return int(is_lost or bool(gaps) or any(account.is_faulty for account in accounts.values()))


def _print_table(accounts: dict[tuple[str, int], Account]) -> None:
    print("| source | epoch | documents | tokens | repeated | missing | left out | unfinished | documents not seen |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (source, epoch), a in accounts.items():
        unseen = "-" if a.unseen is None else a.unseen
        cells = (source, epoch, a.documents, a.tokens, a.repeated, a.missing, a.left_out, a.unfinished, unseen)
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
