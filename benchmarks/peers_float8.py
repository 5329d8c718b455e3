"""Next-token steps in 8 bits at the shape of Llama-3.2-1B on one GPU, beside torchtitan's own recipe. Prints a table.

    python -m benchmarks.peers_float8 OUT [--titan-site DIR] [--tokens 16384]

Forward and backward, without optimizer, in bfloat16 and with torchao's rowwise scales, ours also with an 8-bit output head. The
peer is that of `benchmarks.peers`: torchtitan 0.2.2, in bfloat16 and with its converter, which leaves the output head in bfloat16
as ours does. DIR is as there; torchao must be installed. All take turns, step by step, and sit on the GPU together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.packs import LONGEST, draw_batch
from benchmarks.peers import MODEL, Ours, Peer, announce_first, free_memory
from benchmarks.timing import Report, Sample, Timing, measure_in_turns, sample
from flame.attention import flash as flash_kernels
from flame.config.schema import JobConfig, ObjectiveChoice, Training
from flame.models.causal_lm import load_model_config
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

RECIPE = "rowwise"
OURS: dict[str, tuple[str, bool]] = {
    "ours, bfloat16": ("none", False),
    "ours, float8 rowwise": (RECIPE, False),
    "ours, float8 rowwise, 8-bit head": (RECIPE, True),
}
PEERS = {"torchtitan 0.2.2, bfloat16": "", "torchtitan 0.2.2, float8 rowwise": RECIPE}
PAIRS = [*zip(OURS, PEERS, strict=False), ("ours, float8 rowwise, 8-bit head", "torchtitan 0.2.2, float8 rowwise")]
REPEATS, WARMUP = 5, 2


def build_step(tokens: int, float8: str, float8_head: bool, mesh: DeviceMesh) -> Callable[[], None]:
    """A next-token step of the trainer's modules, without optimizer."""
    model_config = load_model_config(str(MODEL))
    training = Training(
        compile=True,
        seq_len=tokens,
        context_len=min(LONGEST, tokens),
        float8=float8,
        float8_head=float8_head,  # type: ignore[arg-type]
    )
    config = JobConfig(training=training, objective=ObjectiveChoice(name="future"))
    ours = Ours(model_config, config, draw_batch(tokens, model_config.vocab_size).to("cuda"), mesh)
    return lambda: ours.step(with_future=False, with_optimizer=False)


def measure(tokens: int, site: Path | None, mesh: DeviceMesh) -> dict[str, Timing | None]:
    """All steps in turns; None for one that failed."""
    batch = draw_batch(tokens, load_model_config(str(MODEL)).vocab_size)
    samplers: dict[str, Callable[[], Sample]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, recipe in PEERS.items() if site is not None else ():
            assert site is not None
            peer = Peer(site, batch, Path(folder), recipe)
            stack.callback(peer.close)
            samplers[name] = peer.sample
        # The rowwise recipe changes how all later compilations round, so each model compiles before the next one is built.
        torch._inductor.config.emulate_precision_casts = False
        for name, (float8, float8_head) in OURS.items():
            step = announce_first(name, build_step(tokens, float8, float8_head, mesh))
            step()
            samplers[name] = partial(sample, step)
        return measure_in_turns(samplers, REPEATS, WARMUP)


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
        timings = measure(tokens, arguments.titan_site, mesh)
        rows = [
            [name, timing.show() if timing else "failed", f"{tokens * 1000 / timing.median_ms:,.0f}" if timing else "-"]
            for name, timing in timings.items()
        ]
        report.table(f"{tokens:,} tokens, next-token, no optimizer", ["step", "ms [low, high]", "tokens/s"], rows)
        found = [(ours, peer, timings[ours], timings.get(peer)) for ours, peer in PAIRS]
        ratios = [[f"{ours} / {peer}", f"{b.median_ms / a.median_ms:.3f}"] for ours, peer, a, b in found if a and b]
        report.table("tokens/s, compared", ["what", "ratio"], ratios)
        free_memory()
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1:])
