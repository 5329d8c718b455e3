"""Skips steps whose numbers are not finite, reports their documents, and ends the run after too many in a row."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.checkpoints.files import advise_going_back
from flame.config.run import CHECKPOINT_FOLDER
from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.logging.counters import Counters
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Losses, get_objective

SKIPPED_FILE = "skipped.jsonl"
MOST_DOCUMENTS_SHOWN = 8

logger = logging.getLogger("flame")


class Suspect(NamedTuple):
    """A packed sequence with a loss that is not finite."""

    sequence: int
    source: str
    documents: list[int | str]


class StepGuard:
    """Decides whether to apply each step.

    If only the objective's loss or gradient has failed, the language model still trains, without the sequences that failed. The
    objective's own modules skip the step.

    Args:
        max_skipped_steps: `training.max_skipped_steps`.
        folder: the run's folder. `skipped.jsonl` in it lists each step skipped in whole or in part, with all documents.
        counters: the run's counters, which are updated here.
    """

    def __init__(self, max_skipped_steps: int, folder: Path, model: TrainingModel, counters: Counters, device: torch.device):
        self._max_skipped_steps, self._path, self._counters, self._device = (
            max_skipped_steps,
            folder / SKIPPED_FILE,
            counters,
            device,
        )
        objective = get_objective(model)
        self._aux_name = f"{objective.name} loss" if objective is not None else ""
        self._aux_parameters = list(objective.parameters()) if objective is not None else []

    def reduce(self, step_loss: Tensor, outcomes: list[Losses]) -> tuple[Tensor, Tensor]:
        """Sum the loss over ranks, and zero the gradients of the objective's modules if one of them is not finite.

        It does not wait for the device.

        Args:
            step_loss: 0-d, this rank's part.

        Returns:
            the loss of the step, 0-d; and [2], over all ranks: the number of packed sequences whose auxiliary loss failed, and
            the number of ranks with a gradient of the objective's modules that is not finite.
        """
        gradients = [gradient for gradient in map(_get_local_gradient, self._aux_parameters) if gradient is not None]
        is_finite = torch.ones((), device=self._device, dtype=torch.bool)
        for gradient in gradients:
            is_finite &= gradient.isfinite().all().to(self._device)  # with CPU offload, gradients are on the CPU
        failed = sum((losses.aux.failed for losses in outcomes if losses.aux is not None), step_loss.new_zeros(()))
        totals = torch.stack([step_loss, failed.to(step_loss.dtype), (~is_finite).to(step_loss.dtype)])
        dist.all_reduce(totals)
        for gradient in gradients:
            gradient.masked_fill_((totals[2] > 0).to(gradient.device), 0.0)
        return totals[0], totals[1:]

    def should_apply(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        failures: Tensor,
        batches: list[PackedBatch],
        outcomes: list[Losses],
    ) -> bool:
        """Whether to apply this step. The answer is the same on all ranks.

        If only the objective has failed, its parameters' gradients are dropped, and the step is applied without them.

        Args:
            loss, failures: from `reduce`.
            grad_norm: norm of all gradients, 0-d.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        loss_value, norm_value, failed_losses, failed_gradients = torch.stack([loss, grad_norm, *failures]).tolist()
        counters = self._counters
        has_aux = any(losses.aux is not None for losses in outcomes)  # the same on all ranks
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            counters.skipped_steps += 1
            counters.skipped_in_a_row += 1
            counters.skipped_aux_in_a_row += has_aux
            is_bad = [losses.ce_sum is not None and not losses.ce_sum.isfinite() for losses in outcomes]
            found = f"loss {loss_value:g}, gradient norm {norm_value:g}"
            in_a_row = max(counters.skipped_in_a_row, counters.skipped_aux_in_a_row if has_aux else 0)
            self._report(step, "step", found, _name_bad(batches, is_bad), in_a_row)
            return False
        counters.skipped_in_a_row = 0
        if not failed_losses and not failed_gradients:
            # A step without the objective's loss says nothing of an objective that fails whenever it is computed.
            if has_aux:
                counters.skipped_aux_in_a_row = 0
            return True
        counters.skipped_aux += 1
        counters.skipped_aux_in_a_row += 1
        is_bad = [losses.aux is not None and bool(losses.aux.failed) for losses in outcomes]
        found = f"the {self._aux_name}, or a gradient of it, is not finite"
        self._report(step, self._aux_name, found, _name_bad(batches, is_bad), counters.skipped_aux_in_a_row)
        for parameter in self._aux_parameters:
            parameter.grad = None  # the optimizer skips parameters without a gradient
        return True

    def _report(self, step: int, what: str, found: str, suspects: list[Suspect], in_a_row: int) -> None:
        is_main = dist.get_rank() == 0
        message = f"step {step}: {found}; {_show(suspects)}"
        if is_main:
            row: dict[str, Any] = {"step": step, "skipped": what, "found": found, "sequences": [s._asdict() for s in suspects]}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        limit = self._max_skipped_steps
        if in_a_row >= limit:
            stopped = f"stopped, the last of training.max_skipped_steps = {limit} such steps in a row"
            raise UserError(f"{message}: {stopped}{advise_going_back(self._path.parent / CHECKPOINT_FOLDER)}")
        if is_main:
            logger.warning("%s: %s skipped", message, what)


def _get_local_gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _name_bad(batches: list[PackedBatch], is_bad: list[bool]) -> list[Suspect]:
    """The bad packed sequences of all ranks; if there are none, all packed sequences."""
    return _name_over_ranks(batch for batch, bad in zip(batches, is_bad, strict=True) if bad) or _name_over_ranks(batches)


def _name_over_ranks(batches: Iterable[PackedBatch]) -> list[Suspect]:
    own = [
        Suspect(batch.sequence_index, batch.source, list(dict.fromkeys(chunk.document for chunk in batch.documents)))
        for batch in batches
    ]
    gathered: list[list[Suspect] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return sorted(suspect for suspects in gathered if suspects is not None for suspect in suspects)


def _show(suspects: list[Suspect]) -> str:
    shown, documents_left = [], MOST_DOCUMENTS_SHOWN
    for sequence, source, documents in suspects:
        if documents_left <= 0:
            break
        names = ", ".join(map(str, documents[:documents_left]))
        more = f" and {len(documents) - documents_left} more" if len(documents) > documents_left else ""
        shown.append(f"sequence {sequence} ({source}: documents {names}{more})")
        documents_left -= len(documents)
    others = f" and {len(suspects) - len(shown)} more sequences" if len(suspects) > len(shown) else ""
    return ", ".join(shown) + others + (f", all in {SKIPPED_FILE}" if others or "more" in shown[-1] else "")
