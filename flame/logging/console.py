"""What a run prints: its log, and one line per logged step or validation."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

VALIDATION_PREFIX = "validation_"
"""Prefix of validation metrics. They have their own rows in metrics.jsonl."""
EVALUATION_PREFIX = "evaluation/"
"""Prefix of the metrics of an evaluation, `evaluation/NAME/bits_per_byte`. They have their own rows, too."""

RowKind = Literal["training", "validation", "evaluation"]

Describe = Callable[[Mapping[str, float], str], str]
"""(metrics, prefix of their names) -> text that an objective adds after its loss; see `Objective.describe_metrics`."""


def find_row_kind(names: Iterable[str]) -> RowKind:
    """What a row of metrics.jsonl is about, from the names in it."""
    for name in names:
        if name.startswith(VALIDATION_PREFIX):
            return "validation"
        if name.startswith(EVALUATION_PREFIX):
            return "evaluation"
    return "training"


def init_logging(is_main: bool) -> None:
    """Print the log on stdout. The logger "flame" prints info on the main rank, and warnings with the rank's number on all.

    Other libraries print warnings and errors.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _ConsoleHandler)]:
        root.removeHandler(handler)
    root.addHandler(_ConsoleHandler())
    root.setLevel(logging.WARNING)
    logging.getLogger("flame").setLevel(logging.INFO if is_main else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        time, _, message = text.partition(" ")
        return f"{time} {record.levelname.lower()} (rank {os.environ.get('RANK', '0')}): {message}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)


def format_line(
    step: int, total_steps: int, values: Mapping[str, float], eta_seconds: float, describe: Describe = lambda values, prefix: ""
) -> str:
    """Format a console line about a step. Fields have fixed widths. Fields without a value are left out.

    Args:
        step: steps done, in 1 .. `total_steps`.
        total_steps: `training.steps`.
        values: metrics by name; mfu and data_wait_fraction are fractions of 1.
        eta_seconds: time left.
        describe: gives the text that the objective adds after its loss.
    """
    fields = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]

    def show(name: str, template: str, scale: float = 1.0) -> None:
        if name in values:
            fields.append(template.format(values[name] * scale))

    show("loss", "loss {:6.3f}")
    show("ce_loss", "ce {:6.3f}")
    show("aux_loss", "aux {:6.3f}")
    if "aux_loss" in values:
        fields[-1] += describe(values, "")
    if "grad_norm" in values:
        fields.append(f"grad {_format_norm(values['grad_norm']):>6}")
    show("lr", "lr {:7.1e}")
    if "tokens_per_second" in values:
        fields.append(f"{_format_count(values['tokens_per_second']):>6} tok/s")
    show("mfu", "mfu {:4.1f}%", scale=100)
    show("peak_memory_gib", "{:5.1f} GiB")
    show("data_wait_fraction", "waiting {:3.0f}%", scale=100)
    fields.append(f"eta {_format_duration(eta_seconds)}")
    if values.get("skipped_steps"):
        fields.append(f"skipped {values['skipped_steps']:g}")
    if values.get("skipped_aux"):
        fields.append(f"aux skipped {values['skipped_aux']:g}")
    if values.get("bad_rows"):
        fields.append(f"bad rows {values['bad_rows']:g}")
    return " · ".join(fields)


def format_validation(
    step: int, total_steps: int, values: Mapping[str, float], describe: Describe = lambda values, prefix: ""
) -> str:
    """Format a console line about a validation, from its metrics `validation_*`."""
    fields = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, label in (("loss", "validation loss"), ("ce_loss", "ce"), ("aux_loss", "aux")):
        if (value := values.get(VALIDATION_PREFIX + name)) is not None:
            fields.append(f"{label} {value:6.3f}")
    fields[-1] += describe(values, VALIDATION_PREFIX)
    for name, label in (("exact_match", "exact match"), ("first_branch", "first branch")):
        if (share := values.get(VALIDATION_PREFIX + name)) is not None:
            fields.append(f"{label} {100 * share:5.1f}%")
    return " · ".join(fields)


def format_evaluation(step: int, total_steps: int, values: Mapping[str, float]) -> list[str]:
    """Format the metrics of an evaluation, `evaluation/NAME/...`: a line for each name."""
    by_name: dict[str, list[str]] = {}
    for key, value in values.items():
        name, _, metric = key.removeprefix(EVALUATION_PREFIX).rpartition("/")
        is_share = metric.startswith("accuracy") or metric == "exact_match"
        shown = f"{100 * value:5.1f}%" if is_share else f"{value:6.3f}"
        by_name.setdefault(name, []).append(f"{metric.replace('_', ' ')} {shown}")
    begin = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    return [" · ".join([begin, name, *fields]) for name, fields in by_name.items()]


def _format_norm(norm: float) -> str:
    return f"{norm:.2f}" if norm < 999.5 else f"{norm:.0e}"


def _format_count(count: float) -> str:
    if not math.isfinite(count):
        return str(count)
    for unit in ("", "k", "M"):
        if count < 999.95:
            return f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}G"


def _format_duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    if minutes:
        return f"{minutes}m {second:02d}s"
    return f"{second}s"
