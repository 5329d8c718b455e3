"""Tokens a second that one process reads, tokenizes and packs, and the tokenizer's share.

    python -m benchmarks.packing [--training.dataset ... --model.tokenizer_path ...]

Options are those of a run; the default is the Python standard library as bytes. Medians over five passes, with the range.
"""

from __future__ import annotations

import statistics
import sys
import time

from flame.config_reader import read_config
from flame.data import loader as loader_module
from flame.data.loader import PackedLoader
from flame.data.sources import open_source
from flame.data.state import DataState
from flame.data.tokenizer import load_tokenizer

SEQUENCES = 300
DEFAULTS = ["--model.config", "configs/models/llama_quickstart.json", "--model.tokenizer_path", "bytes"]


def main(argv: list[str]) -> None:
    config = read_config([*(argv or DEFAULTS), "--training.num_workers", "0"], world_size=1)
    training = config.training
    tokenizer, source = load_tokenizer(config.model.tokenizer_path), open_source(training)
    spent = 0.0
    encode = loader_module.encode_document

    def timed_encode(*args):
        nonlocal spent
        start = time.perf_counter()
        try:
            return encode(*args)
        finally:
            spent += time.perf_counter() - start

    loader_module.encode_document = timed_encode
    rates, shares = [], []
    for _ in range(5):
        spent = 0.0
        batches = iter(PackedLoader(training, source, tokenizer, 0, 1, DataState(training.num_streams, training.seed)))
        start = time.perf_counter()
        for _ in range(SEQUENCES):
            next(batches)
        elapsed = time.perf_counter() - start
        rates.append(SEQUENCES * training.seq_len / elapsed)
        shares.append(100 * spent / elapsed)
    for name, values, unit in (("packing", [r / 1e6 for r in rates], "M tokens/s"), ("tokenizer", shares, "% of the time")):
        print(f"{name}: {statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}] {unit}")


if __name__ == "__main__":
    main(sys.argv[1:])
