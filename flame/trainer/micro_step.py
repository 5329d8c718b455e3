"""A micro-step: forward and backward of one packed sequence. On small models it is a CUDA graph.

A step of a small model launches hundreds of short kernels. Python takes longer to launch them than the GPU to run them. A CUDA
graph launches all of a micro-step at once. It repeats what was launched when it was captured: the same kernels on the same
memory. So whatever differs from one packed sequence to the next must be a tensor, which is copied into the graph's own.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from torch.utils._pytree import tree_map

from flame.attention.backends import choose_attention
from flame.attention.families import find_family
from flame.config.schema import JobConfig
from flame.data.batch import PackedBatch
from flame.data.buckets import round_up_to_bucket
from flame.errors import UserError
from flame.models.parallelize import find_compute_dtype
from flame.models.wrapper import TrainingModel
from flame.objectives.base import Objective
from flame.objectives.gradients import reshard_weights
from flame.objectives.step import Losses, Requested, compute_losses, get_objective

logger = logging.getLogger("flame")


class Divisors(NamedTuple):
    """How the sums of a packed sequence become its part of the step's loss."""

    labels: int
    """Of the step, over micro-steps and ranks."""
    aux: int
    """The objective's items, likewise."""
    weight: float
    """Of the objective's loss."""


class MicroStep:
    """Runs micro-steps by launching their kernels one by one.

    Args:
        model: its weights' gradients grow by each micro-step.
    """

    makes_graphs = False

    def __init__(self, model: TrainingModel):
        self._model = model
        self.graph_bytes = 0
        """Memory that CUDA graphs hold, also between steps. torch does not count it as allocated."""
        self.replays = 0
        """Micro-steps so far that were a CUDA graph."""

    def run(self, batch: PackedBatch, requested: Requested, prepared: Any, divisors: Divisors) -> tuple[Losses, Tensor]:
        """Run a micro-step without waiting for the device.

        Args:
            batch: on the device.
            prepared: as for `compute_losses`.

        Returns:
            losses of the packed sequence, and its part of the step's loss, 0-d, without gradient.
        """
        losses = self._model(compute_losses, batch, requested, prepared)
        loss = torch.zeros((), device=batch.input_ids.device)
        if losses.ce_sum is not None:
            loss = loss + losses.ce_sum / max(divisors.labels, 1)
        if losses.aux is not None:
            loss = loss + divisors.weight * losses.aux.loss_sum / max(divisors.aux, 1)
        with record_function("backward"):
            loss.backward()
        return tree_map(_detach, losses), loss.detach()


class _Unknown:
    """Stands for a number of a packed sequence inside a graph, where it would be the same for all sequences."""

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *_: object) -> NoReturn:
        raise AssertionError(f"PackedBatch.{self._name} is read inside a CUDA graph, which would keep it: pass it as a tensor")

    __int__ = __index__ = __float__ = __bool__ = __len__ = __iter__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = _refuse
    __eq__ = __ne__ = __hash__ = __lt__ = __le__ = __gt__ = __ge__ = __str__ = __format__ = __getitem__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # FSDP asks of everything whether it holds tensors
            raise AttributeError(name)
        self._refuse()


class _Scales(NamedTuple):
    """Factors of the sums, float32 0-d. A quotient by a Python number is, on GPUs, a product with its inverse."""

    labels: Tensor
    aux: Tensor
    weight: Tensor


class _Kind(NamedTuple):
    """What a graph is captured for."""

    sizes: tuple[int, ...]
    """Entries of each tensor of the packed sequence, after padding, and `num_predicted`."""
    requested: Requested


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    losses: Losses
    loss: Tensor
    trained: Sequence[nn.Parameter]
    """Those that have a gradient."""


FEWEST_BOUNDS = 16
"""Flash kernels take a moment for each empty document, so graphs for few documents have few."""
KNOWN = ("answers_only", "num_predicted")
"""Numbers of a packed sequence that a graph may keep: the same for all of its kind."""
WARM_UP = 2
"""Micro-steps of a kind that are launched one by one before its graph is captured: they compile, and allocate what stays."""
SYNCHRONIZES = "synchronizing CUDA operation"
"""In torch's warnings of a wait."""
MOST_GRAPHS = 24
"""Of other kinds, kernels are launched one by one."""


