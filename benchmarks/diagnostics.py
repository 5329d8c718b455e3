"""What `metrics.diagnostics_interval` costs: steps at the shape of Llama-3.2-1B, with the instruments and without, in turns.

    python -m benchmarks.diagnostics OUT [--tokens 65536] [--rounds 8]

Medians with lowest and highest. The cost at the default interval is what a measured step takes more, over as many plain steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch

import flame.train
from benchmarks.packs import write_corpus
from benchmarks.timing import Report, measure_side_by_side
from flame.config.schema import Metrics
from flame.runtime.distributed import end_processes, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options

REPO = Path(__file__).parent.parent
WARMUP = 3


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="What the diagnostics cost.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for diagnostics.md")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens a step")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each kind")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = arguments.out / "corpus.jsonl"
    write_corpus(corpus, 2_000_000)
    set_single_process_defaults()
    config = read_options(
        [
            *(
                "--job.dump_folder",
                str(arguments.out / "run"),
                "--model.config",
                str(REPO / "configs" / "models" / "llama_1B.json"),
            ),
            *("--model.tokenizer_path", "bytes", "--training.dataset", "json", "--training.data_files", str(corpus)),
            *("--training.seq_len", str(arguments.tokens), "--training.context_len", "4096", "--training.compile", "true"),
            *("--training.steps", "100000", "--training.num_streams", "8", "--objective.name", "future"),
            *("--checkpoint.enable_checkpoint", "false", "--metrics.log_freq", "1000000"),
        ],
        1,
    )
    trainer = Trainer(config)
    trainer._resume()
    trainer._open_run()

    def make_step(*, measured: bool) -> None:
        with patch.object(flame.train, "is_probe_step", lambda *_: measured):
            trainer.train_step()

    kinds = {"plain": lambda: make_step(measured=False), "measured": lambda: make_step(measured=True)}
    timings = measure_side_by_side(kinds, arguments.rounds, WARMUP)
    trainer._close_run()
    end_processes()
    plain, measured = timings["plain"], timings["measured"]
    if plain is None or measured is None:
        raise SystemExit("out of memory: fewer --tokens")
    interval = Metrics().diagnostics_interval
    cost = 100 * (measured.median_ms - plain.median_ms) / (interval * plain.median_ms)
    rows = [[name, timing.show(), f"{timing.peak_gib:.1f}"] for name, timing in (("plain", plain), ("measured", measured))]
    report = Report(arguments.out / "diagnostics.md")
    report.table(f"{arguments.tokens:,} tokens on {torch.cuda.get_device_name()}", ["step", "ms", "peak memory, GiB"], rows)
    report.write(f"\nat one measured step in {interval}: {cost:.2f} % of the step time")


if __name__ == "__main__":
    main(sys.argv[1:])
