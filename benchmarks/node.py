"""All that is measured on the GPUs of one host, in one command. Prints tables, and keeps them in OUT.

    python -m benchmarks.node OUT [--parts weak-scaling layouts negatives kill 8b] [--gpus 1 2 4 8] [--seconds LIMIT]

    weak-scaling   the shape of Llama-3.2-1B, 16,384 and 65,536 tokens a GPU, on 1, 2, 4, 8 GPUs;
                   --tokens and --settings choose others
    layouts        FSDP against HSDP, 16,384 tokens a GPU
    negatives      negatives of all ranks against those of each sequence, 16,384 tokens a GPU
    kill           `benchmarks.fault_ranks` on all GPUs: a rank killed, then half of them lost
    8b             an 8B on all GPUs in bfloat16 and float8, the longest packed sequence that fits, and a 32B if it fits

Each part has a limit of time, and so has each run. A run that exceeds one is killed with all its processes, and its
table says so; the others go on. OUT gets node.md, after each part; node.json, after each run; and logs/, a file for each run.

Runs on fewer GPUs than there are run several at once, on GPUs of their own. Power is limited for each card, so they do not slow
each other's kernels. They share the host's cores: "idle" shows whether one waits for them. The next run on the same GPUs imports
its libraries meanwhile. Runs with the same graphs find them compiled: the first of each shape takes longer to start.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.communication import predict_efficiency
from benchmarks.fault_ranks import COLUMNS, Stage
from benchmarks.node_runs import Case, Column, Host, median_ms, show_ms, show_number
from benchmarks.packs import write_corpus
from benchmarks.pool import Ended, Job, explain, list_gpus
from benchmarks.settings import SETTINGS
from benchmarks.timing import Report
from flame.trainer.estimate import GIB

CHARACTERS = 8_000_000
"""Of the corpus: 16 steps of 65,536 tokens on 8 GPUs hardly read one twice."""
SHORT, LONG = 16_384, 65_536
NEXT_TOKEN, FUTURE, CHEAP = "next token", "future", "first 4 layers, 8,192 anchors"
GATHERED = {f"{setting}, weights kept gathered": setting for setting in (NEXT_TOKEN, FUTURE)}
"""Settings that differ from others on several GPUs alone."""
FLOAT8 = ("--training.float8", "rowwise")
RECOMPUTE = ("--activation_checkpoint.mode", "full")
HALVED_MOMENTS = ("--optimizer.state_dtype", "bfloat16")

SHARES: dict[str, Column] = {
    "exposed communication, %": show_number("exposed communication", "{:.2f}", 100),
    "idle, %": show_number("idle", "{:.2f}", 100),
    "peak GiB": show_number("peak_gib", "{:.1f}"),
}
RUN: dict[str, Column] = {
    "tokens a GPU": lambda case, _: f"{case.tokens:,}",
    "GPUs": lambda case, _: str(case.gpus),
    "setting": lambda case, _: case.setting,
    "ms [low, high]": show_ms,
}
OPTIONS: dict[str, Column] = {"options": lambda case, _: " ".join(case.further).replace("--", "") or "-"}


def measure_scaling(host: Host, seconds: float) -> None:
    """The same work for each GPU on more and more of them."""
    order = [(tokens, gpus) for tokens in host.lengths for gpus in reversed(host.counts)]
    cases = [Case("1B", tokens, gpus, setting) for tokens, gpus in order for setting in host.settings]
    cases = [case for case in cases if case.gpus > 1 or case.setting not in GATHERED]

    def efficiency(case: Case, result: Mapping[str, Any]) -> str:
        alone = host.results.get(case._replace(gpus=1, setting=GATHERED.get(case.setting, case.setting)))
        return f"{median_ms(alone) / median_ms(result):.3f}" if alone and result else "-"

    def predicted(case: Case, _: Mapping[str, Any]) -> str:
        found = predict_efficiency(case.tokens, case.setting, case.gpus)
        return f"{found:.3f}" if found is not None else "-"

    columns = RUN | {"efficiency": efficiency, "by docs/scaling.md's model": predicted} | SHARES
    try:
        host.measure(cases, seconds)
    finally:
        host.table("Weak scaling, Llama-3.2-1B", columns, sorted(cases, key=lambda case: (case.tokens, case.setting, case.gpus)))


def measure_layouts(host: Host, seconds: float) -> None:
    """Weights sharded over all GPUs, or over half of them twice."""
    if host.most < 4:
        host.report.write(f"\nFSDP against HSDP needs 4 GPUs, here are {host.most}: left out")
        return
    degrees = ("--training.data_parallel_replicate_degree", "2", "--training.data_parallel_shard_degree", str(host.most // 2))
    cases = [Case("1B", SHORT, host.most, setting, further) for setting in (NEXT_TOKEN, FUTURE) for further in ((), degrees)]

    def layout(case: Case, _: Mapping[str, Any]) -> str:
        return f"HSDP 2 x {case.gpus // 2}" if case.further else f"FSDP over {case.gpus}"

    try:
        host.measure(cases, seconds)
    finally:
        host.table("FSDP against HSDP, Llama-3.2-1B", {"layout": layout} | RUN | SHARES, cases)


def measure_negatives(host: Host, seconds: float) -> None:
    """Each anchor against the summaries of all ranks."""
    everywhere = ("--future_encoder.negatives", "global")
    cases = [Case("1B", SHORT, host.most, FUTURE, further) for further in ((), everywhere)]
    negatives: Column = lambda case, _: "all ranks'" if case.further else "its sequence's"  # noqa: E731
    try:
        host.measure(cases, seconds)
    finally:
        host.table("Negatives, Llama-3.2-1B", {"negatives": negatives} | RUN | SHARES, cases)


def measure_kill(host: Host, seconds: float) -> None:
    """Ranks that are lost."""
    ranks = host.most
    if ranks < 2 or ranks % 2:
        host.report.write(f"\nA kill needs an even number of GPUs, here are {ranks}: left out")
        return
    out = host.out / "kill"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.fault_ranks", str(out), "--ranks", str(ranks)]

    def show(ended: Ended) -> None:
        result = out / "result.json"
        if result.exists():
            stages = [Stage(**stage) for stage in json.loads(result.read_text())]
            title = f"kill -9 of one of {ranks} ranks, twice, against an uninterrupted run"
            host.report.table(title, COLUMNS, [stage.show() for stage in stages])
        elif ended.problem:
            for log in sorted(out.glob("*.log")):
                host.report.write("\n".join([f"\n{log.name}:", "", "```", *explain(log), "```"]))
        host.keep()

    try:
        host.run([Job("kill", ranks, command)], seconds, show)
    finally:
        for checkpoints in out.glob("*/checkpoint"):
            shutil.rmtree(checkpoints)


def list_large(host: Host) -> list[Case]:
    """Runs of an 8B and a 32B; and of the 8B at the longest packed sequences."""
    has_float8 = importlib.util.find_spec("torchao") is not None
    if not has_float8:
        host.report.write("\ntorchao is not installed: no float8")
    usual = Case("8B", SHORT, host.most, NEXT_TOKEN, warmup=3, steps=5, profiled=0)
    precisions: list[tuple[str, ...]] = [(), FLOAT8] if has_float8 else [()]
    cases = [usual._replace(setting=setting, further=each) for each in precisions for setting in (NEXT_TOKEN, FUTURE)]
    large = usual._replace(shape="32B", further=RECOMPUTE, warmup=1, steps=2)
    cases.append(large if host.holds(host.estimate(large)) else halve_moments(large))
    for further in ((), RECOMPUTE):  # a step of 262,144 tokens takes half a minute: one warms up, one counts
        longest = usual._replace(tokens=4096, further=further, warmup=1, steps=1)
        if tokens := host.find_longest(longest):
            cases.append(longest._replace(tokens=tokens))
    return cases


def halve_moments(case: Case) -> Case:
    return case._replace(further=(*RECOMPUTE, *HALVED_MOMENTS))


def choose_smaller(case: Case, problem: str) -> Case | None:
    """What to try where a run has failed; None for those that fit on paper by far."""
    if case.shape == "32B":
        return halve_moments(case) if case.further == RECOMPUTE else None
    if case.tokens == SHORT:
        return None
    tokens = case.tokens * 7 // 8 if "out of memory" in problem else case.tokens // 2
    return case._replace(tokens=max(1, tokens // 4096) * 4096)


def measure_large(host: Host, seconds: float) -> None:
    """Models that need several GPUs. What the estimate says does not fit is not tried."""
    deadline = time.monotonic() + seconds
    cases = list_large(host)
    estimates = {case: host.estimate(case) for case in cases}
    fitting = [case for case, estimate in estimates.items() if host.holds(estimate)]
    for case in estimates.keys() - fitting:
        host.left_out[case.name] = "not tried: does not fit, by the estimate"
    columns = {"shape": lambda case, _: case.shape} | RUN | OPTIONS
    columns |= {
        "tokens/s a GPU": lambda case, result: f"{result['tokens_per_second'] / case.gpus:,.0f}" if result else "-",
        "MFU, % of bfloat16": show_number("mfu", "{:.1f}", 100),
        "estimate, GiB": lambda case, _: f"{estimates[case]:.1f}",
        "peak GiB": SHARES["peak GiB"],
    }
    try:
        host.measure(fitting, seconds)
        failed = [(case, host.problems[case.name]) for case in fitting if case.name in host.problems]
        smaller = [found for case, problem in failed if (found := choose_smaller(case, problem)) is not None]
        estimates |= {case: host.estimate(case) for case in smaller}
        host.measure(smaller, deadline - time.monotonic())
    finally:
        host.table("8B and 32B", columns, list(estimates))


class Part(NamedTuple):
    """One part of the measurement."""

    measure: Callable[[Host, float], None]
    seconds: float
    """Its limit."""


PARTS = {
    "weak-scaling": Part(measure_scaling, 480),
    "layouts": Part(measure_layouts, 150),
    "negatives": Part(measure_negatives, 120),
    "kill": Part(measure_kill, 200),
    "8b": Part(measure_large, 560),
}


def describe_gpu() -> tuple[str, float]:
    """Name and GiB of the first GPU, asked in another process: this one should take no memory of it."""
    ask = "import torch; gpu = torch.cuda.get_device_properties(0); print(gpu.total_memory, gpu.name)"
    size, name = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split(None, 1)
    return name.strip(), int(size) / GIB


def choose_counts(asked: list[int] | None, there: int) -> list[int]:
    """Numbers of GPUs to measure, ascending: those asked for, or powers of two."""
    return sorted(set(asked)) if asked else [1 << power for power in range(there.bit_length())]


def measure_host(host: Host, parts: list[str], seconds: float | None) -> None:
    """Measure the parts. One that fails is reported, and the others go on."""
    for name in parts:
        began = time.monotonic()
        try:
            PARTS[name].measure(host, seconds or PARTS[name].seconds)
        except Exception:
            host.problems[name] = "failed"
            host.report.write("\n".join([f"\n{name}: failed", "", "```", traceback.format_exc().rstrip(), "```"]))
            host.keep()
        host.report.write(f"\n({name}: {time.monotonic() - began:.0f} s)")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="All that is measured on the GPUs of one host.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for node.md, node.json and logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--gpus", nargs="+", type=int, metavar="N", help="numbers of GPUs (default: powers of two)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[SHORT, LONG], metavar="N", help="of weak-scaling, a GPU")
    usual = [NEXT_TOKEN, FUTURE, CHEAP, *GATHERED]
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=usual, metavar="NAME", help="of weak-scaling")
    parser.add_argument("--seconds", type=float, help="limit of each part (default: its own)")
    arguments = parser.parse_args(argv)
    gpus = list_gpus()
    counts = choose_counts(arguments.gpus, len(gpus))
    if not counts or counts[0] < 1 or counts[-1] > len(gpus):
        parser.error(f"this machine has {len(gpus)} GPUs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # kills what runs, and writes its tables
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    name, memory = describe_gpu()
    with tempfile.TemporaryDirectory(prefix="flame-node-") as scratch:
        report = Report(out / "node.md")
        host = Host(out, Path(scratch), gpus, counts, memory, report, arguments.tokens, arguments.settings)
        host.report.write(f"{len(gpus)} x {name}, {memory:.0f} GiB each; measured on {', '.join(map(str, counts))}")
        write_corpus(host.scratch / "corpus.jsonl", CHARACTERS)
        measure_host(host, arguments.parts, arguments.seconds)
    return int(bool(host.problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
