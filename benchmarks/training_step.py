"""A step of the trainer in this process, on given packed sequences: what benchmarks take turns with.

It is what `flame.train` runs: the modules under FSDP2 on a mesh of one rank, float32 weights, bfloat16 arithmetic, compiled
layers, the micro-step, clipping and AdamW. Left out is what surrounds a step: data, counts over ranks, logs, checkpoints.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from benchmarks.packs import LONGEST
from benchmarks.timing import CannotRun, Sample, Timing, sample
from flame.attention import flash as flash_kernels
from flame.config.schema import JobConfig
from flame.data.batch import PackedBatch
from flame.models.flops import ModelFlops
from flame.objectives.options import ObjectiveOptions
from flame.objectives.registry import choose_objective
from flame.objectives.step import Requested, get_objective
from flame.runtime.torchtitan import clip_grad_norm_
from flame.trainer.micro_step import Divisors, GraphedMicroStep, MicroStep
from flame.trainer.options import read_options
from flame.trainer.setup import build_model, build_run_optimizer

OUT_OF_MEMORY = "out of memory"
MANY_STEPS = 100_000
"""Length of the run that the steps are the first of."""


def read_step_options(
    model: Path, tokens: int, options: Sequence[str], *, compiled: bool = True, recompute: str = "none"
) -> JobConfig:
    """The checked options of a run of one process whose steps have that many tokens. Its data are never opened.

    Args:
        model: Hugging Face configuration.
        options: further words of the command line.
        recompute: `activation_checkpoint.mode`.

    Raises:
        UserError: as `flame.trainer.options.read_options`.
    """
    words = ["--model.config", str(model), "--model.tokenizer_path", "bytes", "--training.dataset", "stdlib"]
    words += ["--training.seq_len", str(tokens), "--training.context_len", str(min(tokens, LONGEST))]
    words += ["--training.compile", str(compiled).lower(), "--activation_checkpoint.mode", recompute]
    return read_options([*words, *options], 1)


class TrainingStep:
    """Model, optimizer and one packed sequence. Next-token steps leave the objective of the same model unused.

    Raises:
        UserError: the options do not suit the model.
    """

    def __init__(self, model_config: PretrainedConfig, config: JobConfig, mesh: DeviceMesh):
        self.config = config
        on_gpu = mesh.device_type == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.model = build_model(config, model_config, self._device, mesh)
        self.optimizer = build_run_optimizer(config, self.model)
        self.objective = get_objective(self.model)
        kind = choose_objective(config)
        self._options = config.get(kind.options) if kind is not None else None
        if self.objective is not None:
            self.objective.start_new_run(self.model)
        self._launched, self._graphed = MicroStep(self.model), GraphedMicroStep(self.model)
        self._steps = 0
        self.loss = torch.zeros(())

    def take(self, batch: PackedBatch) -> None:
        """Go on with another packed sequence, which is on the CPU."""
        self.batch, self._on_device = batch, batch.to(self._device)
        self._count_items()

    def choose(self, options: ObjectiveOptions) -> None:
        """Go on under other options of the objective that leave its modules as they are, such as `future_encoder.layers`."""
        assert self.objective is not None
        self._options = options
        self.objective.options = options  # type: ignore[assignment]
        self._graphed = GraphedMicroStep(self.model)  # its graphs are of the options before
        self._count_items()

    def _count_items(self) -> None:
        self._num_items = 0 if self.objective is None else self.objective.count(self.batch)

    def step(self, with_aux: bool = True, with_optimizer: bool = True, graphed: bool = False) -> None:
        """One step. Without the optimizer it ends with the backward. With `graphed` the micro-step is a CUDA graph."""
        objective = self.objective if with_aux else None
        prepared = None
        self._steps += 1
        if objective is not None:
            objective.begin_step(self._steps, MANY_STEPS)
            prepared = objective.prepare_step(self.model, [self._on_device])[0]
        weight = self._options.loss_weight if self._options is not None else 0.0
        divisors = Divisors(self.batch.num_labels, self._num_items, weight)
        run = self._graphed.run if graphed else self._launched.run
        self.loss = run(self._on_device, Requested(aux=objective is not None), prepared, divisors)[1]
        if not with_optimizer:
            self.model.zero_grad()
            return
        clip_grad_norm_(self.model.parameters(), self.config.training.max_norm or torch.inf, foreach=True)
        self.optimizer.step()
        if objective is not None:
            objective.after_step(self.model)
        self.optimizer.zero_grad()

    def count_flops(self) -> tuple[float, float]:
        """Of a next-token step over the packed sequence, and of one with the objective's loss."""
        model = ModelFlops(self.model.lm)
        next_token = model.count_next_token(self.batch, is_frozen=False)
        return next_token, next_token + (sum(self.objective.count_flops(self.batch, model)) if self.objective is not None else 0)

    def count_held_gib(self, with_aux: bool = True, with_optimizer: bool = True) -> float:
        """Weights, and the two moments of AdamW: what a run of this kind holds between steps."""
        held = 0
        for parameter in (self.model if with_aux else self.model.lm).parameters():
            copies = 3 if with_optimizer and parameter.requires_grad else 1
            held += copies * parameter.numel() * parameter.element_size()
        return held / 2**30


