"""Writes the metrics of a run to metrics.jsonl and to the services that it uses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from flame.config.run import Metrics
from flame.errors import UserError, give_reason
from flame.logging.console import RowKind, find_row_kind
from flame.logging.writers.base import MetricWriter, RunIdentity
from flame.logging.writers.json_lines import JsonLinesWriter
from flame.logging.writers.tensorboard import TensorBoardWriter
from flame.logging.writers.wandb import WandbWriter
from flame.runtime.json_lines import rewrite_lines
from flame.runtime.user_code import find_user_class

logger = logging.getLogger("flame")

WRITERS: dict[str, type[MetricWriter]] = {"enable_tensorboard": TensorBoardWriter, "enable_wandb": WandbWriter}
"""Services by the option in [metrics] that enables them."""


def choose_writers(metrics: Metrics) -> list[type[MetricWriter]]:
    """The services that a run logs to, beside metrics.jsonl.

    Raises:
        UserError: `metrics.logger_path` does not define one.
    """
    chosen = [writer for switch, writer in WRITERS.items() if getattr(metrics, switch)]
    if metrics.logger_path:
        label = f'metrics.logger_path = "{metrics.logger_path}"'
        chosen.append(find_user_class(metrics.logger_path, label, MetricWriter, "a metric logger"))
    return chosen


class RunLog:
    """Writes the metrics of a run. Only rank 0 writes; on other ranks the methods do nothing.

    Args:
        run: None on ranks that do not write. Lines after its `start_step`, from an earlier process, are removed.
        service_ids: identities of the run at services, by name of the writer, from the checkpoint.

    Raises:
        UserError: a service is not installed or does not start.
    """

    def __init__(self, metrics: Metrics, run: RunIdentity | None, service_ids: Mapping[str, str] | None = None):
        self.service_ids = dict(service_ids or {})
        self._record: JsonLinesWriter | None = None
        self._services: list[MetricWriter] = []
        if run is None:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:  # if one does not start, the ones before it are closed
            for kind in choose_writers(metrics):
                service = _start(kind, replace(run, service_id=self.service_ids.get(kind.name)))
                opened.callback(service.close)
                self._services.append(service)
                if service.service_id is not None:
                    self.service_ids[kind.name] = service.service_id
            self._record = JsonLinesWriter(run)
            opened.pop_all()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of one step.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if self._record is None:
            return
        self._record.log(step, values)
        for service in list(self._services):
            with self._surviving_failure(service):
                service.log(step, dict(values))

    def log_texts(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Write texts of one step, rows with the same columns, to the services that show texts."""
        for service in list(self._services) if rows else ():
            with self._surviving_failure(service):
                service.log_texts(step, name, rows)

    def sync(self) -> None:
        """Make sure that all lines are on the disk. Called before the checkpoint of the same step is committed."""
        if self._record is None:
            return
        self._record.sync()
        for service in list(self._services):
            with self._surviving_failure(service):
                service.sync()

    def close(self) -> None:
        """Finish writing. Waits for the upload if Weights & Biases is online."""
        if self._record is not None:
            self._record.close()
        for service in list(self._services):
            with self._surviving_failure(service):
                service.close()

    @contextmanager
    def _surviving_failure(self, service: MetricWriter) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._services.remove(service)
            reason = give_reason(error)
            logger.warning("%s has failed and is switched off for this process: %s", service.name, reason)


def _start(kind: type[MetricWriter], run: RunIdentity) -> MetricWriter:
    try:
        return kind(run)
    except UserError:
        raise
    except Exception as error:  # a user's code can raise anything
        reason = give_reason(error)
        raise UserError(f"the metric logger {kind.__name__} does not start: {type(error).__name__}: {reason}") from error


def drop_row(path: Path, step: int, kind: RowKind) -> None:
    """Remove the row of one step and kind from a metrics file."""
    rewrite_lines(path, lambda row: row["step"] != step or find_row_kind(row) != kind)
