"""Steps whose numbers are not finite: left out, told with their documents, and the end of the run if there are too many."""

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

from flame.components.counters import Counters
from flame.config import Training
from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.models.future_lm import FutureLM
from flame.objective import Losses

SKIPPED_FILE = "skipped.jsonl"
MOST_DOCUMENTS_SHOWN = 8

logger = logging.getLogger("flame")


class Suspect(NamedTuple):
    """A packed sequence with a loss that is not finite."""

    sequence: int
    source: str
    documents: list[int | str]


class StepGuard:
    """Decides what becomes of each step. Where only the future loss (or a gradient of a rival of it) of some packed batches has
    failed, the backbone is trained without these, and predictor and estimator, or the rival's heads, not at all.

    Args:
        folder: the run's; `skipped.jsonl` in it lists each step left out, in whole or in part, with all documents.
        counters: the run's, counted up here.
    """

    def __init__(self, training: Training, folder: Path, model: FutureLM, counters: Counters, device: torch.device):
        self._training, self._path, self._counters, self._device = training, folder / SKIPPED_FILE, counters, device
        self._aux_name = "future loss" if model.rival is None else "rival's loss"
        self._future_parameters = [parameter for module in model.heads for parameter in module.parameters()]

    def settle(self, step_loss: Tensor, outcomes: list[Losses]) -> tuple[Tensor, Tensor]:
        """Sum the loss over ranks, and zero the gradients of the heads (predictor and estimator, or a rival's) if one of them is
        not finite.

        Args:
            step_loss: 0-d, this rank's part.

        Returns:
            the loss of the step, 0-d; and [2] over all ranks: packed batches whose future loss failed, and ranks that hold a
            gradient of the future side which is not finite. Nothing waits for the device.
        """
        gradients = [gradient for gradient in map(_get_local_gradient, self._future_parameters) if gradient is not None]
        is_finite = torch.ones((), device=self._device, dtype=torch.bool)
        for gradient in gradients:
            is_finite &= gradient.isfinite().all().to(self._device)  # offloaded gradients are elsewhere
        failed = sum((losses.aux.failed for losses in outcomes if losses.aux is not None), step_loss.new_zeros(()))
        totals = torch.stack([step_loss, failed.to(step_loss.dtype), (~is_finite).to(step_loss.dtype)])
        dist.all_reduce(totals)
        for gradient in gradients:
            gradient.masked_fill_((totals[2] > 0).to(gradient.device), 0.0)
        return totals[0], totals[1:]

    def judge(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        failures: Tensor,
        batches: list[PackedBatch],
        outcomes: list[Losses],
    ) -> bool:
        """Whether to apply this step; if so, without its future side where that has failed. All ranks come to the same.

        Args:
            loss, failures: from `settle`. grad_norm: of all gradients, 0-d.

        Raises:
            UserError: skipping is off, or has happened too often in a row.
        """
        loss_value, norm_value, failed_futures, failed_gradients = torch.stack([loss, grad_norm, *failures]).tolist()
        counters = self._counters
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            counters.skipped_steps += 1
            counters.skipped_in_a_row += 1
            is_bad = [losses.ce_sum is not None and not losses.ce_sum.isfinite() for losses in outcomes]
            found = f"loss {loss_value:g}, gradient norm {norm_value:g}"
            self._report(step, "step", found, _name_bad(batches, is_bad), counters.skipped_in_a_row)
            return False
        counters.skipped_in_a_row = 0
        if not failed_futures and not failed_gradients:
            counters.skipped_futures_in_a_row = 0
            return True
        counters.skipped_futures += 1
        counters.skipped_futures_in_a_row += 1
        is_bad = [losses.aux is not None and bool(losses.aux.failed) for losses in outcomes]
        found = f"the {self._aux_name}, or a gradient of it, is not finite"
        self._report(step, self._aux_name, found, _name_bad(batches, is_bad), counters.skipped_futures_in_a_row)
        for parameter in self._future_parameters:
            parameter.grad = None  # the optimizer leaves alone what has no gradient: predictor and estimator skip this step
        return True

    def _report(self, step: int, what: str, found: str, suspects: list[Suspect], in_a_row: int) -> None:
        is_main = dist.get_rank() == 0
        message = f"step {step}: {found}; {_show(suspects)}"
        if is_main:
            row: dict[str, Any] = {"step": step, "skipped": what, "found": found, "sequences": [s._asdict() for s in suspects]}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not self._training.skip_nan_inf:
            raise UserError(f"{message}: stopped, since training.skip_nan_inf = false")
        if in_a_row >= self._training.max_skipped_steps:
            limit = self._training.max_skipped_steps
            raise UserError(f"{message}: stopped, the last of training.max_skipped_steps = {limit} such steps in a row")
        if is_main:
            logger.warning("%s: %s skipped", message, what)


def _get_local_gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _name_bad(batches: list[PackedBatch], is_bad: list[bool]) -> list[Suspect]:
    """The bad batches of all ranks; all batches if none of them stands out."""
    return _name_over_ranks(batch for batch, bad in zip(batches, is_bad, strict=True) if bad) or _name_over_ranks(batches)


def _name_over_ranks(batches: Iterable[PackedBatch]) -> list[Suspect]:
    own = [
        Suspect(batch.sequence_index, batch.source, list(dict.fromkeys(piece.document for piece in batch.documents)))
        for batch in batches
    ]
    gathered: list[list[Suspect] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return sorted(suspect for suspects in gathered if suspects is not None for suspect in suspects)


def _show(suspects: list[Suspect]) -> str:
    shown, left = [], MOST_DOCUMENTS_SHOWN
    for sequence, source, documents in suspects:
        if left <= 0:
            break
        names = ", ".join(map(str, documents[:left]))
        more = f" and {len(documents) - left} more" if len(documents) > left else ""
        shown.append(f"sequence {sequence} ({source}: documents {names}{more})")
        left -= len(documents)
    others = f" and {len(suspects) - len(shown)} more sequences" if len(suspects) > len(shown) else ""
    return ", ".join(shown) + others + (f", all in {SKIPPED_FILE}" if others or "more" in shown[-1] else "")
