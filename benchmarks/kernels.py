"""The parts of a step that are more than a matrix product, each beside what it cannot beat or what else does it. Prints a table.

    python -m benchmarks.kernels OUT [--tokens 65536] [--repeats 7]

Width 2048, vocabulary 128,256, as in Llama-3.2-1B. A loss has a floor: its matrix products alone, of operands of the size of the
real ones, in the same chunks and with outputs allocated beforehand. A loss and its floor take turns, so that heat and the power
limit are shared. TFLOP/s count the same work for a loss, its floor and its peers; for attention they count the allowed pairs.
Liger-Kernel and flash-linear-attention take part where they are installed. What cannot run is named in a note.
Shape legend: T tokens, N = T candidates, d width, V vocabulary, c rows of a chunk, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.packs import LONGEST, draw_batch
from benchmarks.timing import Function, Report, Timing, measure_side_by_side
from flame.attention import flash as flash_kernels
from flame.attention.kernel_masks import _mask_mod, build_block_mask
from flame.attention.masks import find_anchors, find_neighbors
from flame.attention.varlen import DocumentLayout, attend, varlen_attention
from flame.data.batch import PackedBatch
from flame.kernels.cross_entropy import _add_product_, linear_cross_entropy
from flame.kernels.softmax_rows import count_chunk_rows
from flame.models.mi_estimator import InfoNCEEstimator

START = time.perf_counter()
WIDTH = 2048
VOCABULARY = 128_256
TEMPERATURE = 0.1
NEIGHBORS = 64
HEADS = ((32, 8, 64), (16, 8, 128))
WEIGHT_STD = 0.02
DTYPE = torch.bfloat16
CALLS = 10
"""Of a function of about a millisecond, one after the other: the launches are then hidden, as in a step."""
REPEATS_OF_FLA = 2
SUSTAINED_SECONDS = 1.5
LONGEST_NOTE = 200
SUSTAINED_SHAPE = (65_536, 2048, 8192)


@dataclass
class Row:
    """One row of the table."""

    what: str
    timing: Timing | None
    """None: out of memory."""
    flops: float | None = None
    floor: Timing | None = None

    def as_cells(self) -> list[str]:
        if self.timing is None:
            return [self.what, "out of memory", "-", "-", "-"]
        floor, ratio, rate = "-", "-", "-"
        if self.floor is not None:
            floor, ratio = show_ms(self.floor), f"{self.timing.median_ms / self.floor.median_ms:.3f}"
        if self.flops is not None:
            rate = f"{self.flops / self.timing.median_ms / 1e9:,.0f}"
        return [self.what, show_ms(self.timing), floor, ratio, rate]


def show_ms(timing: Timing) -> str:
    digits = 1 if timing.median_ms >= 10 else 3
    median, low, high = (f"{ms:,.{digits}f}" for ms in timing[:3])
    return f"{median} [{low}, {high}]"


@dataclass
class Bench:
    """What the sections measure on, and what they found."""

    batch: PackedBatch
    repeats: int
    width: int = WIDTH
    vocabulary: int = VOCABULARY
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.batch.input_ids.shape[1]

    @property
    def segment_ids(self) -> Tensor:
        return self.batch.segment_ids[0]

    def draw(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.batch.input_ids.device, dtype=DTYPE).mul_(std)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        note(" | ".join(row.as_cells()))

    def add_note(self, text: str) -> None:
        self.notes.append(text)
        note(text)

    def measure(self, functions: Mapping[str, Function], calls: int = 1, repeats: int = 0) -> dict[str, Timing | None]:
        """Times of one call, in turns. A function that raises an exception is left out, with a note."""
        working = {}
        for name, function in functions.items():
            with self.guard(name):
                function()  # compiles too
                working[name] = partial(call_again, function, calls)
        timings = measure_side_by_side(working, repeats or self.repeats, warmup=1)
        return {name: timing and divide(timing, calls) for name, timing in timings.items()}

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """An exception becomes a note. Memory is let go of."""
        try:
            yield
            return
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0][:LONGEST_NOTE]
            self.add_note(f"{what}: {type(error).__name__}: {first_line}")
        free_memory()  # only here has the traceback let go of the tensors


def free_memory() -> None:
    gc.collect()
    with suppress(RuntimeError):  # of a kernel that failed before
        torch.cuda.empty_cache()


def call_again(function: Function, calls: int) -> None:
    for _ in range(calls):
        function()


def divide(timing: Timing, calls: int) -> Timing:
    return timing._replace(median_ms=timing.median_ms / calls, low_ms=timing.low_ms / calls, high_ms=timing.high_ms / calls)


def note(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- losses


def fill_with_probabilities(buffer: Tensor, logit_std: float) -> Tensor:
    """Softmax of normal logits: what a loss multiplies by, but for one entry of each row."""
    buffer.normal_(std=logit_std).exp_()
    return buffer.mul_(1 / (buffer.shape[1] * torch.tensor(logit_std**2 / 2).exp().item()))


class ContrastProducts:
    """The two products of InfoNCE, x @ y.T and P @ y, with x and y [N, d]."""

    def __init__(self, x: Tensor, y: Tensor, temperature: float):
        self.x, self.y = (F.normalize(vectors.float(), dim=-1).to(vectors.dtype) for vectors in (x, y))
        self.rows = count_chunk_rows(len(x), len(x), x.dtype)
        self.scores = x.new_empty(min(self.rows, len(x)), len(x))
        self.probs = fill_with_probabilities(torch.empty_like(self.scores), x.shape[1] ** -0.5 / temperature)
        self.grad_x = torch.empty_like(self.x)

    def __call__(self) -> None:
        for start in range(0, len(self.x), self.rows):
            chunk = slice(start, start + self.rows)
            x = self.x[chunk]
            torch.mm(x, self.y.t(), out=self.scores[: len(x)])
            torch.mm(self.probs[: len(x)], self.y, out=self.grad_x[chunk])


def measure_contrast(bench: Bench) -> None:
    x, y = bench.draw(bench.tokens, bench.width).requires_grad_(), bench.draw(bench.tokens, bench.width)
    valid = find_anchors(bench.segment_ids, target_shift=1)
    estimator = InfoNCEEstimator(bench.width, TEMPERATURE)

    def with_all() -> object:
        return torch.autograd.grad(estimator.compare(x, y, valid).loss_sum, x)

    def without_neighbors() -> object:
        excluded = find_neighbors(bench.segment_ids, NEIGHBORS)
        return torch.autograd.grad(estimator.compare(x, y, valid, excluded).loss_sum, x)

    names = {
        "InfoNCE, forward + backward": with_all,
        f"InfoNCE with exclude_neighbors = {NEIGHBORS}, forward + backward": without_neighbors,
    }
    timings = bench.measure(names | {"floor of InfoNCE": ContrastProducts(x.detach(), y, TEMPERATURE)})
    floor = timings.pop("floor of InfoNCE", None)
    for name, timing in timings.items():
        bench.add(Row(name, timing, 4 * bench.tokens**2 * bench.width, floor))


class CrossEntropyProducts:
    """The three products of the cross entropy, h @ w.T, G @ w and G.T @ h, with h [T, d] and w [V, d]; the last in float32."""

    def __init__(self, hidden_states: Tensor, weight: Tensor):
        self.hidden_states, self.weight = hidden_states, weight
        self.rows = count_chunk_rows(len(hidden_states), len(weight), hidden_states.dtype)
        self.logits = hidden_states.new_empty(min(self.rows, len(hidden_states)), len(weight))
        self.grad_logits = fill_with_probabilities(torch.empty_like(self.logits), WEIGHT_STD * weight.shape[1] ** 0.5)
        self.grad_hidden = torch.empty_like(hidden_states)
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32)

    def __call__(self) -> None:
        for start in range(0, len(self.hidden_states), self.rows):
            chunk = slice(start, start + self.rows)
            hidden_states = self.hidden_states[chunk]
            grad_logits = self.grad_logits[: len(hidden_states)]
            torch.mm(hidden_states, self.weight.t(), out=self.logits[: len(hidden_states)])
            torch.mm(grad_logits, self.weight, out=self.grad_hidden[chunk])
            _add_product_(self.grad_weight, grad_logits.t(), hidden_states)


def measure_cross_entropy(bench: Bench) -> None:
    hidden_states = bench.draw(bench.tokens, bench.width).requires_grad_()
    weight = bench.draw(bench.vocabulary, bench.width, std=WEIGHT_STD).requires_grad_()
    labels = bench.batch.labels[0]

    def differentiated(loss: Callable[[], Tensor]) -> Function:
        return lambda: torch.autograd.grad(loss(), (hidden_states, weight))

    losses = {"cross entropy": differentiated(lambda: linear_cross_entropy(hidden_states, weight, labels))}
    with bench.guard("Liger-Kernel"):
        liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
        losses["cross entropy of Liger-Kernel"] = differentiated(lambda: liger.apply(hidden_states, weight, labels)[0])
    slow_losses = {}
    with bench.guard("flash-linear-attention"):
        fla = importlib.import_module("fla.modules.fused_linear_cross_entropy").FusedLinearCrossEntropyLoss()
        slow_losses["cross entropy of flash-linear-attention"] = differentiated(lambda: fla(hidden_states, labels, weight))

    floor_name = "floor of the cross entropy"
    products = CrossEntropyProducts(hidden_states.detach(), weight.detach())
    for functions, repeats in ((losses, bench.repeats), (slow_losses, min(REPEATS_OF_FLA, bench.repeats))):
        if not functions:
            continue
        timings = bench.measure({**functions, floor_name: products}, repeats=repeats)
        floor = timings.pop(floor_name, None)
        for name, timing in timings.items():
            flops = 6 * bench.tokens * bench.width * bench.vocabulary
            bench.add(Row(f"{name}, forward + backward", timing, flops, floor))


# ---------------------------------------------------------------- masks and attention


def measure_masks(bench: Bench) -> None:
    compiled = torch.compile(create_block_mask, dynamic=False)
    segment_ids, total = bench.segment_ids, bench.tokens
    rules = [_mask_mod(segment_ids, direction, 0) for direction in ("causal", "future")]
    functions = {
        "BlockMasks of both directions, build_block_mask": lambda: [
            build_block_mask(segment_ids, direction) for direction in ("causal", "future")
        ],
        "BlockMasks of both directions, compiled create_block_mask": lambda: [
            compiled(rule, None, None, total, total, device=segment_ids.device.type) for rule in rules
        ],
    }
    for name, timing in bench.measure(functions, CALLS).items():
        bench.add(Row(name, timing))


def as_heads(states: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D], a view: as the layers of a model hand it over."""
    return states.transpose(0, 1)[None]


