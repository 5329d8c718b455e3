"""Next-token steps in bfloat16 and in 8 bits on one GPU, beside those of other trainers. Prints tables.

    python -m benchmarks.other_trainers OUT [--titan-site DIR] [--tokens 16384]
    python -m benchmarks.other_trainers OUT --shape 8B --layers 8

Forward and backward, without optimizer, at the shape of Llama-3.2-1B or 3.1-8B: in bfloat16 and with torchao's rowwise scales,
ours also with an 8-bit output head. The peers take part at 1B alone: torchtitan 0.3.0 and transformers' Trainer, as they run on
one GPU (`benchmarks.peer_models`), and with DIR, a folder that `pip install --no-deps --target DIR torchtitan==0.2.2` filled,
torchtitan 0.2.2. In 8 bits torchtitan's converter leaves the output head in bfloat16, as ours does; torchao must be installed.
With --layers the model has as many of its layers, so that wide ones fit one GPU. Two take turns at a time, step by step, and
sit on the GPU together: ours in bfloat16, and one other. What fails is left out, and the table says why.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._inductor.config
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.packs import draw_batch
from benchmarks.pool import REPO
from benchmarks.settings import SETTINGS
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.timing import CannotRun, Report, Sample, Timing, measure_in_turns, note
from benchmarks.training_step import Guard, Rebuilt, TrainingStep, free_memory, read_step_options
from flame.attention import flash as flash_kernels
from flame.config.schema import Training
from flame.data.batch import PackedBatch
from flame.models.causal_lm import load_model_config
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

BFLOAT16 = "ours, bfloat16"
OURS = {
    f"ours, float8 {recipe}{head}": SETTINGS[f"next token, float8 {recipe}{head}"]
    for recipe in ("rowwise", "rowwise_with_gw_hp")
    for head in ("", ", 8-bit head")
}
"""Steps in 8 bits, and the options of such a run."""
PEERS = {
    "torchtitan 0.3.0": ["titan"],
    "torchtitan 0.3.0, varlen": ["titan", "--attention", "varlen"],
    "transformers' Trainer": ["transformers_trainer"],
    "transformers' Trainer, compiled": ["transformers_trainer", "--compile"],
    "torchtitan 0.3.0, float8 rowwise": ["titan", "--float8", "rowwise"],
    "torchtitan 0.3.0, float8 rowwise_with_gw_hp": ["titan", "--float8", "rowwise_with_gw_hp"],
}
"""Words for `benchmarks.peer_worker`."""
OLDER_PEERS = {
    "torchtitan 0.2.2": ["titan_0_2"],
    "torchtitan 0.2.2, bfloat16 weights": ["titan_0_2", "--weights", "bfloat16"],
    "torchtitan 0.2.2, float8 rowwise": ["titan_0_2", "--float8", "rowwise"],
    "torchtitan 0.2.2, float8 rowwise_with_gw_hp": ["titan_0_2", "--float8", "rowwise_with_gw_hp"],
}
"""Likewise, of those that need --titan-site."""
REPEATS, WARMUP = 5, 2


class Peer:
    """Another trainer's step in its own process (`benchmarks.peer_worker`). It is built by the first sample.

    Args:
        words: of the worker: what it runs, and options.
        site: folder that comes first on its import path.
    """

    def __init__(self, words: Sequence[str], model: Path, batch: PackedBatch, folder: Path, site: Path | None = None):
        name = "-".join(words)
        pack, self._log = folder / f"{name}.pt", folder / f"{name}.log"
        torch.save({"input_ids": batch.input_ids, "labels": batch.labels, "cu_seqlens": batch.cu_seqlens}, pack)
        paths = [*([str(site.resolve())] if site else []), str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        kind, *options = words
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peer_worker", kind, str(model), str(pack), *options],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPO,
            )

    def sample(self) -> Sample:
        """One step.

        Raises:
            torch.OutOfMemoryError: the peer's.
            CannotRun: it has ended by itself.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write("run 1\n")
            self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            note("the peer has ended, and is left out; its last words:\n" + self._log.read_text()[-3000:])
            raise CannotRun
        steps = json.loads(reply)
        if steps is None:
            raise torch.OutOfMemoryError("in the peer")
        return Sample(*steps[0])

    def close(self) -> None:
        """End it, and wait until the GPU is free of it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pair(NamedTuple):
    """Two steps that took turns, and why one has no time."""

    bfloat16: Timing | None
    other: Timing | None
    fault: str = ""


def build_step(model: Path, tokens: int, options: Sequence[str], mesh: DeviceMesh, compiled: bool = True) -> TrainingStep:
    """Model and optimizer of a run with these options beside those of all. It has no batch yet."""
    # The rowwise recipe changes how all later compilations round.
    torch._inductor.config.emulate_precision_casts = False
    config = read_step_options(model, tokens, options, compiled=compiled)
    return TrainingStep(load_model_config(str(model)), config, mesh)


def get_bare_step(step: TrainingStep) -> Callable[[], None]:
    """Forward and backward alone."""
    return partial(step.step, with_optimizer=False)


class Measurement:
    """Our step in bfloat16 on a packed sequence, beside which each other one takes turns."""

    def __init__(self, tokens: int, mesh: DeviceMesh, model: Path, compiled: bool = True):
        self._tokens, self._mesh, self._model, self._compiled = tokens, mesh, model, compiled
        self.batch = draw_batch(tokens, load_model_config(str(model)).vocab_size)
        self._own = self._prepare(SETTINGS["next token"])

    def _prepare(self, options: Sequence[str]) -> Rebuilt:
        source = Rebuilt(partial(build_step, self._model, self._tokens, options, self._mesh, self._compiled))
        source.take(self.batch)
        return source

    def measure_own(self, name: str, options: Sequence[str]) -> Pair:
        """Beside another run of ours."""
        guard, source = Guard(), self._prepare(options)
        pair = self._take_turns(guard, name, guard.watch(name, source, get_bare_step))
        source.drop()
        return pair

    def measure_peer(self, name: str, peer: Peer) -> Pair:
        """Beside another trainer."""
        try:
            return self._take_turns(Guard(), name, peer.sample)
        finally:
            peer.close()

    def _take_turns(self, guard: Guard, name: str, take: Callable[[], Sample]) -> Pair:
        note(name)
        timings = measure_in_turns({BFLOAT16: guard.watch(BFLOAT16, self._own, get_bare_step), name: take}, REPEATS, WARMUP)
        faults = dict.fromkeys(guard.not_finite, "a loss that is not finite") | guard.faults
        for each, fault in faults.items():
            note(f"{each}: {fault}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        other = timings[name] if name not in faults else None
        note("; ".join(f"{each}: {timing.show()} ms" for each, timing in timings.items() if timing is not None))
        return Pair(timings[BFLOAT16], other, "" if other is not None else faults.get(name, "failed"))


def show(report: Report, tokens: int, pairs: Mapping[str, Pair]) -> None:
    """A table. A ratio is of tokens/s, of two that took turns."""
    rows = []
    for name, pair in pairs.items():
        own = pair.bfloat16.show() if pair.bfloat16 is not None else "failed"
        if pair.other is None:
            rows.append([name, pair.fault, "-", own, "-"])
        else:
            ratio = f"{pair.bfloat16.median_ms / pair.other.median_ms:.3f}" if pair.bfloat16 is not None else "-"
            rows.append([name, pair.other.show(), f"{tokens * 1000 / pair.other.median_ms:,.0f}", own, ratio])
    header = ["step", "ms [low, high]", "tokens/s", f"{BFLOAT16}, ms, in turns", f"tokens/s / {BFLOAT16}"]
    report.table(f"{tokens:,} tokens, next token, no optimizer", header, rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Next-token steps beside those of other trainers.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for other_trainers.md")
    parser.add_argument("--titan-site", type=Path, help="folder that holds torchtitan 0.2.2; without it that one is left out")
    parser.add_argument("--shape", choices=SHAPES, default="1B", help="of the model (%(default)s)")
    parser.add_argument("--layers", type=int, help="how many the model has (default: those of the shape)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384], help="tokens in a step")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[*OURS, *PEERS, *OLDER_PEERS], help="names of steps")
    arguments = parser.parse_args(argv)
    site: Path | None = arguments.titan_site
    if site is not None and not (site / "torchtitan").is_dir():
        parser.error(f"--titan-site = {site} holds no torchtitan")
    peers: dict[str, tuple[list[str], Path | None]] = {}
    if (arguments.shape, arguments.layers) == ("1B", None):
        peers = {name: (words, None) for name, words in PEERS.items()}
        peers |= {name: (words, site) for name, words in OLDER_PEERS.items() if site is not None}
    wanted = arguments.only or [*OURS, *peers]
    if lacking := sorted({*wanted} - {*OURS, *peers}):
        parser.error(f"not with these options: {', '.join(lacking)}")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    torch._dynamo.config.recompile_limit = 64  # several models run the same layers' code here
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    report = Report(arguments.out / "other_trainers.md")
    model = write_shape(arguments.shape, arguments.out, arguments.layers)
    attention = flash_kernels.describe(load_model_config(str(model)).head_dim)
    report.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Llama {model.stem}, {attention}")
    for tokens in arguments.tokens:
        measurement, pairs = Measurement(tokens, mesh, model), dict[str, Pair]()
        with tempfile.TemporaryDirectory() as folder:
            # All import at once. Each waits for its turn, and only then builds its model.
            chosen = {name: each for name, each in peers.items() if name in wanted}
            waiting = {name: Peer(words, model, measurement.batch, Path(folder), home) for name, (words, home) in chosen.items()}
            for name, options in OURS.items():
                if name in wanted:
                    pairs[name] = measurement.measure_own(name, options)
            for name, peer in waiting.items():
                pairs[name] = measurement.measure_peer(name, peer)
        show(report, tokens, pairs)
        del measurement
        free_memory()
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
