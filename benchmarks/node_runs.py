"""Runs that `benchmarks.node` measures: what they are, whether they fit, their results and how those are shown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pool import Ended, Job, run_jobs
from benchmarks.settings import SETTINGS
from benchmarks.shapes import write_shape
from benchmarks.step_worker import Spec, build_job, list_options
from benchmarks.timing import Report
from flame.compare.tables import show_range
from flame.config.schema import JobConfig
from flame.models.causal_lm import load_model_config
from flame.trainer.estimate import GIB, SPARE, estimate_rank
from flame.trainer.options import read_options
from flame.trainer.setup import build_modules

RUN_SECONDS = 170.0
"""Limit of one run, from its turn on: compilation and steps take less than a minute."""


class Case(NamedTuple):
    """One run of the trainer. Parts that ask for the same one share it."""

    shape: str
    tokens: int
    """A step and GPU."""
    gpus: int
    setting: str
    """Of `benchmarks.settings`."""
    further: tuple[str, ...] = ()
    """Options."""
    warmup: int = 4
    steps: int = 8
    profiled: int = 4

    @property
    def name(self) -> str:
        words = (self.shape, self.tokens, "tokens", self.gpus, "gpus", self.setting, *self.further)
        return re.sub(r"[^A-Za-z0-9]+", "_", " ".join(map(str, words))).strip("_").replace("future_encoder_", "")


@dataclass
class Host:
    """The GPUs, and what was measured on them so far."""

    out: Path
    """Tables, results and logs."""
    scratch: Path
    """Run folders, model configurations and the corpus."""
    gpus: Sequence[str]
    counts: Sequence[int]
    """Numbers of GPUs to measure, ascending."""
    memory: float
    """GiB of one GPU."""
    report: Report
    lengths: Sequence[int] = ()
    """Tokens a GPU of weak scaling."""
    settings: Sequence[str] = ()
    """Of `benchmarks.settings`, of weak scaling."""
    results: dict[Case, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """Why runs gave no result, by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why runs were not tried."""

    @property
    def most(self) -> int:
        return self.counts[-1]

    def spell(self, case: Case) -> list[str]:
        """All options of a run."""
        run, corpus = self.scratch / case.name, self.scratch / "corpus.jsonl"
        further = [*SETTINGS[case.setting], *case.further]
        return list_options(run, write_shape(case.shape, self.scratch), corpus, case.tokens, further)

    def measure(self, cases: Sequence[Case], seconds: float) -> None:
        """Make the runs that have no result yet. One that fails is reported with the end of its log, and the others go on."""
        left = {case.name: case for case in cases if case not in self.results}
        jobs = []
        for name, case in left.items():
            spec = Spec(self.spell(case), str(self.scratch / f"{name}.json"), case.warmup, case.steps, case.profiled)
            jobs.append(build_job(name, case.gpus, spec, self.scratch / f"{name}.spec.json", RUN_SECONDS))

        def read_result(ended: Ended) -> None:
            name = ended.job.name
            if ended.problem is None:
                result = json.loads((self.scratch / f"{name}.json").read_text())
                self.results[left[name]] = result | {"run_seconds": ended.seconds}
            self.keep()

        self.run(jobs, seconds, read_result)

    def run(self, jobs: Sequence[Job], seconds: float, then: Callable[[Ended], None]) -> None:
        """Run jobs. As each ends, report it if it has failed, and call `then`."""
        with closing(run_jobs(jobs, self.gpus, self.out / "logs", seconds)) as all_ended:  # whatever is raised here ends the jobs
            for ended in all_ended:
                print(ended, flush=True)
                then(ended if ended.problem is None else self._report(ended))

    def _report(self, ended: Ended) -> Ended:
        name = ended.job.name
        if any("OutOfMemoryError" in line for line in ended.lines):
            ended = ended._replace(problem=f"out of memory ({ended.problem})")
        self.problems[name] = str(ended.problem)
        if ended.lines:
            self.report.write("\n".join([f"\n{name}: {ended.problem}", "", "```", *ended.lines, "```"]))
        return ended

    def keep(self) -> None:
        """Write all results to node.json."""
        rows = [case._asdict() | {"name": case.name} | result for case, result in self.results.items()]
        (self.out / "node.json").write_text(json.dumps({"runs": rows, "problems": self.problems}, indent=1))

    def table(self, title: str, columns: Mapping[str, Column], cases: Sequence[Case]) -> None:
        """A row for each run; one without a result says why in its last cell."""
        rows, reasons = [], self.left_out | self.problems
        for case in cases:
            result = self.results.get(case)
            cells = [column(case, result or {}) for column in columns.values()]
            rows.append([*cells, "" if result is not None else reasons.get(case.name, "not measured")])
        self.report.table(title, [*columns, "note"], rows)

    def configure(self, case: Case) -> JobConfig:
        """Checked options of a run."""
        return read_options(self.spell(case), case.gpus)

    def estimate(self, case: Case) -> float:
        """GiB of one GPU at the peak, as `--estimate` says."""
        return self._estimator(case)(case.tokens)

    def holds(self, gib: float) -> bool:
        """Whether a GPU has so much memory for a run."""
        return gib <= SPARE * self.memory

    def find_longest(self, case: Case, step: int = 4096, most: int = 262_144) -> int:
        """The most tokens that fit a GPU, a multiple of `step`, by the estimate; 0 if not even `step` do."""
        peak = self._estimator(case)
        low, high = 0, most // step
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.holds(peak(middle * step)) else (low, middle - 1)
        return low * step

    def _estimator(self, case: Case) -> Callable[[int], float]:
        config = self.configure(case)
        model = build_modules(config, load_model_config(str(config.model.config)), "cpu")

        def peak(tokens: int) -> float:
            config.training.seq_len = tokens
            return estimate_rank(config, model).find_peak(keeps_gradients=False) / GIB

        return peak


Column = Callable[[Case, Mapping[str, Any]], str]


def show_number(key: str, form: str, scale: float = 1.0) -> Column:
    """A column of one number of the results."""
    return lambda case, result: form.format(scale * result[key]) if result.get(key) is not None else "-"


def show_ms(case: Case, result: Mapping[str, Any]) -> str:
    return show_range(result["steps_ms"], "{:,.1f}") if result else "-"


def median_ms(result: Mapping[str, Any]) -> float:
    return statistics.median(result["steps_ms"])