class AttentionInputs:
    """Random q [T, H, D], k and v [T, K, D] that require gradients, and the gradient of the output."""

    def __init__(self, bench: Bench, heads: int, key_heads: int, head_width: int):
        widths = (heads, key_heads, key_heads)
        self.states = tuple(bench.draw(bench.tokens, count, head_width).requires_grad_() for count in widths)
        self.grad_out = bench.draw(bench.tokens, heads, head_width)
        self.scale = head_width**-0.5
        self.cu_seqlens = bench.batch.cu_seqlens
        self.reversed_cu_seqlens = bench.tokens - self.cu_seqlens.flip(0)
        self.masks = {direction: build_block_mask(bench.segment_ids, direction) for direction in ("causal", "future")}
        self.flex = torch.compile(flex_attention, dynamic=False)

    def ours(self) -> Tensor:
        return varlen_attention(*self.states, self.cu_seqlens, LONGEST, -1, self.scale)[0]

    def ours_backward(self) -> object:
        return torch.autograd.grad(self.ours(), self.states, self.grad_out)

    def aten(self) -> tuple[Tensor, ...]:
        q, k, v = (states.detach() for states in self.states)
        cu = self.cu_seqlens
        return torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, LONGEST, LONGEST, 0.0, True, False)

    def aten_backward(self) -> object:
        q, k, v = (states.detach() for states in self.states)
        cu = self.cu_seqlens
        out, lse, *random_state = self.aten()[:4]
        return torch.ops.aten._flash_attention_backward(
            self.grad_out, q, k, v, out, lse, cu, cu, LONGEST, LONGEST, 0.0, True, *random_state
        )

    def flex_causal(self) -> Tensor:
        q, k, v = map(as_heads, self.states)
        return self.flex(q, k, v, block_mask=self.masks["causal"], enable_gqa=True)

    def flex_causal_backward(self) -> object:
        return torch.autograd.grad(self.flex_causal(), self.states, as_heads(self.grad_out))

    @torch.no_grad()
    def ours_future(self, attend_: Callable[..., tuple[Tensor, None]] = attend) -> Tensor:
        """Of the reversed pack, whose documents come in the opposite order."""
        q, k, v = map(as_heads, self.states)
        return attend_(None, q, k, v, None, documents=DocumentLayout(self.reversed_cu_seqlens, LONGEST, True))[0]

    @torch.no_grad()
    def flex_future(self) -> Tensor:
        q, k, v = map(as_heads, self.states)
        return self.flex(q, k, v, block_mask=self.masks["future"], enable_gqa=True)


