"""A model of what communication adds to a step on many GPUs: FSDP on a node, HSDP over nodes. Needs no GPU: nothing is run.

    python -m benchmarks.communication [--nvlink 360] [--network 50] [--latency 8]

For a group of s ranks that share the weights (shard) and R such groups (replicate), a layer of p weights costs each rank

    gather, bfloat16          (s - 1) / s * 2 p / B_s  + (s - 1) * latency        in each pass and in the backward
    reduce-scatter, float32   (s - 1) / s * 4 p / B_s  + (s - 1) * latency
    all-reduce of its shard   2 (R - 1) / R * 4 p / s / B_r + 2 (R - 1) * latency

B_s is the bandwidth inside a node, or that of all network cards of a node if the group spans nodes: a ring then enters each node
once. B_r is the bandwidth of one card, since all shards of a node reduce at once. These are the costs of rings (NCCL's default).

Communication of a layer is hidden behind the arithmetic of its neighbour; what is longer shows. The root's group (embedding and
norm) shows in whole: nothing runs before its gather, and nothing after its reduction. What is hidden still slows the kernels
beside it. Its share is the one number that is fitted, to the measured steps of docs/performance.md on two and four GPUs.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from flame.compare.tables import format_table
from flame.models.causal_lm import build_on_meta, find_decoder_layers, load_model_config

REPO = Path(__file__).parent.parent
NODE = 8
"""GPUs of a node, each with a network card of its own."""
GIGA = 1e9


class Links(NamedTuple):
    """Speeds of the machine."""

    nvlink: float
    """GB/s of a collective inside a node."""
    network: float
    """GB/s of one network card."""
    latency: float
    """Microseconds of a step of a ring."""


LINKS = Links(nvlink=360.0, network=50.0, latency=8.0)
"""What docs/scaling.md assumes, and why."""


class Step(NamedTuple):
    """Arithmetic of a step on one GPU, in ms, by what hides communication, and the weights that are communicated."""

    passes: tuple[float, ...]
    """Forwards of all layers."""
    backward: float
    rest: float
    layers: int
    layer_weights: int
    root_weights: int

    @property
    def total(self) -> float:
        return sum(self.passes) + self.backward + self.rest


OBJECTIVES = ("next token", "future")
MEASURED: dict[int, dict[str, dict[int, float]]] = {
    16_384: {"next token": {1: 265.0, 2: 271.0, 4: 275.0}, "future": {1: 330.0, 2: 348.0, 4: 353.0}},
    65_536: {"next token": {1: 986.0, 2: 993.0}, "future": {1: 1320.0, 2: 1325.0}},
}
"""ms of a step by tokens a GPU, objective and GPUs, PyTorch's flash kernel (docs/performance.md)."""
SHARES = {
    16_384: {"next token": (60.3, 141.7, 253.7), "future": (61.9 + 62.8, 141.9, 325.9)},
    65_536: {"next token": (244.2, 497.9, 926.1), "future": (244.8 + 244.8, 503.8, 1240.6)},
}
"""Forwards of the layers, backward and whole step, ms (the same page, FlashAttention-4): how a step divides."""


@cache
def count_weights() -> tuple[int, int, int]:
    """Layers, weights of a layer, and all other weights of Llama-3.2-1B."""
    lm = build_on_meta(load_model_config(str(REPO / "configs" / "models" / "llama_1B.json")), "cuda", "sdpa")
    layers = find_decoder_layers(lm)
    each = sum(weight.numel() for weight in layers[0].parameters())
    return len(layers), each, sum(weight.numel() for weight in lm.parameters()) - len(layers) * each


def build_step(tokens: int, objective: str) -> Step:
    """The measured step on one GPU."""
    forwards, backward, whole = SHARES[tokens][objective]
    total, passes = MEASURED[tokens][objective][1], 2 if objective == "future" else 1
    scale = total / whole
    rest = total - (forwards + backward) * scale
    return Step((forwards * scale / passes,) * passes, backward * scale, rest, *count_weights())


