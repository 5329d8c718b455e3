"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases and the console."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flame.components.preemption import signals_blocked
from flame.config import JobConfig
from flame.errors import UserError

logger = logging.getLogger("flame")

METRICS_FILE = "metrics.jsonl"
VALIDATION_PREFIX = "validation_"
"""Of the metrics of a validation, which have a row of their own in metrics.jsonl."""
WANDB_ID_FILE = "wandb_id.txt"


class RunLog:
    """Writes the metrics of a run. Only the main rank writes; on the others every method does nothing."""

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        is_main: bool,
        start_step: int,
        resolved_config: dict[str, Any],
        wandb_id: str | None = None,
    ):
        """Open the logs, dropping what an earlier process of this run logged after `start_step`.

        Args:
            config: decides which services are used.
            folder: the run's folder; created if missing.
            is_main: whether this is the one rank that writes.
            start_step: steps already done, as restored from the checkpoint; 0 for a new run.
            resolved_config: all options as plain nested values, shown by Weights & Biases.
            wandb_id: identity at Weights & Biases from the checkpoint; used where the folder has lost its own.

        Raises:
            UserError: a service that was asked for is not installed or does not start.
        """
        self._is_main = is_main
        self.wandb_id = wandb_id
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = None
        if config.metrics.enable_wandb:
            self.wandb_id = _keep_wandb_id(folder, wandb_id)
            self._wandb = _start_wandb(config, folder, resolved_config, self.wandb_id)
        self._tensorboard = _start_tensorboard(folder, start_step) if config.metrics.enable_tensorboard else None
        drop_lines_after(folder / METRICS_FILE, start_step)
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of one step. In metrics.jsonl a number that is not finite is null."""
        if not self._is_main:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f'"{self._file.name}" cannot be written ({error.strerror}): put that right, and the same command goes on from '
                "the last checkpoint"
            ) from error
        with self._outliving("tensorboard"):
            if self._tensorboard is not None:
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
                # Steps before a checkpoint are not run again: unwritten at a crash, they would be a hole in the curve.
                self._tensorboard.flush()
        with self._outliving("wandb"):
            if self._wandb is not None:
                self._wandb.log({"step": step, **values})

    def sync(self) -> None:
        """Bring metrics.jsonl onto the disk; called before the checkpoint that its lines belong to is committed."""
        if self._is_main:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish writing. With Weights & Biases online, waits for the upload."""
        if not self._is_main:
            return
        with suppress(OSError):  # a full disk has been told of
            self._file.close()
        with self._outliving("tensorboard"):
            if self._tensorboard is not None:
                self._tensorboard.close()
        with self._outliving("wandb"):
            if self._wandb is not None:
                self._wandb.finish()

    @contextmanager
    def _outliving(self, service: str) -> Iterator[None]:
        """A service that fails is done without: the run matters more, and metrics.jsonl has all numbers."""
        try:
            yield
        except Exception as error:
            setattr(self, f"_{service}", None)
            logger.warning("%s has failed and is switched off for this process: %s", service, " ".join(str(error).split())[:300])


def drop_lines_after(path: Path, step: int) -> None:
    """Remove from a metrics file, all at once, the lines of later steps and those a crash has torn. No file is no lines."""
    _rewrite(path, lambda row: row["step"] <= step)