def deterministically(function: Callable[[], object]) -> Callable[[], object]:
    """Called as under `training.deterministic`."""

    def call() -> object:
        torch.use_deterministic_algorithms(True)
        try:
            return function()
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def measure_attention(bench: Bench, heads: int, key_heads: int, head_width: int) -> None:
    inputs = AttentionInputs(bench, heads, key_heads, head_width)
    ours, shape = f"varlen_attention ({flash_kernels.describe(head_width)})", f"{heads}/{key_heads} heads x {head_width}"
    lengths = bench.batch.cu_seqlens.diff().long().cpu()
    causal_pairs, future_pairs = (int((lengths * (lengths + diagonal)).sum()) // 2 for diagonal in (1, -1))
    flops_of_pair = 4 * heads * head_width
    groups: tuple[tuple[str, float, int, dict[str, Callable[[], object]]], ...] = (
        ("causal forward", 1.0, causal_pairs, {
            ours: inputs.ours,
            "aten's flash kernel": inputs.aten,
            "compiled flex_attention": inputs.flex_causal,
        }),
        ("causal forward + backward", 3.5, causal_pairs, {
            ours: inputs.ours_backward,
            "aten's flash kernel": inputs.aten_backward,
            "compiled flex_attention": inputs.flex_causal_backward,
        }),
        ("causal forward + backward, deterministic", 3.5, causal_pairs, {
            ours: deterministically(inputs.ours_backward),
            "aten's flash kernel": deterministically(inputs.aten_backward),
        }),
        ("anti-causal forward", 1.0, future_pairs, {
            f"attend over {ours}": inputs.ours_future,
            "the same, compiled as in a model": partial(inputs.ours_future, torch.compile(attend, dynamic=False)),
            "compiled flex_attention": inputs.flex_future,
        }),
    )  # fmt: skip
    for kind, factor, pairs, functions in groups:
        timings = bench.measure({f"attention {shape}, {kind}: {name}": call for name, call in functions.items()}, CALLS)
        for name, timing in timings.items():
            bench.add(Row(name, timing, factor * flops_of_pair * pairs))


# ---------------------------------------------------------------- the machine


class Reading:
    """What the driver says every 20 ms: SM clock in MHz, power in W, and why the clock is held back (bits of NVML)."""

    def __init__(self, pynvml, device: int = 0):
        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.readings: list[tuple[int, float, int]] = []

    def _read(self) -> None:
        nvml, handle = self._nvml, self._handle
        while not self._stop.wait(0.02):
            clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            power = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            self.readings.append((clock, power, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))

    def __enter__(self) -> Reading:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def show(self) -> str:
        """Medians of the second half, when clock and power have settled; every reason that was given in it."""
        settled = self.readings[len(self.readings) // 2 :]
        if not settled:
            return "the driver gave no readings"
        clocks, powers, reasons = zip(*settled, strict=True)
        held_back = 0
        for reason in reasons:
            held_back |= reason
        return f"{statistics.median(clocks):,.0f} MHz, {statistics.median(powers):,.0f} W, throttle reasons {held_back:#x}"


def run_sustained(function: Function, seconds: float) -> list[float]:
    """Milliseconds of calls in a row that never leave the GPU without work: of one call, averaged over 20, again and again."""
    events = [torch.cuda.Event(enable_timing=True)]
    function()
    torch.cuda.synchronize()
    events[0].record()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call_again(function, 20)
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        events[-2].synchronize()  # one batch runs while the next is queued
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 20 for a, b in pairwise(events)]


def measure_machine(bench: Bench) -> None:
    m, k, n = SUSTAINED_SHAPE
    a, b, out = bench.draw(m, k), bench.draw(k, n), bench.draw(m, n)
    reading = None
    with bench.guard("SM clock and power"):
        reading = Reading(importlib.import_module("pynvml"))
    product = partial(torch.mm, a, b, out=out)
    if reading is None:
        times = run_sustained(product, SUSTAINED_SECONDS)
    else:
        with reading:
            times = run_sustained(product, SUSTAINED_SECONDS)
    settled = times[len(times) // 2 :]
    name = f"bf16 product [{m} x {k}] @ [{k} x {n}], sustained for {SUSTAINED_SECONDS} s"
    bench.add(Row(name, Timing(statistics.median(settled), min(settled), max(settled), 0.0, 0.0), 2 * m * k * n))
    if reading is not None:
        bench.add_note(f"{name}: {reading.show()}")


# ---------------------------------------------------------------- what is shown


def list_sections() -> dict[str, Callable[[Bench], None]]:
    sections: dict[str, Callable[[Bench], None]] = {
        "InfoNCE": measure_contrast,
        "cross entropy": measure_cross_entropy,
        "BlockMasks": measure_masks,
    }
    for heads, key_heads, head_width in HEADS:
        measure = partial(measure_attention, heads=heads, key_heads=key_heads, head_width=head_width)
        sections[f"attention {heads}/{key_heads} x {head_width}"] = measure
    return sections | {"sustained product": measure_machine}


def as_json(bench: Bench, title: str) -> dict:
    """As fields by name, timings too."""
    rows = []
    for row in bench.rows:
        timings = {name: timing and timing._asdict() for name, timing in (("timing", row.timing), ("floor", row.floor))}
        rows.append(asdict(row) | timings)
    return {"title": title, "rows": rows, "notes": bench.notes}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Losses, masks and attention beside their floors.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for kernels.md and kernels.json")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens in a pack")
    parser.add_argument("--repeats", type=int, default=7, help="of a measurement")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 1 or arguments.repeats < 1:
        parser.error("--tokens and --repeats must be positive")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU")

    torch._dynamo.config.recompile_limit = 64
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as in a run
    torch.manual_seed(0)
    bench = Bench(draw_batch(arguments.tokens, VOCABULARY).to("cuda"), arguments.repeats)
    documents = len(bench.batch.cu_seqlens) - 1
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    title = f"{device}: {bench.tokens:,} tokens in {documents} documents, width {WIDTH}, vocabulary {VOCABULARY:,}"
    report = Report(arguments.out / "kernels.md")
    for name, measure in list_sections().items():
        with bench.guard(name):
            measure(bench)
        free_memory()
        (arguments.out / "kernels.json").write_text(json.dumps(as_json(bench, title), indent=1))
    header = ["what", "ms [low, high]", "floor, ms [low, high]", "ratio", "TFLOP/s"]
    report.table(title, header, [row.as_cells() for row in bench.rows])
    if bench.notes:
        report.write("\n" + "\n".join(f"- {text}" for text in bench.notes))
    note("done")


if __name__ == "__main__":
    main(sys.argv[1:])
