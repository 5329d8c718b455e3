"""How many steps a budget in seconds is: a short run of each arm, on the same device and as many at a time, times its steps.

The learning rate is scheduled over steps, so that their number has to be known at the start. The probe times the steps with the
objective's loss and, where some have none, those without: before `objective.start_step`, and between those of `every`. Starts,
validations and checkpoints do not count.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flame.compare.devices import Slot
from flame.compare.outcomes import COMPLETE, LOG_FILE, read_outcome
from flame.compare.queue import RunQueue, say, try_lock
from flame.compare.results import Row, read_rows
from flame.compare.runs import FAR_AWAY, Run, is_same, resolve
from flame.compare.spec import Budget, Options, Spec
from flame.errors import MachineFault, UserError
from flame.logging.metric_names import CUDA_GRAPH_FRACTION
from flame.objectives.registry import choose_objective

PROBES_FOLDER = "probes"
PROBE_FILE = "probe.json"
LOCK_FILE = "probe.lock"
SECONDS_BETWEEN_LOOKS = 0.5
LENGTHS = (12, 48, 192)
"""Steps of a probe: where there are no CUDA graphs, where there are, and where too few steps are one."""
WARM_UP = 4
"""Steps at the start that are not counted: kernels are chosen and layers compiled."""
SETTLED = 0.9
"""Share of micro-steps that are CUDA graphs from which on the others hardly matter."""
SHORT: Options = {
    "lr_scheduler.total_steps": FAR_AWAY,
    "objective.warmup_steps": 0,
    "objective.decay_steps": 0,
    "validation.interval": 0,
    "checkpoint.enable_checkpoint": False,
    "metrics.log_freq": 1,
    "metrics.diagnostics_interval": 0,
    "metrics.enable_wandb": False,
    "metrics.enable_tensorboard": False,
}


class StepTimes(NamedTuple):
    """Median seconds of a step."""

    with_loss: float
    """Of the objective."""
    without: float
    """The same number where all steps have the loss."""

    def find_mean(self, every: int) -> float:
        """Of a step where one of `every` has the loss."""
        return self.without + (self.with_loss - self.without) / every


class Interrupted(Exception):
    """The user asked to stop while steps were timed."""


def set_steps(spec: Spec, runs: Sequence[Run], slots: Sequence[Slot], *, may_measure: bool = True) -> list[Run]:
    """The runs with the number of steps of their budget. Budgets other than seconds are left to the trainer.

    Args:
        may_measure: whether to time the steps of arms that were not timed yet; without it their runs keep no number of steps.

    Raises:
        MachineFault: a probe has failed.
        UserError: the options of an arm have changed meanwhile.
        Interrupted: the user asked to stop.
    """
    if spec.budget.kind != "seconds":
        return list(runs)
    by_arm = {(run.task, run.arm): run for run in reversed(runs)}
    wanted = {key: _describe(run, slots) for key, run in by_arm.items()}
    steps = {key: _find_steps(spec, run, slots, wanted[key], may_measure) for key, run in by_arm.items()}
    changed = [f"{task}/{arm}" for (task, arm), run in by_arm.items() if _describe(run, slots) != wanted[task, arm]]
    if changed:
        raise UserError(f"{', '.join(changed)}: options have changed while steps were timed: repeat the command")
    return [replace(run, steps=steps[run.task, run.arm]) for run in runs]


def count_steps(seconds: float, start_step: int, before: float, later: float) -> int:
    """Steps that fit.

    Args:
        start_step: the first step that takes `later` seconds; earlier ones take `before`.
    """
    early = max(start_step - 1, 0)
    if seconds <= early * before:
        return max(1, math.floor(seconds / before))
    return max(1, early + math.floor((seconds - early * before) / later))


def _find_steps(spec: Spec, run: Run, slots: Sequence[Slot], wanted: dict[str, Any], may_measure: bool) -> int | None:
    folder = spec.out / PROBES_FOLDER / run.task / run.arm
    config = resolve(run)
    kind = choose_objective(config)
    start_step, every = (config.objective.start_step, config.get(kind.options).every) if kind else (0, 1)
    times = _read(folder, wanted)
    if times is None and not may_measure:
        return None
    if times is None:
        folder.mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(folder / LOCK_FILE)) is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)  # another element of a Slurm array is at it
        with closing(lock):
            frequent = {f"{kind.options.section}.every": 1} if kind else {}
            times = _read(folder, wanted) or _measure(run, folder, slots, frequent, start_step > 1 or every > 1)
            (folder / PROBE_FILE).write_text(json.dumps({"of": wanted, "a step": times._asdict()}, indent=1) + "\n")
    mean = times.find_mean(every)
    steps = count_steps(spec.budget.amount, start_step, times.without, mean)
    say(f"{run.task}/{run.arm}: a step takes {mean:.4g} s, so {spec.budget} are {steps} steps")
    return steps


def _describe(run: Run, slots: Sequence[Slot]) -> dict[str, Any]:
    """What the time of a step depends on."""
    described = run.describe()
    kept = {key: value for key, value in described["options"].items() if not key.endswith(".seed")}
    shared = {"at a time": len(_share_device(slots)), "threads": slots[0].threads}
    return {"options": kept, "files": described["files"], "processes": run.processes, **shared}


def _read(folder: Path, wanted: dict[str, Any]) -> StepTimes | None:
    try:
        found = json.loads((folder / PROBE_FILE).read_text())
        return StepTimes(**found["a step"]) if is_same(found["of"], wanted) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _measure(run: Run, folder: Path, slots: Sequence[Slot], frequent: Options, some_have_none: bool) -> StepTimes:
    """Time steps that all have the loss and, if some of the run have none, steps that all have none."""
    starts = [FAR_AWAY, 0] if some_have_none else [0]
    times = [_time_steps(run, folder / f"start-{start}", slots, {"objective.start_step": start, **frequent}) for start in starts]
    return StepTimes(with_loss=times[-1], without=times[0])


def _time_steps(run: Run, folder: Path, slots: Sequence[Slot], changes: Options) -> float:
    """Median seconds of a step, over as many runs at a time as the comparison will make on a device.

    Where micro-steps become CUDA graphs, longer runs are timed in their second half: each kind of packed sequence is launched
    one by one before.
    """
    for steps in LENGTHS:
        runs = _run_steps(run, folder, slots, changes, steps)
        if not any(CUDA_GRAPH_FRACTION in row for rows in runs for row in rows):
            return statistics.median(row["step_seconds"] for rows in runs for row in rows)
        late = [row for rows in runs for row in rows[len(rows) // 2 :]]
        graphed = statistics.mean(row[CUDA_GRAPH_FRACTION] for row in late)
        if steps > LENGTHS[0] and (graphed >= SETTLED or graphed == 0):
            break
    return statistics.median(row["step_seconds"] for row in late)


def _run_steps(run: Run, folder: Path, slots: Sequence[Slot], changes: Options, steps: int) -> list[list[Row]]:
    """The log lines of so many steps after their warm-up, of each of the runs at a time."""
    shared = _share_device(slots)
    budget = Budget("seconds", math.inf)
    options = run.options | SHORT | changes
    copies = [
        replace(run, folder=folder / str(number), options=options, budget=budget, stops=(), steps=steps)
        for number in range(len(shared))
    ]
    for copy in copies:
        shutil.rmtree(copy.folder, ignore_errors=True)
    say(f"{run.task}/{run.arm}: timing {steps} steps, {len(copies)} at a time")
    if not RunQueue(copies, shared).make():
        raise Interrupted
    for copy in copies:
        outcome = read_outcome(copy.folder)
        if outcome.state != COMPLETE:
            raise MachineFault(f"{run.task}/{run.arm}: its steps cannot be timed: {outcome.line} ({copy.folder / LOG_FILE})")
    return [[row for row in read_rows(copy.folder) if "step_seconds" in row][WARM_UP:] for copy in copies]


def _share_device(slots: Sequence[Slot]) -> list[Slot]:
    """Those on the GPUs of the first."""
    return [slot for slot in slots if slot.gpus == slots[0].gpus]
