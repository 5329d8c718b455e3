"""What of a path-star answer is in the summary that "=" is to predict, by `future_encoder.target_shift`.

    python -m research.summary_content OUT --size 2x3 --labels 7 --model configs/models/pathstar_cpu.json
    python -m research.summary_content OUT --size 2x3 --labels 7 --model exp/pathstar_cpu/hf

Of a configuration the weights are random. A row is a shift, a column a token of the answer; a cell the share of the summaries'
variance that lies between answers which differ in that token. The center, which the question names, is the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.packs import pack_documents
from benchmarks.timing import Report
from flame.config.schema import Corpus, JobConfig, ObjectiveChoice
from flame.data.encoding import encode_document
from flame.data.sources.base import open_texts
from flame.data.sources.registry import build_kind
from flame.data.tasks.pathstar import PathstarOptions, parse_sizes
from flame.data.tokenizer import load_tokenizer
from flame.models.wrapper import TrainingModel
from flame.trainer.setup import build_modules, materialize

NUM_GRAPHS = 2048
GRAPHS_A_PACK = 128
SHIFTS = (0, 1, 2)
CPU = torch.device("cpu")


def explain_variance(summaries: Tensor, tokens: Tensor) -> float:
    """Share of the variance between groups (eta squared).

    Args:
        summaries: (graphs, width).
        tokens: (graphs,), the group of each.
    """
    groups = tokens.unique(return_inverse=True)[1]
    counts = groups.bincount().to(summaries.dtype)
    sums = summaries.new_zeros(len(counts), summaries.shape[1]).index_add_(0, groups, summaries)
    within = summaries - (sums / counts[:, None])[groups]
    return 1 - (within.square().sum() / (summaries - summaries.mean(0)).square().sum()).item()


def build_model(path: Path) -> TrainingModel:
    """With the weights of an export, or of a configuration file with random ones."""
    config = JobConfig(objective=ObjectiveChoice(name="future"))
    config.training.mixed_precision_param = "float32"
    model = build_modules(config, AutoConfig.from_pretrained(path), CPU.type)
    materialize(model, CPU, seed=0)
    if path.is_dir():
        model.lm.load_state_dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
    return model


def read_graphs(size: str, labels: int) -> Tensor:
    """Held-out graphs, int64 [NUM_GRAPHS, tokens]."""
    job = JobConfig(extensions={"pathstar": PathstarOptions(labels=labels)})
    tokenizer = load_tokenizer("pathstar", find_options=job.get)
    source = open_texts(build_kind(Corpus(dataset="pathstar", dataset_name=size), "validation", job.get))
    return torch.tensor([list(encode_document(tokenizer, source.read(number))) for number in range(NUM_GRAPHS)])


@torch.no_grad()
def summarize(model: TrainingModel, graphs: Tensor) -> Tensor:
    """Summaries as the loss compares them, of length 1: float64 [graphs, tokens, width]."""
    packs = (pack_documents(list(part)) for part in graphs.split(GRAPHS_A_PACK))
    summaries = torch.cat([model.encode_future(pack, window_k=0) for pack in packs])
    return F.normalize(summaries.double(), dim=-1).view(*graphs.shape, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for summary_content.md")
    parser.add_argument("--size", required=True, help="of the graphs, such as 5x5")
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a configuration file or an export")
    arguments = parser.parse_args()
    nodes = parse_sizes(arguments.size)[0].nodes
    graphs = read_graphs(arguments.size, arguments.labels)
    answer = graphs.shape[1] - 1 - nodes
    summaries = summarize(build_model(arguments.model), graphs)
    rows = []
    for shift in SHIFTS:
        predicted = summaries[:, answer - 1 + shift]
        shares = [f"{explain_variance(predicted, graphs[:, answer + node]):.2f}" for node in range(nodes)]
        spread = (predicted - predicted.mean(0)).square().sum(-1).mean().item()
        rows.append([str(shift), f"{spread:.3f}", *shares])
    report = Report(arguments.out / "summary_content.md")
    header = ["target_shift", "variance", *("center" if node == 0 else f"node {node}" for node in range(nodes))]
    report.table(f"G({arguments.size}), {arguments.model}", header, rows)


if __name__ == "__main__":
    main()
