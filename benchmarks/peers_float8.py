"""Next-token steps in 8 bits at the shape of Llama-3.2-1B on one GPU, beside torchtitan's own recipe. Prints a table.

    python -m benchmarks.peers_float8 OUT [--titan-site DIR] [--tokens 16384]

Forward and backward, without optimizer, in bfloat16 and with torchao's rowwise scales, ours also with an 8-bit output head. The
peer is that of `benchmarks.peers`: torchtitan 0.2.2, in bfloat16 and with its converter, which leaves the output head in bfloat16
as ours does. DIR is as there; torchao must be installed. All take turns, step by step, and sit on the GPU together. What fails is
left out, and the table says why.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.packs import draw_batch
from benchmarks.peers import MODEL, Peer, note
from benchmarks.settings import SETTINGS
from benchmarks.timing import CannotRun, Report, Sample, Timing, measure_in_turns
from benchmarks.training_step import Guard, Rebuilt, TrainingStep, free_memory, read_step_options
from flame.attention import flash as flash_kernels
from flame.config.schema import Training
from flame.models.causal_lm import load_model_config
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

RECIPES = ("rowwise", "rowwise_with_gw_hp")
BFLOAT16, PEER = "ours, bfloat16", "torchtitan 0.2.2, bfloat16"
OURS = {BFLOAT16: SETTINGS["next token"]} | {
    f"ours, float8 {recipe}{head}": SETTINGS[f"next token, float8 {recipe}{head}"]
    for recipe in RECIPES
    for head in ("", ", 8-bit head")
}
PEERS = {PEER: ""} | {f"torchtitan 0.2.2, float8 {recipe}": recipe for recipe in RECIPES}
PAIRS = [
    (BFLOAT16, PEER),
    *((own, peer) for own in OURS for peer, recipe in PEERS.items() if recipe and own.split(", ")[1] == f"float8 {recipe}"),
    *((own, BFLOAT16) for own in OURS if own != BFLOAT16),
    *((peer, PEER) for peer in PEERS if peer != PEER),
]
REPEATS, WARMUP = 5, 2


def build_step(model: Path, tokens: int, options: Sequence[str], mesh: DeviceMesh, compiled: bool = True) -> TrainingStep:
    """Model and optimizer of a run with these options beside those of all. It has no batch yet."""
    config = read_step_options(model, tokens, options, compiled=compiled)
    return TrainingStep(load_model_config(str(model)), config, mesh)


def get_bare_step(step: TrainingStep) -> Callable[[], None]:
    """Forward and backward alone."""
    return partial(step.step, with_optimizer=False)


def measure(
    tokens: int, site: Path | None, mesh: DeviceMesh, *, model: Path = MODEL, compiled: bool = True
) -> tuple[dict[str, Timing], dict[str, str]]:
    """All steps in turns: times, and why others have none."""
    batch = draw_batch(tokens, load_model_config(str(model)).vocab_size)
    guard, samplers = Guard(), dict[str, Callable[[], Sample]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, recipe in PEERS.items() if site is not None else ():
            assert site is not None
            peer = Peer(site, batch, Path(folder), recipe)
            stack.callback(peer.close)
            samplers[name] = peer.sample
        # The rowwise recipe changes how all later compilations round, so each model compiles before the next one is built.
        torch._inductor.config.emulate_precision_casts = False
        for name, options in OURS.items():
            note(f"first step of: {name}")
            source = Rebuilt(partial(build_step, model, tokens, options, mesh, compiled))
            source.take(batch)
            take = guard.watch(name, source, get_bare_step)
            try:
                take()
                samplers[name] = take
            except CannotRun:
                gc.collect()
                torch.cuda.empty_cache()
        timings = measure_in_turns(samplers, REPEATS, WARMUP)
    faults = {name: "failed" for name, timing in timings.items() if timing is None} | guard.faults
    faults |= dict.fromkeys(guard.not_finite - faults.keys(), "a loss that is not finite")
    return {name: timing for name, timing in timings.items() if timing is not None and name not in faults}, faults


def show(report: Report, tokens: int, timings: Mapping[str, Timing], faults: Mapping[str, str]) -> None:
    """Two tables: the steps, and ours beside the peer's."""
    rows = [[name, faults[name], "-"] for name in faults]
    rows += [[name, timing.show(), f"{tokens * 1000 / timing.median_ms:,.0f}"] for name, timing in timings.items()]
    rows.sort(key=lambda row: [*OURS, *PEERS].index(row[0]))
    report.table(f"{tokens:,} tokens, next-token, no optimizer", ["step", "ms [low, high]", "tokens/s"], rows)
    pairs = [(one, other) for one, other in PAIRS if one in timings and other in timings]
    ratios = [[f"{one} / {other}", f"{timings[other].median_ms / timings[one].median_ms:.3f}"] for one, other in pairs]
    report.table("tokens/s, compared", ["what", "ratio"], ratios)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Next-token steps in 8 bits beside torchtitan's.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for peers_float8.md")
    parser.add_argument("--titan-site", type=Path, help="folder that holds torchtitan 0.2.2; without it the peer is left out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384], help="tokens in a step")
    arguments = parser.parse_args(argv)
    if arguments.titan_site is not None and not (arguments.titan_site / "torchtitan").is_dir():
        parser.error(f"--titan-site = {arguments.titan_site} holds no torchtitan")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    torch._dynamo.config.recompile_limit = 64  # several models run the same layers' code here
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    report = Report(arguments.out / "peers_float8.md")
    attention = flash_kernels.describe(load_model_config(str(MODEL)).head_dim)
    report.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {MODEL.stem}, {attention}")
    for tokens in arguments.tokens:
        show(report, tokens, *measure(tokens, arguments.titan_site, mesh))
        free_memory()
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
