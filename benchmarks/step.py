"""Where the time of a training step goes: the trainer itself at the shape of Llama-3.2-1B. Prints tables, draws OUT/step.png.

    python -m benchmarks.step OUT [--tokens 65536] [--steps 8] [--gpus 1] [--layouts 0]

Three runs: next token alone, with the future loss, and with it in fp8; each on documents of mean length 1,024, AdamW included.
--variants takes other settings of `benchmarks.settings`. Where not all steps have the loss, the mean is the cost.

Phases are taken between CUDA events on the compute stream, medians over the steps after the first four. Then a profile of four
steps gives the share of time in which no kernel runs (what the GPU waits for: launches, data, the verdict on the step) and in
which only NCCL's run (communication that is not hidden). Before the first phase, H2D copies; "rest" is what lies between phases.
--layouts N makes N more steps, of as many document layouts, and counts what was compiled after the third step of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.packs import write_corpus
from benchmarks.pool import list_gpus, run_jobs
from benchmarks.settings import MEASURED, SETTINGS
from benchmarks.shapes import write_shape
from benchmarks.step_worker import Spec, build_job, list_options
from benchmarks.timing import Report
from flame.compare.tables import show_range

PHASES = ["anti-causal forward", "causal forward", "cross entropy", "predictor and InfoNCE", "backward", "clipping", "optimizer"]


def run_variants(arguments: argparse.Namespace, corpus: Path) -> dict[str, dict[str, Any]]:
    """The results of the workers, one after another.

    Raises:
        SystemExit: one fails.
    """
    model, jobs, files = write_shape("1B", arguments.out), [], {}
    for variant in arguments.variants:
        name = variant.replace(", ", "_").replace(",", "").replace(" ", "_")
        run, files[variant] = arguments.out / name, arguments.out / f"{name}.json"
        run.mkdir(parents=True, exist_ok=True)
        options = list_options(run, model, corpus, arguments.tokens, SETTINGS[variant])
        spec = Spec(options, str(files[variant]), steps=arguments.steps, layouts=arguments.layouts)
        jobs.append(build_job(name, arguments.gpus, spec, run / "spec.json", float("inf")))
    with closing(run_jobs(jobs, list_gpus()[: arguments.gpus], arguments.out)) as all_ended:
        for ended in all_ended:
            if ended.problem:
                print("\n".join(ended.lines), file=sys.stderr)
                raise SystemExit(f"{ended.job.name}: {ended.problem}")
    return {variant: json.loads(file.read_text()) for variant, file in files.items()}


def draw(results: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.7 * len(results)), layout="constrained")
    left = [0.0] * len(results)
    for phase in [*PHASES, "rest"]:
        widths = [result["parts_ms"].get(phase, 0.0) for result in results.values()]
        axes.barh(list(results), widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_title(title)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for step.md, step.json and step.png")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens a step and GPU")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layouts", type=int, default=0, help="steps over which compilations are counted")
    parser.add_argument("--variants", nargs="+", choices=SETTINGS, default=list(MEASURED))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out = arguments.out.absolute()  # workers run in the repository's folder
    corpus = arguments.out / "corpus.jsonl"
    total = (arguments.steps + arguments.layouts + 30) * arguments.tokens * arguments.gpus
    write_corpus(corpus, min(total, 40_000_000))
    results = run_variants(arguments, corpus)
    for result in results.values():
        result["parts_ms"]["rest"] = max(0.0, statistics.median(result["steps_ms"]) - sum(result["parts_ms"].values()))
    title = f"{arguments.tokens:,} tokens on each of {arguments.gpus} x {torch.cuda.get_device_name()}, ms a step"
    report = Report(arguments.out / "step.md")
    rows = [["whole step, median [lowest, highest]", *(show_range(r["steps_ms"], "{:,.1f}") for r in results.values())]]
    rows.append(["whole step, mean", *(f"{statistics.mean(r['steps_ms']):,.1f}" for r in results.values())])
    rows += [[phase, *(f"{r['parts_ms'].get(phase, 0):,.1f}" for r in results.values())] for phase in [*PHASES, "rest"]]
    rows += [[f"{name}, %", *(f"{100 * r[name]:.2f}" for r in results.values())] for name in ("idle", "exposed communication")]
    rows.append(["peak memory, GiB", *(f"{r['peak_gib']:.1f}" for r in results.values())])
    if arguments.layouts:
        rows.append([f"graphs compiled over {arguments.layouts} steps", *(str(r["compiled later"]) for r in results.values())])
    report.table(title, ["", *results], rows)
    (arguments.out / "step.json").write_text(json.dumps(results, indent=1))
    draw(results, arguments.out / "step.png", title)


if __name__ == "__main__":
    main(sys.argv[1:])
