"""What the 8-bit anti-causal pass does to the summaries and to training. Prints a table, draws OUT/fp8.png.

    python -m benchmarks.fp8 OUT [--steps 500] [--tokens 8192]

`configs/llama_340M.toml` on the Python standard library as bytes, twice at the same time on one GPU: with
`future_encoder.precision` "bf16" and "fp8", the same seed and data. The second also encodes its batch both ways now and then and
compares the summaries by their cosines, each to the same weights' exact one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Report
from flame.objectives.future.objective import FutureObjective
from flame.runtime.distributed import end_processes, get_world_size, set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options

REPO = Path(__file__).parent.parent
PRECISIONS = ("bf16", "fp8")
COMPARED_EVERY = 100
AVERAGED = 20


def run_worker(arguments: argparse.Namespace) -> None:
    set_single_process_defaults()
    steps = arguments.steps
    config = read_options(
        [
            *("--job.config_file", str(REPO / "configs" / "llama_340M.toml"), "--job.dump_folder", str(arguments.out / "run")),
            *("--training.dataset", "stdlib", "--training.dataset_name", "", "--model.tokenizer_path", "bytes"),
            *("--training.seq_len", str(arguments.tokens), "--training.steps", str(steps), "--lr_scheduler.warmup_steps", "100"),
            *("--future_encoder.loss_weight", "0.1", "--objective.warmup_steps", "100"),
            *("--future_encoder.precision", arguments.worker),
            *("--future_encoder.layers", "0", "--future_encoder.max_anchors", "0"),
            *("--metrics.log_freq", "1", "--metrics.enable_tensorboard", "false", "--checkpoint.enable_checkpoint", "false"),
        ],
        get_world_size(),
    )
    trainer = Trainer(config)
    trainer._resume()
    trainer._open_run()
    cosines = {}
    for step in range(steps):
        if step % COMPARED_EVERY == 0:
            cosines[step] = compare_summaries(trainer)  # in both, so that both see the same data
        trainer.train_step()
        trainer._log_when_due()
    cosines[steps] = compare_summaries(trainer)
    if arguments.worker == "fp8":
        (arguments.out / "cosines.json").write_text(json.dumps(cosines))
    trainer._close_run()
    end_processes()


@torch.no_grad()
def compare_summaries(trainer: Trainer) -> tuple[float, float]:
    """Mean and lowest cosine between 8-bit and exact summaries of one batch, which training does not see."""
    batches = trainer._next_batches()
    trainer.data_state.advance(batches, trainer.world_size)
    batch = batches[0].to(trainer.device)
    objective = trainer.objective
    assert isinstance(objective, FutureObjective)

    def encode() -> Tensor:
        return trainer.model(lambda root: root.encode_future(batch, 0)).float()

    exact = encode()
    with objective._fp8.on() if objective._fp8 is not None else nullcontext():
        rounded = encode()
    cosine = F.cosine_similarity(rounded, exact, dim=-1)
    return cosine.mean().item(), cosine.min().item()


def read_losses(folder: Path, key: str) -> list[float]:
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="The effect of the 8-bit anti-causal pass.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for fp8.md and fp8.png")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a step")
    parser.add_argument("--worker", choices=PRECISIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")
    if arguments.worker:
        run_worker(arguments)
        return
    folders = {precision: arguments.out / precision for precision in PRECISIONS}
    workers = []
    for precision, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.fp8", str(folder), "--worker", precision]
        command += ["--steps", str(arguments.steps), "--tokens", str(arguments.tokens)]
        log = (folder / "log").open("w")
        workers.append(subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log))
    if any(worker.wait() for worker in workers):
        raise SystemExit("a run has failed; see " + ", ".join(str(folder / "log") for folder in folders.values()))

    aux = {precision: read_losses(folder, "aux_loss") for precision, folder in folders.items()}
    ce = {precision: read_losses(folder, "ce_loss") for precision, folder in folders.items()}
    cosines = {int(step): pair for step, pair in json.loads((folders["fp8"] / "cosines.json").read_text()).items()}
    report = Report(arguments.out / "fp8.md")
    rows = []
    for step, (mean, low) in cosines.items():
        window = slice(max(0, step - AVERAGED), max(step, AVERAGED))
        means = [f"{statistics.mean(series[window]):.4f}" for kind in (aux, ce) for series in kind.values()]
        rows.append([f"{step:,}", f"{mean:.4f}", f"{low:.4f}", *means])
    header = ["step", "cosine, mean", "lowest", "aux, bf16", "aux, fp8", "ce, bf16", "ce, fp8"]
    report.table(
        f"{torch.cuda.get_device_name()}, {arguments.tokens:,} tokens a step; losses are means of {AVERAGED} steps", header, rows
    )
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for precision, series in aux.items():
        axes.plot(range(1, len(series) + 1), series, label=precision, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("aux loss, nats")
    axes.legend(frameon=False)
    figure.savefig(arguments.out / "fp8.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
