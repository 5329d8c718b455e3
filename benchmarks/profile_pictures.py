"""Pictures of what `[profiling]` writes: a trace as a timeline, the memory's history as areas.

    python -m benchmarks.profile_pictures OUT --trace RUN/profile/trace-steps-9-10-rank-0.json.gz
    python -m benchmarks.profile_pictures OUT --memory RUN/profile/memory-step-10-rank-0.pickle

Perfetto and memory_viz show more, and let you zoom. Memory is that which was taken while the history was kept; an area is what
the innermost function of this repository on the stack has taken. Draws OUT/trace.png and OUT/memory.png.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

COMMUNICATION, COMPUTATION = "communication", "computation"
ANNOTATIONS = {"user_annotation": "Python: parts of a step", "gpu_user_annotation": "GPU: parts of a step"}
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
MOST_AREAS = 8
POINTS = 2000
OTHERS = "others"


def read_trace(path: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Intervals of each row of the picture: start and length in ms from the first, and the name of the part."""
    rows: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X" or not event.get("dur"):
            continue
        if kind in ANNOTATIONS and not name.startswith(LIBRARY_PARTS):
            row = ANNOTATIONS[kind]
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            row = f"GPU: {COMMUNICATION if 'nccl' in name else COMPUTATION}"
            name = ""
        else:
            continue
        rows[row].append((event["ts"] / 1e3, event["dur"] / 1e3, name))
    if not rows:
        raise SystemExit(f"{path}: no parts of a step are in this trace")
    start = min(interval[0] for row in rows.values() for interval in row)
    return {name: [(at - start, length, part) for at, length, part in row] for name, row in rows.items()}


def draw_trace(path: Path, out: Path) -> None:
    rows = read_trace(path)
    names = [*ANNOTATIONS.values(), f"GPU: {COMPUTATION}", f"GPU: {COMMUNICATION}"]
    names = [name for name in names if name in rows]
    parts = list(dict.fromkeys(part for name in names for _, _, part in sorted(rows[name]) if part))
    colors = dict(zip(parts, mpl.colormaps["tab20"].colors * (1 + len(parts) // 20), strict=False))
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for height, name in enumerate(names):
        spans = [(at, length) for at, length, _ in rows[name]]
        axes.broken_barh(spans, (height - 0.4, 0.8), facecolors=[colors.get(part, "dimgray") for *_, part in rows[name]])
    for part in parts:
        axes.barh(0, 0, color=colors[part], label=part)
    axes.set_yticks(range(len(names)), names)
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


def read_memory(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Milliseconds, and GiB of each owner at those moments, largest first."""
    with path.open("rb") as file:
        snapshot = pickle.load(file)
    events = max(snapshot["device_traces"], key=len, default=[])
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
    moments = np.linspace(changes[0][0], changes[-1][0], POINTS)
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
    return (moments - moments[0]) / 1e3, shown


def draw_memory(path: Path, out: Path) -> None:
    moments, areas = read_memory(path)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(moments, list(areas.values()), labels=list(areas))
    axes.set_xlabel("ms")
    axes.set_ylabel("GiB")
    axes.set_xlim(moments[0], moments[-1])
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out / "memory.png", dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Pictures of traces and of the memory's history.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--trace", type=Path, help="a trace of profiling.trace_steps")
    parser.add_argument("--memory", type=Path, help="a snapshot of profiling.memory_steps with profiling.memory_history")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.trace:
        draw_trace(arguments.trace, arguments.out)
    if arguments.memory:
        draw_memory(arguments.memory, arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