class GraphedMicroStep(MicroStep):
    """Runs micro-steps as CUDA graphs: one for each bucket of documents in a packed sequence, with and without the objective.

    All graphs add to the same gradients, which stay where they are from step to step. They share their working memory, which is
    theirs alone.
    """

    makes_graphs = True

    def __init__(self, model: TrainingModel):
        super().__init__(model)
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._scales: _Scales | None = None
        self._warm: Counter[_Kind] = Counter()
        self._trained: dict[_Kind, Sequence[nn.Parameter]] = {}
        self._graphs: dict[_Kind, _Graph] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._working_bytes = 0
        self._is_left_out = False
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def run(self, batch: PackedBatch, requested: Requested, prepared: Any, divisors: Divisors) -> tuple[Losses, Tensor]:
        if prepared is not None:
            return super().run(batch, requested, prepared, divisors)
        # After a forward without a backward, as in validation, FSDP shows gathered weights until something reshards them. A
        # replay would not, and a capture would leave their gathering out.
        reshard_weights(self._model)
        batch = pad_documents(batch)
        kind = _find_kind(batch, requested)
        with self._on_own_stream():
            if kind in self._graphs:
                return self._replay(self._graphs[kind], batch, divisors)
            if self._warm[kind] < WARM_UP:
                return self._warm_up(kind, batch, divisors)
            if not self._may_capture():
                return super().run(batch, requested, None, divisors)
            self._graphs[kind] = self._capture(kind, batch)
            return self._replay(self._graphs[kind], batch, divisors)

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """The stream on which graphs are captured. A backward in a graph must not wait for launches on another one."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _warm_up(self, kind: _Kind, batch: PackedBatch, divisors: Divisors) -> tuple[Losses, Tensor]:
        """Launch a micro-step, and note which weights it gives a gradient."""
        self._warm[kind] += 1
        held = torch.cuda.memory_allocated()
        parameters = list(self._model.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        peak = torch.cuda.max_memory_allocated()
        with _watch_for_waits() as waits:
            found = super().run(batch, kind.requested, None, divisors)
        if waits and self._warm[kind] == WARM_UP:  # the first one compiles, which may wait
            self._leave_out(f"this model's step waits for the GPU ({waits[0]})")
        if torch.cuda.max_memory_allocated() > peak or not self._working_bytes:  # else the peak was that of something else
            self._working_bytes = max(self._working_bytes, torch.cuda.max_memory_allocated() - held)
        self._trained[kind] = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, before, strict=True):
            if gradient is not None and parameter.grad is not None:
                _get_local(gradient).add_(_get_local(parameter.grad))
            parameter.grad = parameter.grad if gradient is None else gradient
        return found

    def _may_capture(self) -> bool:
        """Whether another graph fits beside what is still launched one by one, such as validation, and takes as much memory."""
        if self._is_left_out or len(self._graphs) == MOST_GRAPHS:
            return False
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < 2 * self._working_bytes:
            taken = f"a micro-step takes up to {self._working_bytes / 2**30:.1f}, and a graph keeps as much"
            self._leave_out(f"{free / 2**30:.1f} GiB are free, {taken}")
        return not self._is_left_out

    def _leave_out(self, reason: str) -> None:
        logger.info("no %sCUDA graphs: %s", "more " if self._graphs else "", reason)
        self._is_left_out = True

    def _capture(self, kind: _Kind, batch: PackedBatch) -> _Graph:
        """Record a micro-step, which does not run it."""
        trained = self._trained[kind]
        for parameter in trained:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(parameter)
        before = {parameter: parameter.grad for parameter in trained}
        for parameter in trained:
            parameter.grad = self._gradients[parameter]
        scales, inside = self._find_scales(batch.input_ids.device), self._find_inputs(batch)
        torch.cuda.synchronize()  # a fault of earlier kernels is none of the graph's
        reserved, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        try:
            # The loader's thread may allocate page-locked memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                losses, loss = self._record(inside, kind.requested, scales)
        except RuntimeError as error:
            first = _find_first(error)
            if isinstance(first, AssertionError):
                raise first from None
            # FSDP takes what was recorded for done, so the run cannot go on from here without the graph.
            if isinstance(first, torch.OutOfMemoryError):
                reason = "memory has run out while a micro-step became a CUDA graph, whose memory is its own"
            else:
                reason = f"this model's step cannot become a CUDA graph ({str(first).splitlines()[0]})"
            raise UserError(f"training.cuda_graphs = true: {reason}: set it to false") from error
        if not self._graphs:
            logger.info("from now on micro-steps are CUDA graphs (docs/performance.md#small-models)")
        self.graph_bytes += torch.cuda.memory_reserved() - reserved
        for parameter, gradient in before.items():
            parameter.grad = gradient
        return _Graph(graph, tree_map(_detach, losses), loss.detach(), trained)

    def _record(self, batch: PackedBatch, requested: Requested, scales: _Scales) -> tuple[Losses, Tensor]:
        losses = self._model(compute_losses, batch, requested, None)
        loss = torch.zeros((), device=scales.labels.device)
        if losses.ce_sum is not None:
            loss = loss + losses.ce_sum * scales.labels
        if losses.aux is not None:
            loss = loss + losses.aux.loss_sum * scales.weight * scales.aux
        loss.backward()
        return losses, loss

    def _replay(self, captured: _Graph, batch: PackedBatch, divisors: Divisors) -> tuple[Losses, Tensor]:
        inside = self._find_inputs(batch)
        for name, tensor in _list_tensors(batch):
            getattr(inside, name).copy_(tensor)
        values = _invert(divisors.labels), _invert(divisors.aux), divisors.weight
        for scale, value in zip(self._find_scales(batch.input_ids.device), values, strict=True):
            scale.fill_(value)
        self._take_gradients(captured.trained)
        captured.graph.replay()
        self.replays += 1
        return tree_map(_copy, captured.losses), captured.loss.clone()

    def _take_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the weights' gradients, so far in the step, be those that graphs add to."""
        new = [parameter for parameter in parameters if parameter.grad is None]
        if new:
            torch._foreach_zero_([_get_local(self._gradients[parameter]) for parameter in new])
        for parameter in parameters:
            gradient = self._gradients[parameter]
            if parameter.grad is not None and parameter.grad is not gradient:
                _get_local(gradient).copy_(_get_local(parameter.grad))
            parameter.grad = gradient

    def _find_inputs(self, batch: PackedBatch) -> PackedBatch:
        """The graph's own tensors for packed sequences of these shapes, in a batch whose numbers cannot be read."""
        own = {}
        for name, tensor in _list_tensors(batch):
            key = name, tensor.numel()
            if key not in self._inputs:
                self._inputs[key] = tensor.clone()
            own[name] = self._inputs[key]
        known = {*own, *KNOWN, *(each.name for each in fields(batch) if getattr(batch, each.name) is None)}
        unknown = {each.name: _Unknown(each.name) for each in fields(batch) if each.name not in known}
        return replace(batch, **own, **unknown)  # type: ignore[arg-type]

    def _find_scales(self, device: torch.device) -> _Scales:
        if self._scales is None:
            self._scales = _Scales(*(torch.ones((), device=device) for _ in _Scales._fields))
        return self._scales


