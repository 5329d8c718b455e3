"""Pictures of what `[profiling]` writes: a trace as a timeline, the memory's history as areas.

    python -m benchmarks.profile_pictures OUT --trace RUN/profile/trace-steps-9-10-rank-0.json.gz
    python -m benchmarks.profile_pictures OUT --memory RUN/profile/memory-step-10-rank-0.pickle [--last_ms 800]

Perfetto and memory_viz show more, and let you zoom. Memory is that which was taken while the history was kept; an area is what
the innermost function of this repository on the stack has taken. Draws OUT/trace.png and OUT/memory.png.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import sys
from bisect import bisect_right
from math import inf
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

PYTHON, COMPUTATION, COMMUNICATION = "Python", "GPU: computation", "GPU: communication"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
LIBRARY_PARTS = (
    "FSDP::",
    "Optimizer.",
    "ProfilerStep",
    "nccl:",
    "gloo:",
    "Torch-Compiled",
    "## ",
    "Pregraph",
    "CompiledFunction",
)
"""How annotations of the libraries begin, which lie inside our parts."""
BETWEEN = "between parts"
MOST_AREAS = 8
POINTS = 2000
OTHERS = "others"

Interval = tuple[float, float, str]
"""Start and length in ms, and the part of a step."""


def read_trace(path: Path) -> dict[str, list[Interval]]:
    """Intervals of each row of the picture, from the first one's start. The GPU's work belongs to the part that launched it."""
    events = [event for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if event.get("ph") == "X"]
    python = sorted(
        (event["ts"], event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event.get("dur") and not event["name"].startswith(LIBRARY_PARTS)
    )
    if not python:
        raise SystemExit(f"{path}: no parts of a step are in this trace")
    launched = {_find_correlation(event): event["ts"] for event in events if event.get("cat") in LAUNCHES}
    starts = [at for at, _, _ in python]

    def find_part(moment: float | None) -> str:
        place = bisect_right(starts, moment) - 1 if moment is not None else -1
        return python[place][2] if place >= 0 and moment <= sum(python[place][:2]) else BETWEEN

    rows: dict[str, list[Interval]] = {PYTHON: list(python)}
    for event in events:
        if event.get("cat") in ON_GPU:
            row = COMMUNICATION if "nccl" in event["name"] else COMPUTATION
            part = find_part(launched.get(_find_correlation(event)))
            rows.setdefault(row, []).append((event["ts"], event["dur"], part))
    first = min(interval[0] for row in rows.values() for interval in row)
    return {name: [((at - first) / 1e3, length / 1e3, part) for at, length, part in row] for name, row in rows.items()}


def _find_correlation(event: dict[str, Any]) -> int | None:
    """The number that a launch and what it launches share."""
    return event.get("args", {}).get("correlation")


def draw_trace(path: Path, out: Path) -> None:
    rows = read_trace(path)
    parts = list(dict.fromkeys(part for _, _, part in rows[PYTHON]))
    colors = dict(zip(parts, map(mpl.colormaps["tab10"], range(10)), strict=False)) | {BETWEEN: "dimgray"}
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for height, row in enumerate(rows.values()):
        spans = [(at, length) for at, length, _ in row]
        axes.broken_barh(spans, (height - 0.4, 0.8), facecolors=[colors[part] for *_, part in row])
    for part, color in colors.items():
        axes.barh(0, 0, color=color, label=part)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(out / "trace.png", dpi=120)


def find_owner(event: dict[str, Any]) -> str:
    """The innermost function of this repository, of its library or of `benchmarks`."""
    for frame in event.get("frames", ()):
        if "/flame/" in (filename := frame["filename"]) and "site-packages" not in filename:
            return f"{filename.rsplit('/flame/', 1)[1].removesuffix('.py')}: {frame['name']}"
    return OTHERS


def read_memory(path: Path, last_ms: float = inf) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Milliseconds before the end, and GiB of each owner at those moments, largest first."""
    with path.open("rb") as file:
        snapshot = pickle.load(file)
    events: list[dict[str, Any]] = max(snapshot["device_traces"], key=len, default=[])
    owners: dict[int, tuple[str, int]] = {}
    changes: list[tuple[int, str, int]] = []
    for event in events:
        if event["action"] == "alloc":
            owners[event["addr"]] = (find_owner(event), event["size"])
            changes.append((event["time_us"], *owners[event["addr"]]))
        elif event["action"] == "free_requested" and event["addr"] in owners:
            owner, size = owners.pop(event["addr"])
            changes.append((event["time_us"], owner, -size))
    if not changes:
        raise SystemExit(f"{path}: no history of allocations: set profiling.memory_history")
    end = changes[-1][0]
    moments = np.linspace(max(changes[0][0], end - 1e3 * last_ms), end, POINTS)
    areas = {}
    for name in {owner for _, owner, _ in changes}:
        times = np.array([at for at, owner, _ in changes if owner == name])
        held = np.cumsum([size for _, owner, size in changes if owner == name]) / 2**30
        after = np.searchsorted(times, moments, side="right")
        areas[name] = np.where(after > 0, held[np.maximum(after - 1, 0)], 0.0)
    largest = sorted(areas, key=lambda name: -areas[name].max())
    kept = {name: areas[name] for name in largest if name != OTHERS}
    shown = dict(list(kept.items())[:MOST_AREAS])
    shown[OTHERS] = sum((areas[name] for name in areas if name not in shown), np.zeros(POINTS))
    return (moments - end) / 1e3, shown


def draw_memory(path: Path, out: Path, last_ms: float) -> None:
    moments, areas = read_memory(path, last_ms)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(moments, list(areas.values()), labels=list(areas))
    axes.set_xlabel("ms before the snapshot")
    axes.set_ylabel("GiB")
    axes.set_xlim(moments[0], moments[-1])
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out / "memory.png", dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Pictures of traces and of the memory's history.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--trace", type=Path, help="a trace of profiling.trace_steps")
    parser.add_argument("--memory", type=Path, help="a snapshot of profiling.memory_steps with profiling.memory_history")
    parser.add_argument("--last_ms", type=float, default=inf, help="draw the end of the memory's history (default: all of it)")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.trace:
        draw_trace(arguments.trace, arguments.out)
    if arguments.memory:
        draw_memory(arguments.memory, arguments.out, arguments.last_ms)


if __name__ == "__main__":
    main(sys.argv[1:])
