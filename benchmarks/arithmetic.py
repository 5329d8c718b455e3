"""Arithmetic of a step with the future loss, in next-token steps, by setting. Needs no GPU: nothing is run.

    python -m benchmarks.arithmetic [--model configs/models/llama_1B.json] [--tokens 16384 65536] [--settings NAME ...]

The FLOPs are those of `step_tflops`: documents of mean length 1,024, matrix products and attention forward and backward, without
the optimizer. 8-bit settings, which need a GPU to be built, have the arithmetic of those in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.packs import LONGEST, draw_batch
from benchmarks.settings import SETTINGS
from flame.compare.tables import format_table
from flame.models.causal_lm import load_model_config
from flame.models.flops import ModelFlops
from flame.objectives.step import get_objective
from flame.trainer.options import read_options
from flame.trainer.setup import build_cadence, build_modules

REPO = Path(__file__).parent.parent
COUNTED = [name for name in SETTINGS if not any(word in name for word in ("fp8", "float8", "8-bit"))]


def count_ratio(model_path: str, tokens: int, options: list[str]) -> float:
    """FLOPs of a mean step on one packed sequence, relative to next-token training."""
    common = ["--model.config", model_path, "--model.tokenizer_path", "bytes", "--training.seq_len", str(tokens)]
    common += ["--training.context_len", str(min(tokens, LONGEST)), "--training.dataset", "stdlib"]
    config = read_options([*common, *options], 1)
    model = build_modules(config, load_model_config(model_path), "cpu")
    flops, objective = ModelFlops(model.lm), get_objective(model)
    batch = draw_batch(tokens, model.lm.config.vocab_size)
    plain = flops.count_next_token(batch, is_frozen=False)
    aux = sum(objective.count_flops(batch, flops)) if objective is not None else 0.0
    return 1 + build_cadence(config).share * aux / plain


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Arithmetic of a step with the future loss.", allow_abbrev=False)
    parser.add_argument("--model", default=str(REPO / "configs" / "models" / "llama_1B.json"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768, 65_536], help="of a packed sequence")
    parser.add_argument("--settings", nargs="+", choices=COUNTED, default=COUNTED)
    arguments = parser.parse_args(argv)
    rows = [
        [name, *(f"{count_ratio(arguments.model, tokens, SETTINGS[name]):.3f}" for tokens in arguments.tokens)]
        for name in arguments.settings
    ]
    print("\n".join(format_table(["", *(f"{tokens:,} tokens" for tokens in arguments.tokens)], rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
