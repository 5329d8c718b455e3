"""Documents as rows against one mask across the pack, on CPUs: is the estimate that chooses between them right?

    OMP_NUM_THREADS=1 python -m benchmarks.rows OUT

Both passes and the backward of a Llama of two layers, in turns, medians of five with the range. The rule,
`flame.attention.document_rows.is_cheaper_in_rows`, estimates arithmetic from the width; the table shows the estimate, and what
is.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.packs import pack_documents
from flame.attention import backends as future_encoder
from flame.attention.backends import build_backend
from flame.attention.document_rows import DocumentRows, estimate_work
from flame.compare.tables import format_table, show_range
from flame.data.batch import PackedBatch

ROUNDS = 5
VOCAB_SIZE = 256
WIDTHS = (96, 192, 384)
LAYOUTS = {
    "graphs of 19, 25 and 44 tokens": (4096, lambda: random.choice([19, 25, 44])),
    "text, up to 512, mean 300": (4096, lambda: min(512, 1 + int(random.expovariate(1 / 300)))),
    "text, up to 1,024, mean 300": (4096, lambda: min(1024, 1 + int(random.expovariate(1 / 300)))),
    "text, up to 1,024, mean 200": (4096, lambda: min(1024, 1 + int(random.expovariate(1 / 200)))),
    "graphs of 40 tokens, one in fifty of 256": (2048, lambda: 256 if random.random() < 0.02 else 40),
}
"""Tokens of a pack, and what draws the length of its next document."""


def draw_pack(total: int, draw_length: Callable[[], int]) -> PackedBatch:
    random.seed(0)
    torch.manual_seed(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, draw_length()))
    return pack_documents([torch.randint(0, VOCAB_SIZE, (length,)) for length in lengths])


def time_both(width: int, batch: PackedBatch) -> dict[bool, list[float]]:
    """Seconds of each round, in rows (true) and under one mask."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=width // 32,
        num_hidden_layers=2,
        vocab_size=VOCAB_SIZE,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # it takes any attribute
    )
    model = AutoModelForCausalLM.from_config(config)
    passes = build_backend("sdpa", config, max_length=batch.input_ids.shape[1])
    seconds: dict[bool, list[float]] = {True: [], False: []}  # in rows or not
    for _, in_rows in product(range(1 + ROUNDS), seconds):
        with patch.object(future_encoder, "is_cheaper_in_rows", return_value=in_rows):
            started = time.perf_counter()
            passes.encode_past(model, batch).square().mean().backward()
            with torch.no_grad():
                passes.encode_future(model, batch, 0)
            seconds[in_rows].append(time.perf_counter() - started)
    return {in_rows: times[1:] for in_rows, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write rows.md to")
    out = parser.parse_args().out
    columns = [
        "documents",
        "width",
        "places / tokens",
        "rows, s",
        "one mask, s",
        "rows / one mask",
        "arithmetic, rows / one mask",
    ]
    lines = []
    for (name, (total, draw_length)), width in product(LAYOUTS.items(), WIDTHS):
        batch = draw_pack(total, draw_length)
        rows = DocumentRows(batch.cu_seqlens, total)
        rows_work, mask_work = estimate_work(rows, width)
        times = time_both(width, batch)
        ratios = [own / other for own, other in zip(times[True], times[False], strict=True)]
        shown = [show_range(values, "{:.2f}") for values in (times[True], times[False], ratios)]
        lines.append([name, str(width), f"{rows.num_places / total:.2f}", *shown, f"{rows_work / mask_work:.2f}"])
        print(*lines[-1], sep="  ", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.md").write_text("\n".join(format_table(columns, lines)) + "\n")


if __name__ == "__main__":
    main()