class Rebuilt:
    """A `TrainingStep` that is built when it is needed, and anew after a failure, which may leave FSDP in the middle of a step.

    Attributes:
        builds: how often it was built.
    """

    def __init__(self, build: Callable[[], TrainingStep]):
        self._build = build
        self._step: TrainingStep | None = None
        self.builds = 0
        self._batch: PackedBatch | None = None

    def take(self, batch: PackedBatch) -> None:
        """Go on with another packed sequence, which is on the CPU."""
        self._batch = batch
        if self._step is not None:
            self._step.take(batch)

    def get(self) -> TrainingStep:
        """Raises: whatever building it does."""
        if self._step is None:
            if self.builds:
                free_memory()
            self.builds += 1
            self._step = self._build()
            if self._batch is not None:
                self._step.take(self._batch)
        return self._step

    def drop(self) -> None:
        self._step = None


class Guard:
    """Samples steps whose failures become words in a table.

    Attributes:
        faults: name of a step -> why it failed, in one line.
        not_finite: names of steps with a loss that was not finite.
    """

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.not_finite: set[str] = set()
        self._warm: dict[str, int] = {}  # name -> which build has run it

    def watch(
        self, name: str, source: Rebuilt, ready: Callable[[TrainingStep], Callable[[], None]], needs: str | None = None
    ) -> Callable[[], Sample]:
        """A sampler for `measure_in_turns`.

        Args:
            ready: called before each sample; returns what is timed.
            needs: a step that does less and holds less. If that ran out of memory, this one is not tried.
        """

        def take() -> Sample:
            if needs is not None and self.faults.get(needs) == OUT_OF_MEMORY:
                self.faults[name] = OUT_OF_MEMORY
                raise CannotRun
            try:
                step = source.get()
                run = ready(step)
                if self._warm.setdefault(name, source.builds) != source.builds:
                    run()  # what was built anew compiles anew, perhaps in the middle of what is timed
                    self._warm[name] = source.builds
                found = sample(run)
                if not step.loss.isfinite():
                    self.not_finite.add(name)
                return found
            except Exception as error:
                source.drop()
                self.faults[name] = describe_fault(error)
                raise CannotRun from None

        return take

    def describe(self, timings: Mapping[str, Timing | None], about: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """What a table needs to know of each step, or why it failed.

        Args:
            about: GiB held between steps, and FLOPs.
        """
        cells: dict[str, Any] = {}
        for name, timing in timings.items():
            if timing is None:
                cells[name] = self.faults[name]
            else:
                held, flops = about[name]
                cells[name] = {"timing": timing._asdict(), "peak_gib": held + timing.added_gib, "flops": flops}
                cells[name]["is_finite"] = name not in self.not_finite
        return cells


def describe_fault(error: Exception) -> str:
    """One line for a cell. The traceback goes to standard error, except where memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    traceback.print_exception(error, file=sys.stderr)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:160]


def free_memory() -> None:
    """Drop what was compiled for, and cached from, models that are gone."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def launch_for(longest: int) -> Iterator[None]:
    """Inside, the flash kernels are launched for documents of up to this many tokens, as with that `training.context_len`.

    In compiled graphs the length is a constant, which only the kernels' launches read. So one graph serves all lengths.
    """

    def call(kernel: Callable, *arguments: object) -> object:
        *others, _, window, scale = arguments
        return kernel(*others, longest, window, scale)

    with (
        patch.object(flash_kernels, "run_forward", partial(call, flash_kernels.run_forward)),
        patch.object(flash_kernels, "run_backward", partial(call, flash_kernels.run_backward)),
    ):
        yield
