"""`bash train.sh ... --estimate [GPUS]`: memory, arithmetic and time of a run, before it is started and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from flame.config.schema import JobConfig
from flame.models.memory import find_moment_bytes
from flame.models.memory_estimate import Memory, estimate_memory
from flame.models.wrapper import TrainingModel
from flame.objectives.step import get_objective
from flame.trainer.budget import resolve_steps
from flame.trainer.micro_step import MOST_WEIGHTS
from flame.trainer.sequence_flops import SequenceFlops
from flame.trainer.setup import build_cadence, build_modules, build_weight_schedule, find_share, open_inputs

GIB = 2**30
MFU = 0.5
"""Of the peak on paper; Llama-3.2-1B reaches 0.52 to 0.56 on an H200 (docs/performance.md)."""
SPARE = 0.95
"""Share of a card's memory that a run can use: the driver and NCCL take the rest."""


class Gpu(NamedTuple):
    """Memory in GiB and peak TFLOP/s in dense bfloat16, by the makers' data sheets."""

    name: str
    memory: float
    peak: float


GPUS = (
    Gpu("A100 40 GB", 40, 312),
    Gpu("A100 80 GB", 80, 312),
    Gpu("H100", 80, 989),
    Gpu("H200", 140, 989),
    Gpu("B200", 179, 2250),
)


class Estimate(NamedTuple):
    """What a run takes."""

    model_weights: int
    objective_weights: int
    memory: Memory
    peak: float
    """Bytes of one rank."""
    step_flops: float
    """Of all ranks, with the objective."""
    run_flops: float
    steps: int


def estimate_run(config: JobConfig) -> Estimate:
    """Estimate a run on `config.world_size` GPUs. The data are opened, for the lengths of their documents.

    Raises:
        UserError: a mistake in options, model, tokenizer or data.
    """
    inputs = open_inputs(config)
    model = build_modules(config, inputs.model_config, "cpu")
    if config.training.budget is not None:
        config.training.steps = resolve_steps(config, model, inputs.mixture)
    memory = estimate_rank(config, model)
    peak = memory.find_peak(keeps_gradients=config.training.gradient_accumulation_steps > 1)
    flops, objective, schedule = SequenceFlops(config, model, inputs.mixture), get_objective(model), build_weight_schedule(config)
    per_step = config.training.gradient_accumulation_steps * config.world_size
    cadence, steps = build_cadence(config), config.training.steps
    plain, aux = per_step * flops.next_token, per_step * flops.average_aux(steps)
    aux_steps = max(steps - max(schedule.start_step - 1, 0), 0)
    return Estimate(
        model_weights=sum(weight.numel() for weight in model.lm.parameters()),
        objective_weights=sum(weight.numel() for weight in objective.parameters()) if objective is not None else 0,
        memory=memory,
        peak=peak,
        step_flops=plain + aux * cadence.num_chosen / cadence.num_sequences,
        run_flops=plain * steps + aux * cadence.share * aux_steps,
        steps=steps,
    )


def estimate_rank(config: JobConfig, model: TrainingModel) -> Memory:
    """Memory of one rank on a GPU, from the model on the meta device."""
    objective = get_objective(model)
    kept = objective.estimate_memory(config.training.seq_len) if objective is not None else 0.0
    stacks = [stack.layers for stack in (objective.list_layer_stacks() if objective is not None else ()) if stack.is_trained]
    shards, moments, mode = find_share(config).shards, find_moment_bytes(config.optimizer), config.activation_checkpoint.mode
    return estimate_memory(model, stacks, config.training, mode, shards, moments, kept)


def describe(estimate: Estimate, config: JobConfig) -> Iterator[str]:
    """The estimate as lines of text."""
    training, ranks, memory = config.training, config.world_size, estimate.memory
    tokens = training.seq_len * training.gradient_accumulation_steps * ranks
    objective = f", and {estimate.objective_weights / 1e6:,.1f}M of the objective" if estimate.objective_weights else ""
    yield f"{estimate.model_weights / 1e6:,.1f}M parameters{objective}"
    yield f"a step on {ranks} GPU{'s' if ranks > 1 else ''}: {tokens:,} tokens, {show_flops(estimate.step_flops)}"
    run_tokens = f"{estimate.steps * tokens / 1e6:,.1f}M tokens"
    yield f"the run: {estimate.steps:,} steps, {run_tokens}, {show_flops(estimate.run_flops)}"
    yield ""
    yield "memory of a GPU, GiB"
    parts = {
        "weights in float32": memory.weights,
        "their gradients": memory.gradients,
        "the optimizer's moments": memory.moments,
        "weights gathered for a pass": memory.gathered,
        "activations": memory.activations,
        "one layer, computed again": memory.recomputed,
        "logits, with their gradients": memory.logits + memory.head_gradients,
        "the objective's loss": memory.objective,
    }
    yield from (f"  {name:<30}{size / GIB:>8.2f}" for name, size in parts.items())
    yield f"  {'peak':<30}{estimate.peak / GIB:>8.2f}   (not all of it is there at once)"
    yield ""
    yield f"{'GPU':<14}{'memory, GiB':>12}{'fits':>6}{'time at ' + format(MFU, '.0%') + ' of its peak':>26}"
    for gpu in GPUS:
        fits = "yes" if estimate.peak / GIB <= SPARE * gpu.memory else "no"
        seconds = estimate.run_flops / (MFU * gpu.peak * 1e12 * ranks)
        yield f"{gpu.name:<14}{gpu.memory:>12}{fits:>6}{show_time(seconds):>26}"
    yield ""
    yield from _list_caveats(config, estimate.model_weights)


def show_flops(flops: float) -> str:
    """Such as "512.3 TFLOP"."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return f"{flops / size:,.1f} {unit}"
    return f"{flops / 1e9:,.1f} GFLOP"


def show_time(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _list_caveats(config: JobConfig, weights: float) -> Iterator[str]:
    training = config.training
    yield "With training.compile, memory is within 5 % of what Llamas of 340M, 1B and 8B took (docs/performance.md)."
    if not training.compile:
        yield "training.compile = false: activations are fitted to a single run."
    if training.compile and training.cuda_graphs and config.world_size == 1 and weights <= MOST_WEIGHTS:
        yield "CUDA graphs, where there is room for them, may keep as much again as a micro-step takes."
    if training.float8 != "none":
        yield f'training.float8 = "{training.float8}": the memory is that of bfloat16.'
    if training.float8_head:
        yield "training.float8_head = true: the memory is that of bfloat16."
    if training.dropout:
        yield f"training.dropout = {training.dropout}: its masks, two bytes for each token, width and layer, are not counted."


def find_shortage(config: JobConfig, model: TrainingModel, device: torch.device) -> str | None:
    """A warning if a run will hardly fit its GPU; None if it fits, without a GPU, or uncompiled."""
    if device.type != "cuda" or not config.training.compile:
        return None
    peak = estimate_rank(config, model).find_peak(keeps_gradients=config.training.gradient_accumulation_steps > 1) / GIB
    there = torch.cuda.get_device_properties(device).total_memory / GIB
    if peak <= SPARE * there:
        return None
    return (
        f"this run needs about {peak:.0f} GiB of a GPU's {there:.0f}: it may run out of memory. Lower training.seq_len, set "
        "activation_checkpoint.mode, or use more GPUs; --estimate shows what takes it"
    )