@contextmanager
def _watch_for_waits() -> Iterator[list[str]]:
    """Inside, note by which lines of code the process waits for the GPU. A graph cannot."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    before, own_thread = torch.cuda.get_sync_debug_mode(), threading.get_ident()

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if SYNCHRONIZES not in str(message):
            show(message, category, filename, lineno, file, line)
        elif threading.get_ident() == own_thread:  # others, such as one that saves a checkpoint, may wait
            found.append(f"{Path(filename).name}, line {lineno}")

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=f".*{SYNCHRONIZES}")
            show, warnings.showwarning = warnings.showwarning, note
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _find_first(error: BaseException) -> BaseException:
    """What has ended a capture. Ending it may raise too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _invert(count: int) -> float:
    """In float32, as a quotient on the GPU."""
    return float(np.float32(1) / np.float32(max(count, 1)))


def _fits_graph(objective: Objective) -> bool:
    """A class that is derived from one that fits has to say so again: it may do something else."""
    return "fits_graph" in vars(type(objective)) and objective.fits_graph


TRIED = ("llama",)
"""Types of models whose runs were seen to be the same with graphs and without."""
MOST_WEIGHTS = 150_000_000
"""Of larger language models the kernels take longer than their launches."""


def choose_micro_step(config: JobConfig, model: TrainingModel, device: torch.device) -> MicroStep:
    """By `training.cuda_graphs`, unless the run does not allow graphs: then the log says why."""
    if not (config.training.cuda_graphs and config.training.compile):
        return MicroStep(model)
    obstacle = next(list_obstacles(config, model, device), None)
    if obstacle is None:
        return GraphedMicroStep(model)
    logger.info("no CUDA graphs (training.cuda_graphs): %s", obstacle)
    return MicroStep(model)


