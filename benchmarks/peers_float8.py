"""Next-token steps in bfloat16 and in 8 bits on one GPU, beside torchtitan's own. Prints tables.

    python -m benchmarks.peers_float8 OUT [--titan-site DIR] [--tokens 16384]
    python -m benchmarks.peers_float8 OUT --shape 8B --layers 8

Forward and backward, without optimizer, at the shape of Llama-3.2-1B or 3.1-8B: in bfloat16 and with torchao's rowwise scales,
ours also with an 8-bit output head. The peer is torchtitan 0.2.2, as its trainer runs on one GPU, with its converter for 8
bits, which leaves the output head in bfloat16 as ours does; also with bfloat16 weights, where nothing is cast. It takes part at
1B alone. DIR is as for `benchmarks.peers`; torchao must be installed. With --layers the model has as many of its layers, so
that wide ones fit one GPU. What shares a table takes turns, step by step, and sits on the GPU together. What fails is left out,
and the table says why.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._inductor.config
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.packs import draw_batch
from benchmarks.peers import Peer, note
from benchmarks.settings import SETTINGS
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.timing import CannotRun, Report, Sample, Timing, measure_in_turns
from benchmarks.training_step import Guard, Rebuilt, TrainingStep, free_memory, read_step_options
from flame.attention import flash as flash_kernels
from flame.config.schema import Training
from flame.models.causal_lm import load_model_config
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

BFLOAT16 = "ours, bfloat16"
REPEATS, WARMUP = 5, 2


class Turns(NamedTuple):
    """What shares a table."""

    ours: Mapping[str, Sequence[str]]
    """Options of a run."""
    peers: Mapping[str, Sequence[str]]
    """Options of `benchmarks.peer_titan`."""

    @property
    def names(self) -> list[str]:
        return [*self.ours, *self.peers]


def list_turns(recipe: str) -> Turns:
    """Steps in 8 bits, beside ours in bfloat16."""
    ours = {BFLOAT16: SETTINGS["next token"]} | {
        f"ours, float8 {recipe}{head}": SETTINGS[f"next token, float8 {recipe}{head}"] for head in ("", ", 8-bit head")
    }
    return Turns(ours, {f"torchtitan 0.2.2, float8 {recipe}": ["--float8", recipe]})


TURNS = {
    "bfloat16": Turns(
        {BFLOAT16: SETTINGS["next token"]},
        {"torchtitan 0.2.2": [], "torchtitan 0.2.2, bfloat16 weights": ["--weights", "bfloat16"]},
    ),
    "rowwise": list_turns("rowwise"),
    "rowwise_with_gw_hp": list_turns("rowwise_with_gw_hp"),
}


def build_step(model: Path, tokens: int, options: Sequence[str], mesh: DeviceMesh, compiled: bool = True) -> TrainingStep:
    """Model and optimizer of a run with these options beside those of all. It has no batch yet."""
    config = read_step_options(model, tokens, options, compiled=compiled)
    return TrainingStep(load_model_config(str(model)), config, mesh)


def get_bare_step(step: TrainingStep) -> Callable[[], None]:
    """Forward and backward alone."""
    return partial(step.step, with_optimizer=False)


def measure(
    turns: Turns, tokens: int, site: Path | None, mesh: DeviceMesh, *, model: Path, compiled: bool = True
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of what shares a table, and why others have none."""
    batch = draw_batch(tokens, load_model_config(str(model)).vocab_size)
    guard, samplers = Guard(), dict[str, Callable[[], Sample]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, options in turns.peers.items() if site is not None else ():
            assert site is not None
            peer = Peer(site, batch, Path(folder), options)
            stack.callback(peer.close)
            samplers[name] = peer.sample
        # The rowwise recipe changes how all later compilations round, so each model compiles before the next one is built.
        torch._inductor.config.emulate_precision_casts = False
        for name, options in turns.ours.items():
            note(f"first step of: {name}")
            source = Rebuilt(partial(build_step, model, tokens, options, mesh, compiled))
            source.take(batch)
            take = guard.watch(name, source, get_bare_step)
            try:
                take()
                samplers[name] = take
            except CannotRun:
                free_memory()
        timings = measure_in_turns(samplers, REPEATS, WARMUP)
    faults = {name: "failed" for name, timing in timings.items() if timing is None} | guard.faults
    faults |= dict.fromkeys(guard.not_finite - faults.keys(), "a loss that is not finite")
    return {name: timing for name, timing in timings.items() if timing is not None and name not in faults}, faults


def show(report: Report, title: str, tokens: int, turns: Turns, timings: Mapping[str, Timing], faults: Mapping[str, str]) -> None:
    """A table. A ratio is of tokens/s, to our own in bfloat16 and to the peer's first."""
    peer = next(iter(turns.peers))
    rows = []
    for name in turns.names:
        if name in timings:
            against = [f"{timings[o].median_ms / timings[name].median_ms:.3f}" if o in timings else "-" for o in (BFLOAT16, peer)]
            rows.append([name, timings[name].show(), f"{tokens * 1000 / timings[name].median_ms:,.0f}", *against])
        elif name in faults:
            rows.append([name, faults[name], "-", "-", "-"])
    header = ["step", "ms [low, high]", "tokens/s", f"/ {BFLOAT16}", f"/ {peer}"]
    report.table(f"{title}: {tokens:,} tokens, next token, no optimizer", header, rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Next-token steps in 8 bits beside torchtitan's.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for peers_float8.md")
    parser.add_argument("--titan-site", type=Path, help="folder that holds torchtitan 0.2.2; without it the peer is left out")
    parser.add_argument("--shape", choices=SHAPES, default="1B", help="of the model (%(default)s)")
    parser.add_argument("--layers", type=int, help="how many the model has (default: those of the shape)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384], help="tokens in a step")
    parser.add_argument("--only", nargs="+", choices=TURNS, default=list(TURNS), help="tables (default: all)")
    arguments = parser.parse_args(argv)
    if arguments.titan_site is not None and not (arguments.titan_site / "torchtitan").is_dir():
        parser.error(f"--titan-site = {arguments.titan_site} holds no torchtitan")
    if arguments.titan_site is not None and (arguments.shape, arguments.layers) != ("1B", None):
        parser.error("--titan-site is for --shape 1B with all its layers")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    torch._dynamo.config.recompile_limit = 64  # several models run the same layers' code here
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    report = Report(arguments.out / "peers_float8.md")
    model = write_shape(arguments.shape, arguments.out, arguments.layers)
    attention = flash_kernels.describe(load_model_config(str(model)).head_dim)
    report.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Llama {model.stem}, {attention}")
    for tokens in arguments.tokens:
        for title in arguments.only:
            turns = TURNS[title]
            show(report, title, tokens, turns, *measure(turns, tokens, arguments.titan_site, mesh, model=model))
            free_memory()
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
