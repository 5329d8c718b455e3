"""Training steps at the shape of Llama-3.2-1B on one GPU, beside those of two plain implementations. Prints tables.

    python -m benchmarks.implementations OUT [--lengths 16384,32768,65536]

Ours is what `flame.train` runs: the modules under FSDP2 on a mesh of one rank, float32 weights, bfloat16 arithmetic, compiled
layers, `compute_losses`, clipping and AdamW. The others are those of `benchmarks.prototypes`, without optimizer. For other
trainers see `benchmarks.other_trainers`.

All at a length take turns, except that the dense recipe takes them with ours alone, and where it is not expected to fit it has
the GPU to itself. Times are medians with the range. Peak memory is what a process with nothing else in it would need, without
the allocator's reserve. The same FLOPs are taken for all: those of `flame.models.flops`, against 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from benchmarks.packs import LONGEST, draw_batch
from benchmarks.prototypes import Dense, Planned
from benchmarks.timing import Report, Sample, Timing, measure_in_turns, measure_side_by_side, note, sample
from benchmarks.training_step import TrainingStep, free_memory
from flame.attention import flash as flash_kernels
from flame.config.schema import JobConfig, ObjectiveChoice, Training
from flame.data.batch import PackedBatch
from flame.kernels.softmax_rows import count_chunk_rows
from flame.models.causal_lm import load_model_config
from flame.objectives.future.objective import FutureObjective
from flame.objectives.future.options import FutureOptions
from flame.runtime.distributed import end_processes, set_single_process_defaults, start_processes

REPO = Path(__file__).parent.parent
MODEL = REPO / "configs" / "models" / "llama_1B.json"
PEAK_FLOPS = 989e12
WARMUP = 2
LONGEST_OF_DENSE = 16_384

Prototype = TypeVar("Prototype", Planned, Dense)

OURS_NEXT_TOKEN = "ours, next-token"
OURS_FUTURE = "ours, future"
OURS_NEXT_TOKEN_BARE = "ours, next-token, no optimizer"
OURS_FUTURE_BARE = "ours, future, no optimizer"
OURS_FP8 = "ours, future in fp8"
BODY = "ours, decoder layers of the causal pass alone, no optimizer"
PRODUCTS = "the two matrix products of InfoNCE alone"
OURS_FUTURE_BY_DENSE = "ours, future (in turns with dense)"
OURS_BARE_BY_DENSE = "ours, future, no optimizer (in turns with dense)"
PLANNED_NEXT_TOKEN = "planned prototype, next-token, no optimizer"
PLANNED_FUTURE = "planned prototype, future, no optimizer"
DENSE = "dense recipe, future, no optimizer"


@dataclass
class Step:
    """One row of the table of a length."""

    timing: Timing
    peak_gib: float
    tokens_per_second: float
    mfu: float


@dataclass
class Outcome:
    """Everything measured at one length."""

    length: int
    documents: int
    steps: dict[str, Step | None] = field(default_factory=dict)
    """None: out of memory."""
    ratios: dict[str, float] = field(default_factory=dict)
    future_extra_gib: float | None = None


def count_repeats(length: int) -> int:
    """7 at 16,384 tokens, 5 at 32,768, 3 at 65,536: longer steps vary less."""
    return min(7, max(3, 163_840 // length))


# ---------------------------------------------------------------- who takes part


class Ours(TrainingStep):
    """A step of the trainer on a batch on the CPU, with the future loss, which can be in fp8, or without it."""

    def __init__(self, model_config: PretrainedConfig, config: JobConfig, batch: PackedBatch, mesh: DeviceMesh):
        super().__init__(model_config, config, mesh)
        self.take(batch)
        assert isinstance(self.objective, FutureObjective)
        self._future, self._fp8 = self.objective, self.objective._fp8

    def run(self, with_future: bool, with_optimizer: bool, in_fp8: bool = False) -> None:
        self._future._fp8 = self._fp8 if in_fp8 else None
        self.step(with_future, with_optimizer)

    def step_body(self) -> None:
        """Forward and backward of the causal pass up to the hidden states."""
        self.model(lambda model: model.encode_past(self._on_device).sum()).backward()
        self.model.zero_grad()


# ---------------------------------------------------------------- one length


class Measurement:
    """Measures all steps at one length into an `Outcome`."""

    def __init__(self, length: int, model_config: PretrainedConfig, mesh: DeviceMesh):
        self.length, self.model_config, self.mesh = length, model_config, mesh
        self.batch = draw_batch(length, model_config.vocab_size)
        self.batch_on_gpu = self.batch.to("cuda")
        self.outcome = Outcome(length, len(self.batch.cu_seqlens) - 1)
        self.config = JobConfig(
            training=Training(compile=True, seq_len=length, context_len=min(LONGEST, length)),
            objective=ObjectiveChoice(name="future"),
            extensions={"future_encoder": FutureOptions(precision="fp8")},  # which a step can leave out
        )
        self.flops_next_token = self.flops_future = 0.0

    def run(self) -> Outcome:
        self._measure_ours_and_others()
        free_memory()
        if self.length > LONGEST_OF_DENSE:
            self._try_dense_alone()
            free_memory()
        self._compare()
        return self.outcome

    def _measure_ours_and_others(self) -> None:
        note(f"{self.length}: building")
        ours = Ours(self.model_config, self.config, self.batch, self.mesh)
        self.flops_next_token, self.flops_future = ours.count_flops()
        planned, planned_gib = self._build_held(Planned)

        kinds = {
            OURS_NEXT_TOKEN_BARE: (False, False),
            OURS_FUTURE_BARE: (True, False),
            OURS_NEXT_TOKEN: (False, True),
            OURS_FUTURE: (True, True),
            OURS_FP8: (True, True, True),
        }
        held = {name: ours.count_held_gib(*kind[:2]) for name, kind in kinds.items()}
        held |= dict.fromkeys((PLANNED_NEXT_TOKEN, PLANNED_FUTURE), planned_gib)
        steps: dict[str, Callable[[], None]] = {name: partial(ours.run, *kind) for name, kind in kinds.items()}
        steps |= {BODY: ours.step_body, PRODUCTS: self._multiply_as_infonce()}
        steps |= {PLANNED_NEXT_TOKEN: planned.step_next_token, PLANNED_FUTURE: planned.step}
        samplers: dict[str, Callable[[], Sample]] = {
            name: partial(sample, announce_first(name, step)) for name, step in steps.items()
        }
        timings = measure_in_turns(samplers, count_repeats(self.length), WARMUP)
        allocated, expected = torch.cuda.memory_allocated() / 2**30, held[OURS_FUTURE] + planned_gib
        note(f"held between steps: {allocated:.1f} GiB, of which ours and the prototype's weights are {expected:.1f}")
        for name, timing in timings.items():
            self._add(name, timing, held.get(name))

        if self.length <= LONGEST_OF_DENSE:
            dense, dense_gib = self._build_held(Dense)
            steps = {
                OURS_FUTURE_BY_DENSE: partial(ours.run, True, True),
                OURS_BARE_BY_DENSE: partial(ours.run, True, False),
                DENSE: announce_first(DENSE, dense.step),
            }
            timings = measure_side_by_side(steps, repeats=3, warmup=1)
            self._add(OURS_FUTURE_BY_DENSE, timings[OURS_FUTURE_BY_DENSE], held[OURS_FUTURE])
            self._add(OURS_BARE_BY_DENSE, timings[OURS_BARE_BY_DENSE], held[OURS_FUTURE_BARE])
            self._add(DENSE, timings[DENSE], dense_gib)

    def _multiply_as_infonce(self) -> Callable[[], None]:
        """4 N^2 d FLOPs, in the chunks of the estimator."""
        width = self.model_config.hidden_size
        predictions, summaries = (torch.randn(self.length, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        rows = min(count_chunk_rows(self.length, self.length, torch.bfloat16), self.length)
        scores = torch.empty(rows, self.length, device="cuda", dtype=torch.bfloat16)
        gradient = torch.empty_like(predictions)

        def multiply() -> None:
            for start in range(0, self.length, rows):
                chunk = slice(start, start + rows)
                out = scores[: len(predictions[chunk])]
                torch.mm(predictions[chunk], summaries.t(), out=out)
                torch.mm(out, summaries, out=gradient[chunk])

        return multiply

    def _build_held(self, kind: type[Prototype]) -> tuple[Prototype, float]:
        """Build, and say how many GiB of weights and masks came to stay."""
        before = torch.cuda.memory_allocated()
        built = kind(self.model_config, self.batch_on_gpu)
        return built, (torch.cuda.memory_allocated() - before) / 2**30

    def _try_dense_alone(self) -> None:
        def build_and_step() -> None:
            Dense(self.model_config, self.batch_on_gpu).step()

        note(f"{self.length}: {DENSE}, alone; {torch.cuda.memory_allocated() / 2**30:.1f} GiB held by anything else")
        self._add(DENSE, measure_side_by_side({DENSE: build_and_step}, repeats=1, warmup=1)[DENSE], held_gib=0.0)

    def _add(self, name: str, timing: Timing | None, held_gib: float | None) -> None:
        """Take a row in. Without held_gib it is of a process that holds nothing else."""
        if timing is None:
            self.outcome.steps[name] = None
            return
        peak = timing.peak_gib if held_gib is None else held_gib + timing.added_gib
        seconds = timing.median_ms / 1000
        flops = self.flops_future if "future" in name else self.flops_next_token if name not in (BODY, PRODUCTS) else 0.0
        self.outcome.steps[name] = Step(timing, peak, self.length / seconds, flops / seconds / PEAK_FLOPS)

    def _compare(self) -> None:
        """Ratios of medians; above 1 the first is better, except where it says otherwise."""
        pairs = {
            "tokens/s, ours next-token / planned, both without optimizer": (PLANNED_NEXT_TOKEN, OURS_NEXT_TOKEN_BARE),
            "tokens/s, ours future / planned, both without optimizer": (PLANNED_FUTURE, OURS_FUTURE_BARE),
            "tokens/s, ours future with optimizer / planned without": (PLANNED_FUTURE, OURS_FUTURE),
            "tokens/s, ours future with optimizer / dense without": (DENSE, OURS_FUTURE_BY_DENSE),
            "tokens/s, ours future / dense, both without optimizer": (DENSE, OURS_BARE_BY_DENSE),
            "time, ours future / ours next-token, both with optimizer (cost of the future loss)": (OURS_FUTURE, OURS_NEXT_TOKEN),
            "time, ours future in fp8 / ours next-token, both with optimizer": (OURS_FP8, OURS_NEXT_TOKEN),
            "time, ours future / ours next-token, both without optimizer": (OURS_FUTURE_BARE, OURS_NEXT_TOKEN_BARE),
            "time, planned future / planned next-token": (PLANNED_FUTURE, PLANNED_NEXT_TOKEN),
        }
        for title, names in pairs.items():
            upper, lower = map(self.outcome.steps.get, names)
            if upper and lower:
                self.outcome.ratios[title] = upper.timing.median_ms / lower.timing.median_ms
        plain, body, products = map(self.outcome.steps.get, (OURS_NEXT_TOKEN_BARE, BODY, PRODUCTS))
        if plain and body and products:
            floor = 1 + (body.timing.median_ms / 3 + products.timing.median_ms) / plain.timing.median_ms
            self.outcome.ratios["time, floor of it: (body + CE + body / 3 + 4 N^2 d) / (body + CE)"] = floor
        with_future, without = map(self.outcome.steps.get, (OURS_FUTURE, OURS_NEXT_TOKEN))
        if with_future and without:
            self.outcome.future_extra_gib = with_future.peak_gib - without.peak_gib


def announce_first(name: str, step: Callable[[], None]) -> Callable[[], None]:
    """The same step, with a note before its first call, which compiles."""
    pending = [name]

    def announced() -> None:
        if pending:
            note(f"first step of: {pending.pop()}")
        step()

    return announced


# ---------------------------------------------------------------- what is shown


def show(outcome: Outcome, report: Report) -> None:
    rows = []
    for name, step in outcome.steps.items():
        if step is None:
            rows.append([name, "out of memory", "-", "-", "-"])
        else:
            rows.append(
                [name, step.timing.show(), f"{step.peak_gib:.1f}", f"{step.tokens_per_second:,.0f}", f"{100 * step.mfu:.1f}"]
            )
    title = f"### {outcome.length:,} tokens in {outcome.documents} documents"
    report.table(title, ["step", "ms [low, high]", "peak GiB", "tokens/s", "MFU %"], rows)
    comparisons = [[title, f"{ratio:.3f}"] for title, ratio in outcome.ratios.items()]
    if outcome.future_extra_gib is not None:
        comparisons.append(["peak memory that the future loss adds, GiB", f"{outcome.future_extra_gib:.1f}"])
    report.table(f"Compared, {outcome.length:,} tokens:", ["what", "ratio"], comparisons)


def read_lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Training steps beside those of others.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for implementations.md and implementations.json")
    parser.add_argument("--lengths", type=read_lengths, default="16384,32768,65536", help="tokens in a step, separated by commas")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")

    # More than one model runs the same layers' code here, and beyond the limit it would go on uncompiled.
    torch._dynamo.config.recompile_limit = 64
    set_single_process_defaults()
    _, mesh = start_processes(Training(), timeout_seconds=600)
    model_config = load_model_config(str(MODEL))
    report = Report(arguments.out / "implementations.md")
    attention = flash_kernels.describe(model_config.head_dim)
    report.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {MODEL.stem}, {attention}")
    outcomes = []
    for length in arguments.lengths:
        outcomes.append(Measurement(length, model_config, mesh).run())
        show(outcomes[-1], report)
        (arguments.out / "implementations.json").write_text(json.dumps([as_json(outcome) for outcome in outcomes], indent=1))
    note("done")
    end_processes()


def as_json(outcome: Outcome) -> dict:
    """As fields by name, timings too."""
    numbers = asdict(outcome)
    for name, step in outcome.steps.items():
        if step is not None:
            numbers["steps"][name]["timing"] = step.timing._asdict()
    return numbers


if __name__ == "__main__":
    main(sys.argv[1:])