def list_obstacles(config: JobConfig, model: TrainingModel, device: torch.device) -> Iterator[str]:
    """Why micro-steps cannot be CUDA graphs. In one, no kernel may wait for the CPU, draw by torch's generators, or depend on
    numbers of the packed sequence other than those in its tensors."""
    training, lm, objective = config.training, model.lm, get_objective(model)
    if device.type != "cuda":
        yield "there is no GPU"
        return
    if config.world_size > 1:
        yield "there is more than one rank"
    weights = sum(weight.numel() for weight in lm.parameters())
    if weights > MOST_WEIGHTS:
        yield f"the language model has {weights / 1e6:,.0f} million weights, more than {MOST_WEIGHTS / 1e6:.0f}"
    if choose_attention(lm.config, device.type, find_compute_dtype(training, device.type)) != "varlen":
        yield "attention takes no flash kernel"
    if lm.config.model_type not in TRIED or find_family(lm.config) is None or config.experimental.custom_model_path:
        yield f'they were not tried with models like this one (model_type "{lm.config.model_type}"), but with {", ".join(TRIED)}'
    if training.loss_on != "all":
        yield f'they were not tried with training.loss_on = "{training.loss_on}"'
    if config.profiling.trace_steps or config.profiling.memory_history:
        yield "kernels in one have no names for profiling.trace_steps or profiling.memory_history"
    if config.activation_checkpoint.mode != "none":
        yield f'activation_checkpoint.mode = "{config.activation_checkpoint.mode}"'
    for name in ("dropout", "cpu_offload", "float8", "float8_head"):
        if getattr(training, name) not in (0, "none"):
            yield f"training.{name} is used"
    if config.experimental.freeze_lm_for_infonce:
        yield "experimental.freeze_lm_for_infonce = true"
    if objective is not None and not _fits_graph(objective):
        yield f"{objective.name}, with its options, does not fit into one"


def _find_kind(batch: PackedBatch, requested: Requested) -> _Kind:
    return _Kind((*(tensor.numel() for _, tensor in _list_tensors(batch)), batch.num_predicted), requested)


def pad_documents(batch: PackedBatch) -> PackedBatch:
    """Put empty documents before the first one, so that packed sequences have few different numbers of documents."""
    suffixes = None if batch.suffix_cu_seqlens is None else _pad_bounds(batch.suffix_cu_seqlens, batch.input_ids.shape[1])
    return replace(batch, cu_seqlens=_pad_bounds(batch.cu_seqlens, batch.input_ids.shape[1]), suffix_cu_seqlens=suffixes)


def _pad_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    count = len(cu_seqlens)
    return F.pad(cu_seqlens, (round_up_to_bucket(count, tokens + FEWEST_BOUNDS, FEWEST_BOUNDS) - count, 0))


def _list_tensors(batch: PackedBatch) -> list[tuple[str, Tensor]]:
    values = [(each.name, getattr(batch, each.name)) for each in fields(batch)]
    return [(name, value) for name, value in values if isinstance(value, Tensor)]


def _get_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
