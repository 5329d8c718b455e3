"""Check what a run with `training.audit = true` was trained on: each token of each document once an epoch, and none twice.

python -m flame.utils.audit exp/run
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.components.checkpoint import TRAINER_FILE, list_checkpoints
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
    """Tokens before the last one seen of their document that were not trained on."""
    left_out: int = 0
    """Tokens of skipped steps."""
    unseen: int | None = None
    """Documents that were due but not seen: bad rows and held-out ones. None while the epoch lasts."""


def take_account(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, int], Account]:
    """Sum the lines of an audit up, by source and epoch."""
    trained: dict[tuple[str, int], dict[int | str, Ranges]] = defaultdict(lambda: defaultdict(list))
    skipped: dict[tuple[str, int], dict[int | str, Ranges]] = defaultdict(lambda: defaultdict(list))
    accounts: dict[tuple[str, int], Account] = defaultdict(Account)
    for line in lines:
        for key in {(line["source"], epoch) for *_, epoch in line["pieces"]}:
            accounts[key].sequences += 1
        for document, start, end, epoch in line["pieces"]:
            (trained if line["trained"] else skipped)[line["source"], epoch][document].append((start, end))
    for key, account in accounts.items():
        account.left_out = sum(end - start for ranges in skipped[key].values() for start, end in ranges)
        account.documents = len(trained[key])
        for document, ranges in trained[key].items():
            tokens, repeated, missing = _walk(ranges, skipped[key].get(document, []))
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
                account.unseen = saved["num_units"] - account.documents


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check what a run was trained on.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the run's folder (job.dump_folder)")
    folder = parser.parse_args(argv).folder
    try:
        accounts = take_account(read_audit(folder))
        if not accounts:
            raise UserError(f'"{folder}" holds no audit: give the folder of a run with training.audit = true')
    except UserError as error:
        print(error, file=sys.stderr)
        return error.EXIT_CODE
    for checkpoint in list_checkpoints(folder / "checkpoint")[-1:]:
        count_unseen(accounts, json.loads((checkpoint / TRAINER_FILE).read_text())["data"])
    print("| source | epoch | documents | tokens | repeated | missing | left out | documents not seen |")
    print("|---|---|---|---|---|---|---|---|")
    for (source, epoch), a in accounts.items():
        unseen = "(epoch not over)" if a.unseen is None else a.unseen
        print(f"| {source} | {epoch} | {a.documents} | {a.tokens} | {a.repeated} | {a.missing} | {a.left_out} | {unseen} |")
    return int(any(account.repeated or account.missing for account in accounts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
