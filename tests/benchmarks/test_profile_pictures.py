"""Pictures of traces and of the memory's history, from files in torch's formats."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from benchmarks.profile_pictures import OTHERS, main, read_memory, read_trace


def span(kind: str, name: str, start: float, length: float, **args: object) -> dict[str, object]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "args": args}


def test_the_gpus_work_belongs_to_the_part_that_launched_it(tmp_path: Path) -> None:
    events = [
        span("user_annotation", "causal forward", 5000, 2000),
        span("user_annotation", "FSDP::pre_forward", 5000, 100),
        span("user_annotation", "backward", 7500, 1000),
        span("cuda_runtime", "cudaLaunchKernel", 6900, 10, correlation=1),
        span("cuda_driver", "cuLaunchKernelEx", 7000, 10, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 7200, 10, correlation=3),
        span("kernel", "gemm", 7000, 2000, correlation=1),
        span("kernel", "ncclDevKernel_AllGather", 7500, 500, correlation=2),
        span("gpu_memset", "Memset", 9000, 1, correlation=3),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert read_trace(path) == {
        "Python": [(0.0, 2.0, "causal forward"), (2.5, 1.0, "backward")],
        "GPU: computation": [(2.0, 2.0, "causal forward"), (4.0, 0.001, "between parts")],
        "GPU: communication": [(2.5, 0.5, "causal forward")],
    }
    main([str(tmp_path / "out"), "--trace", str(path)])
    assert (tmp_path / "out" / "trace.png").stat().st_size > 1000


def change(action: str, address: int, gib: float, ms: float, filename: str = "") -> dict[str, object]:
    frames = [{"filename": "/site-packages/torch/x.py", "name": "empty"}, {"filename": filename, "name": "f"}]
    return {"action": action, "addr": address, "size": int(gib * 2**30), "time_us": ms * 1000, "frames": frames}


def test_areas_are_what_each_function_holds(tmp_path: Path) -> None:
    ours = "/repo/flame/models/wrapper.py"
    events = [
        change("free_requested", 9, 1, 0),  # of what was taken before
        change("alloc", 1, 2, 0, ours),
        change("alloc", 2, 1, 10, "/site-packages/flame/x.py"),
        change("free_requested", 1, 2, 20, ours),
        change("free_completed", 1, 2, 21, ours),
        change("alloc", 1, 3, 30, ours),
        change("alloc", 3, 0, 40, ours),
    ]
    path = tmp_path / "memory.pickle"
    path.write_bytes(pickle.dumps({"device_traces": [[], events]}))
    moments, areas = read_memory(path)
    moments = moments + 40
    held = {name: np.interp([5, 15, 25, 35], moments, values) for name, values in areas.items()}
    np.testing.assert_allclose(held["models/wrapper: f"], [2, 2, 0, 3])
    np.testing.assert_allclose(held[OTHERS], [0, 1, 1, 1])
    last, _ = read_memory(path, last_ms=15)
    assert (last[0], last[-1]) == (-15, 0)
    main([str(tmp_path / "out"), "--memory", str(path)])
    assert (tmp_path / "out" / "memory.png").stat().st_size > 1000


def test_a_snapshot_without_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.pickle"
    path.write_bytes(pickle.dumps({"device_traces": [[]]}))
    with pytest.raises(SystemExit, match="no history of allocations"):
        read_memory(path)