def _rewrite(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Leave the lines of a file that are whole and to be kept, all at once."""
    if not path.exists():
        return
    aside = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, aside.open("wb") as new:
        for line in old:
            row = parse_line(line)
            if row is not None and is_kept(row):
                new.write(line.removesuffix(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    os.replace(aside, path)


def drop_validation(path: Path, step: int) -> None:
    """Remove from a metrics file the validation of one step."""
    _rewrite(path, lambda row: row["step"] != step or not any(name.startswith(VALIDATION_PREFIX) for name in row))


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The metrics in a line of metrics.jsonl, with key "step"; None where the line is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _start_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"metrics.enable_tensorboard = true: {error}; pip install tensorboard, or set metrics.enable_tensorboard = false"
        ) from error
    return SummaryWriter(str(folder / "tb"), purge_step=start_step + 1)


def _start_wandb(config: JobConfig, folder: Path, resolved_config: dict[str, Any], wandb_id: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"metrics.enable_wandb = true: {error}; pip install wandb, or set metrics.enable_wandb = false"
        ) from error
    # Without a login wandb would ask for one on a terminal, while the other ranks wait.
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            with signals_blocked():  # its process must outlive the request to stop that all processes of a job get
                run = wandb.init(
                    id=wandb_id,
                    resume="allow",
                    project=os.environ.get("WANDB_PROJECT") or "flame",
                    name=os.environ.get("WANDB_RUN_NAME") or folder.resolve().name,
                    notes=config.job.description or None,
                    config=resolved_config,
                    dir=str(folder),
                    settings=wandb.Settings(silent=True, console="off"),
                )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"metrics.enable_wandb = true: wandb does not start ({reason}); "
                "set WANDB_MODE=offline in the environment, or metrics.enable_wandb = false"
            ) from error
        finally:
            sys.stdin = stdin
    # wandb refuses to go back on its own step count, as a run resumed from a checkpoint does.
    run.define_metric("*", step_metric="step")
    return run


def _keep_wandb_id(folder: Path, saved: str | None) -> str:
    """The identity under which every process of this run logs: the folder's, else the checkpoint's, else a new one."""
    path = folder / WANDB_ID_FILE
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = saved or uuid.uuid4().hex[:12]
        path.write_text(known + "\n")
    return known


def init_logging(is_main: bool) -> None:
    """Print what the logger "flame" says on stdout: from info up on the main rank, warnings with the rank's number on all.

    Other libraries are heard from warnings up.
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


def format_line(step: int, total_steps: int, values: dict[str, float], eta_seconds: float) -> str:
    """One console line about a step. Fields have fixed widths; those without a value are left out.

    Args:
        step: steps done, in 1 .. `total_steps`.
        total_steps: `training.steps`.
        values: metrics by name; mfu and data_wait_fraction are fractions of 1.
        eta_seconds: time left.
    """
    fields = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]

    def show(name: str, template: str, scale: float = 1.0) -> None:
        if name in values:
            fields.append(template.format(values[name] * scale))

    show("loss", "loss {:6.3f}")
    show("ce_loss", "ce {:6.3f}")
    show("aux_loss", "aux {:6.3f}")
    if "aux_loss" in values and "mi_lower_bound" in values:
        fields[-1] += f" (ln N {values['mi_lower_bound'] + values['aux_loss']:5.2f})"
    show("infonce_accuracy", "top-1 {:5.1f}%", scale=100)
    if "grad_norm" in values:
        fields.append(f"grad {_format_norm(values['grad_norm']):>6}")
    show("lr", "lr {:7.1e}")
    if "tokens_per_second" in values:
        fields.append(f"{_format_count(values['tokens_per_second']):>6} tok/s")
    show("mfu", "mfu {:4.1f}%", scale=100)
    show("peak_memory_gib", "{:5.1f} GiB")
    show("data_wait_fraction", "data {:3.0f}%", scale=100)
    fields.append(f"eta {_format_duration(eta_seconds)}")
    if values.get("skipped_steps"):
        fields.append(f"skipped {values['skipped_steps']:g}")
    if values.get("skipped_futures"):
        fields.append(f"futures skipped {values['skipped_futures']:g}")
    if values.get("bad_rows"):
        fields.append(f"bad rows {values['bad_rows']:g}")
    return " · ".join(fields)


def format_validation(step: int, total_steps: int, values: dict[str, float]) -> str:
    """One console line about a validation, from its metrics `validation_*`."""
    fields = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, label in (("loss", "validation loss"), ("ce_loss", "ce"), ("aux_loss", "aux")):
        if (value := values.get(VALIDATION_PREFIX + name)) is not None:
            fields.append(f"{label} {value:6.3f}")
    if (accuracy := values.get(VALIDATION_PREFIX + "infonce_accuracy")) is not None:
        fields.append(f"top-1 {100 * accuracy:5.1f}%")
    for name, label in (("exact_match", "exact match"), ("first_branch", "first branch")):
        if (share := values.get(VALIDATION_PREFIX + name)) is not None:
            fields.append(f"{label} {100 * share:5.1f}%")
    return " · ".join(fields)


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
