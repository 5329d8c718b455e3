"""Worker of `benchmarks.other_trainers`: next-token steps of another trainer, in a process of its own.

    python -m benchmarks.peer_worker titan MODEL.json PACK.pt [--attention varlen] [--float8 rowwise]

The first word names a module of `benchmarks.peer_models`, which is imported at once. PACK.pt holds input_ids and labels, int64
[1, T], and cu_seqlens, int32 [S+1]. For each line "run N" on standard input it makes N steps, forward and backward without
optimizer, and answers with one line of JSON: N lists of milliseconds, peak bytes and bytes before, or null if memory ran out.
The first line builds the model, so a worker that waits does not use the GPU. It ends when standard input does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.timing import Sample, sample

KINDS = {
    "titan": ("torchtitan", "0.3.0"),
    "titan_0_2": ("torchtitan", "0.2.2"),
    "transformers_trainer": ("transformers", version("transformers")),
}
"""Packages whose step it is, and the version that each was written for."""


def build(peer: ModuleType, options: argparse.Namespace) -> Callable[[], None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pack = {name: tensor.to(device) for name, tensor in torch.load(options.pack).items()}
    step = peer.build_step(json.loads(options.model.read_text()), pack, options)
    gc.collect()
    gc.disable()
    return step


def answer(step: Callable[[], None], count: int) -> list[Sample] | None:
    gc.collect(1)
    try:
        return [sample(step) for _ in range(count)]
    except torch.OutOfMemoryError:
        return None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--attention", choices=("flex", "varlen"), default="flex", help="of torchtitan 0.3.0")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of torchtitan 0.2.2")
    parser.add_argument("--float8", default="", help="recipe of torchao for all linear layers but the output head")
    parser.add_argument("--compile", action="store_true", help="the model of transformers")
    options = parser.parse_args(argv)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print must not mix with the replies
    package, expected = KINDS[options.kind]
    found = version(package)
    if found != expected:
        sys.exit(f"{package} {found} is first on the import path: PYTHONPATH must begin with a folder that holds {expected}")
    try:
        peer = importlib.import_module(f"benchmarks.peer_models.{options.kind}")
    except ImportError as error:
        sys.exit(f"{package} {found} does not run with torch {torch.__version__}: {error}")
    step = None
    for line in sys.stdin:
        verb, count = line.split()
        assert verb == "run"
        if step is None:
            step = build(peer, options)
        print(json.dumps(answer(step, int(count))), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
