"""What a start of a run begins with: fingerprints of its weights and of its first batch, and its device.

Two runs that are to differ in their objective alone agree in both fingerprints; `flame-compare` checks that.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from xxhash import xxh3_128

from flame.config.run import FIRST_STEP_FILE
from flame.data.batch import PackedBatch

SAMPLED = 4096
"""Values of each parameter, on each rank, that the fingerprint takes: enough to tell weights apart, at no cost."""


def record_first_step(folder: Path, step: int, lm: nn.Module, batches: Sequence[PackedBatch], device: torch.device) -> None:
    """Append a line to `first_step.jsonl`. A collective call, before the weights are updated.

    Args:
        step: the first that this process makes.
        lm: the language model, without the objective's modules.
        batches: of this rank, in that step.
    """
    own = (fingerprint_weights(lm), [(batch.sequence_index, fingerprint_batch(batch)) for batch in batches])
    found: list[tuple[str, list[tuple[int, str]]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if dist.get_rank() != 0:
        return
    ranks = [each for each in found if each is not None]
    line = {
        "step": step,
        "weights": _combine([weights for weights, _ in ranks]),
        "data": _combine([digest for _, digest in sorted(each for _, sequences in ranks for each in sequences)]),
        "device": describe_device(device),
        "world_size": len(ranks),
    }
    with (folder / FIRST_STEP_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def fingerprint_weights(lm: nn.Module) -> str:
    """Hash of the shapes and of some values of all parameters, as far as this rank holds them. Names do not count: compilation
    changes them."""
    digest = xxh3_128()
    for parameter in lm.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        values = local.detach().flatten()
        # A copy: FSDP resizes the storage of gathered parameters, which numpy would hold on to.
        sample = values[:: max(1, len(values) // SAMPLED)].float().cpu().clone()
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def fingerprint_batch(batch: PackedBatch) -> str:
    """Hash of the tokens of a packed sequence and of where its documents end. What of them counts is the objective's matter."""
    digest = xxh3_128()
    for tensor in (batch.input_ids, batch.cu_seqlens):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_device(device: torch.device) -> str:
    """Name of the GPU, or of the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{_name_processor()}, {count} thread{'s' * (count > 1)}"


def _name_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.machine())


def _combine(digests: Sequence[str]) -> str:
    return xxh3_128(" ".join(digests).encode()).hexdigest()
