"""Writes to Weights & Biases. A resumed run keeps its identity, so that its curves continue."""

from __future__ import annotations

import logging
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any, ClassVar

from flame.errors import UserError, give_reason
from flame.logging.writers.base import MetricWriter, RunIdentity
from flame.logging.writers.panels import name_panels
from flame.runtime.signals import signals_blocked

logger = logging.getLogger("flame")

WANDB_ID_FILE = "wandb_id.txt"


class WandbWriter(MetricWriter):
    """Enabled by `metrics.enable_wandb`. Follows WANDB_PROJECT, WANDB_NAME (or WANDB_RUN_NAME) and WANDB_MODE in the
    environment."""

    name: ClassVar[str] = "wandb"

    def __init__(self, run: RunIdentity):
        self._id = _keep_id(run.folder, run.service_id)
        self._run = _start(run, self._id)
        logger.info("Weights & Biases: %s", f"offline, in {run.folder}/wandb" if self._run.offline else self._run.url)

    @property
    def service_id(self) -> str:
        return self._id

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **name_panels(values)})

    def log_texts(self, step: int, name: str, rows: list[dict[str, str]]) -> None:
        """Write a table."""
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"step": step, f"evaluation/{name}": table})

    def close(self) -> None:
        """Finish writing. Waits for the upload if online."""
        self._run.finish()


def _start(identity: RunIdentity, wandb_id: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"metrics.enable_wandb = true: {error}; pip install wandb, or set metrics.enable_wandb = false"
        ) from error
    # An empty stdin, since wandb would ask for a login on a terminal while the other ranks wait.
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            with signals_blocked():  # wandb's process must survive a request to stop that is sent to all processes
                run = wandb.init(
                    id=wandb_id,
                    resume="allow",
                    project=os.environ.get("WANDB_PROJECT") or "flame",
                    name=os.environ.get("WANDB_RUN_NAME") or os.environ.get("WANDB_NAME") or identity.folder.resolve().name,
                    notes=identity.description or None,
                    config=identity.options,
                    dir=str(identity.folder),
                    settings=wandb.Settings(silent=True, console="off"),
                )
        except Exception as error:
            reason = give_reason(error)
            raise UserError(
                f"metrics.enable_wandb = true: wandb does not start ({reason}); "
                "set WANDB_MODE=offline in the environment, or metrics.enable_wandb = false"
            ) from error
        finally:
            sys.stdin = stdin
    # wandb's own step count cannot go back, but a resumed run repeats steps. So "step" is a metric.
    run.define_metric("*", step_metric="step")
    return run


def _keep_id(folder: Path, saved: str | None) -> str:
    """Identity of the run: from its folder, else from the checkpoint, else a new one. Stored in the folder."""
    path = folder / WANDB_ID_FILE
    known = path.read_text(errors="replace").strip() if path.exists() else ""
    if known and not re.fullmatch(r"[\w-]{1,128}", known, re.ASCII):
        logger.warning("%s does not hold an id of Weights & Biases: it is written anew", path)
        known = ""
    if not known:
        known = saved or uuid.uuid4().hex[:12]
        path.write_text(known + "\n")
    return known
