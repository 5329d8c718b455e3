"""Print what runs cost and where they ended, from their metrics.jsonl.

    python -m benchmarks.summarize exp/one exp/two

Speed is the median over log lines, with the 10th to 90th percentile in brackets; the first quarter of the lines (compilation and
warm-up) is left out. Losses are those of the first and the last line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from flame.compare.tables import format_table
from flame.errors import UserError
from flame.logging.console import find_row_kind
from flame.logging.plots import read_metrics

SPEEDS = {
    "tokens_per_second": 1.0,
    "mfu": 100.0,
    "mfu_aux_forward": 100.0,
    "mfu_heads": 100.0,
    "peak_memory_gib": 1.0,
    "data_wait_fraction": 100.0,
}
LOSSES = ("ce_loss", "aux_loss", "infonce_accuracy")


def summarize(folder: Path) -> list[str]:
    """The cells of a table row."""
    rows = [row for row in read_metrics(folder) if find_row_kind(row) == "training"]
    steady = rows[len(rows) // 4 :]
    cells = [str(folder), str(rows[-1]["step"])]
    for name, scale in SPEEDS.items():
        values = sorted(value * scale for row in steady if (value := row.get(name)) is not None)
        if not values:
            cells.append("-")
            continue
        low, high = values[len(values) // 10], values[-1 - len(values) // 10]
        cells.append(f"{statistics.median(values):,.1f} [{low:,.1f}, {high:,.1f}]")
    cells += [f"{rows[0][name]:.3f} -> {rows[-1][name]:.3f}" if name in rows[-1] else "-" for name in LOSSES]
    return cells


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (its job.dump_folder)")
    header = [
        "run",
        "steps",
        "tokens/s",
        "MFU %",
        "of which future %",
        "InfoNCE %",
        "peak GiB",
        "data wait %",
        "ce",
        "aux",
        "top-1",
    ]
    print("\n".join(format_table(header, [summarize(folder) for folder in parser.parse_args(argv).runs])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.EXIT_CODE)