def estimate_parts(step: Step, shard: int, replicate: int, links: Links) -> tuple[float, float]:
    """Communication of a step in ms: what shows, and what is hidden."""
    wide = links.nvlink if shard <= NODE else links.network * NODE
    ring = (shard - 1) * links.latency / 1e3

    def gather(weights: int) -> float:
        return (shard - 1) / shard * 2 * weights / (wide * GIGA) * 1e3 + ring if shard > 1 else 0.0

    def reduce(weights: int) -> float:
        own = (shard - 1) / shard * 4 * weights / (wide * GIGA) * 1e3 + ring if shard > 1 else 0.0
        across = 2 * (replicate - 1) / replicate * 4 * weights / shard / (links.network * GIGA) * 1e3
        return own + (across + 2 * (replicate - 1) * links.latency / 1e3 if replicate > 1 else 0.0)

    each, root = step.layer_weights, step.root_weights
    shown, hidden = gather(root) + reduce(root) + gather(each) + reduce(each), 0.0
    spans = [(span / step.layers, gather(each)) for span in step.passes]
    spans.append((step.backward / step.layers, gather(each) + reduce(each)))
    for arithmetic, communication in spans:
        shown += (step.layers - 1) * max(0.0, communication - arithmetic)
        hidden += (step.layers - 1) * min(arithmetic, communication)
    return shown, hidden


def fit_slowdown(links: Links) -> float:
    """Milliseconds that a millisecond of hidden communication takes from the arithmetic, by least squares."""
    above = below = 0.0
    for tokens, by_objective in MEASURED.items():
        for objective, times in by_objective.items():
            step = build_step(tokens, objective)
            for gpus in times.keys() - {1}:
                shown, hidden = estimate_parts(step, gpus, 1, links)
                above += hidden * (times[gpus] - step.total - shown)
                below += hidden * hidden
    return max(0.0, above / below)


def estimate_step(step: Step, shard: int, replicate: int, links: Links, slowdown: float) -> float:
    """ms of a step."""
    shown, hidden = estimate_parts(step, shard, replicate, links)
    return step.total + shown + slowdown * hidden


def predict_efficiency(tokens: int, objective: str, gpus: int) -> float | None:
    """Time of a step on one GPU over that on several of a node (FSDP); None for what the model does not know."""
    if objective not in MEASURED.get(tokens, {}):
        return None
    step = build_step(tokens, objective)
    return step.total / estimate_step(step, gpus, 1, LINKS, fit_slowdown(LINKS))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="What communication adds to a step on many GPUs.", allow_abbrev=False)
    parser.add_argument("--nvlink", type=float, default=LINKS.nvlink, help="GB/s of a collective inside a node")
    parser.add_argument("--network", type=float, default=LINKS.network, help="GB/s of a GPU's network card")
    parser.add_argument("--latency", type=float, default=LINKS.latency, help="microseconds of a step of a ring")
    parser.add_argument("--tokens", type=int, choices=MEASURED, default=16_384, help="a GPU")
    arguments = parser.parse_args(argv)
    links = Links(arguments.nvlink, arguments.network, arguments.latency)
    steps = {objective: build_step(arguments.tokens, objective) for objective in OBJECTIVES}
    slowdown = fit_slowdown(links)
    layouts = [(1, 1), (2, 1), (4, 1), (8, 1), (64, 1), (8, 8), (1024, 1), (8, 128)]
    rows = []
    for shard, replicate in layouts:
        cells = [f"{shard * replicate:,}", f"FSDP over {shard:,}" if replicate == 1 else f"HSDP {replicate} x {shard}"]
        for objective, step in steps.items():
            found = estimate_step(step, shard, replicate, links, slowdown)
            measured = MEASURED[arguments.tokens][objective].get(shard * replicate)
            cells += [f"{found:,.0f}", f"{measured:,.0f}" if measured else "", f"{step.total / found:.3f}"]
        rows.append(cells)
    columns = ["GPUs", "layout"]
    for objective in OBJECTIVES:
        columns += [f"{objective}, ms", "measured", "efficiency"]
    print("\n".join(format_table(columns, rows)))
    print(f"\na ms of hidden communication takes {slowdown:.2f} ms from the arithmetic (fitted)")


if __name__ == "__main__":
    main(sys.argv[1:])
