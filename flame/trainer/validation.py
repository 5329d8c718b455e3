"""Losses and correct answers on a fixed set of held-out sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame.config.data import SMALLEST_HOLDOUT
from flame.config.schema import JobConfig
from flame.data.batch import PackedBatch, build_batch
from flame.data.loader import explain_no_answers
from flame.data.mixture import Mixture
from flame.data.sources.registry import build_kind, find_tokenizer_kind
from flame.errors import UserError
from flame.logging.console import VALIDATION_PREFIX
from flame.logging.metrics import Metrics
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Losses, Requested, compute_losses
from flame.runtime.distributed import sum_over_ranks
from flame.runtime.sameness import check_same
from flame.trainer.loss_metrics import record_losses


class ShortSource(NamedTuple):
    """A source whose held-out documents are used up."""

    name: str
    read: int
    """Packed sequences of the set."""
    asked: float
    """Those that its weight asks for."""


class Validator:
    """Packs a validation set once, and measures a model on it. The sequences are the same each time, on any number of ranks.

    Args:
        held_out: read from its beginning, in an order that does not depend on the run's seed; each document at most once.
        loss_weight: weight of the objective's loss in the total loss.

    Attributes:
        unread_sources: sources with a weight above 0, but without a sequence in the set.
        short_sources: those with fewer sequences than their weight asks for.
        num_even: as many sequences have the sources by their weights.

    Raises:
        UserError: the held-out documents do not fill one sequence.
    """

    def __init__(
        self, config: JobConfig, held_out: Mixture, loss_weight: float, rank: int, world_size: int, device: torch.device
    ):
        self._device, self._loss_weight = device, loss_weight
        self._is_frozen = config.experimental.freeze_lm_for_infonce
        self._has_answers = config.training.loss_on == "answer"
        task = find_tokenizer_kind(config.model.tokenizer_path)
        self._second_token_metric = task.second_token_metric if task else None
        validated = build_kind(config.validation, "validation", config.get) if task and config.validation.dataset else None
        self._answer_names = validated.name_answers() if validated else {}
        self._sources = [source.name for source in held_out.sources]
        batches, self.num_even = pack_once(config, held_out)
        if not batches:
            raise UserError(_explain_too_few(config))
        if not any(batch.num_labels for batch in batches) and config.training.loss_on != "all":
            raise UserError(explain_no_answers(held_out.sources[0].option, config.training))
        contents = b"".join(batch.input_ids.numpy().tobytes() for batch in batches)
        check_same({"content of the validation set": sha256(contents).hexdigest()[:16]})
        self.num_sequences = len(batches)
        read = Counter(batch.source for batch in batches)
        drawn = dict(zip(self._sources, held_out.weights, strict=True))
        self.unread_sources = [name for name, weight in drawn.items() if weight and not read[name]]
        asked = {name: weight / sum(drawn.values()) * len(batches) for name, weight in drawn.items()}
        found = [ShortSource(name, read[name], asked[name]) for name in drawn if read[name]]
        self.short_sources = [each for each in found if each.read < min(each.asked - 1, 0.9 * each.asked)]
        self._own = batches[rank::world_size]
        # All ranks must run each forward together. A rank without a sequence left runs the first one, which does not count.
        self._rounds = -(-len(batches) // world_size)
        self._filler = batches[0]

    def run(self, model: TrainingModel, with_aux: bool, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Measure the model. All ranks call it.

        Args:
            with_aux: also compute the objective's loss.
            is_stopped: called before each sequence. If it returns True on any rank, all ranks stop.

        Returns:
            metrics by name, or None if stopped.
        """
        metrics = Metrics(self._device)
        requested = Requested(with_aux, ce=not self._is_frozen, correct=self._has_answers)
        model.eval()
        try:
            with torch.no_grad():
                for turn in range(self._rounds):
                    (votes,) = sum_over_ranks(is_stopped())
                    if votes:
                        return None
                    has_own = turn < len(self._own)
                    batch = (self._own[turn] if has_own else self._filler).to(self._device)
                    losses = mark_failed(model(compute_losses, batch, requested))
                    record_losses(metrics, losses, batch, self._sources, VALIDATION_PREFIX, counts=has_own)
                    if losses.is_correct is not None:
                        self._record_answers(metrics, losses.is_correct, batch, times=int(has_own))
        finally:
            model.train()
        values = metrics.collect()
        weights = {"ce_loss": 1.0, "aux_loss": self._loss_weight}
        found = {name: VALIDATION_PREFIX + name for name in weights if VALIDATION_PREFIX + name in values}
        return values | {VALIDATION_PREFIX + "loss": sum(weights[name] * values[key] for name, key in found.items())}

    def _record_answers(self, metrics: Metrics, is_correct: Tensor, batch: PackedBatch, times: int) -> None:
        answers = judge_answers(is_correct, batch)
        record = {"exact_match": answers.is_exact}
        if self._second_token_metric:
            record[self._second_token_metric] = answers.has_second_token
        for length, name in self._answer_names.items():
            record[f"exact_match/{name}"] = answers.is_exact[torch.from_numpy(answers.lengths == length).to(self._device)]
        for name, is_right in record.items():
            metrics.record_mean(VALIDATION_PREFIX + name, is_right.sum() * times, len(is_right) * times)


class AnswersJudged(NamedTuple):
    """Results for the A answers of a batch whose documents are not cut."""

    is_exact: Tensor
    """bool [A]: greedy decoding from the prompt would give the answer, including the end of text. This holds exactly if each
    token of the answer has the highest logit given the true tokens before it: decoding has then produced those tokens."""
    has_second_token: Tensor
    """bool [A]: the answer's second token has the highest logit given the true tokens before it. In a path-star graph, the
    answer begins with the start node, so the second token chooses the arm."""
    lengths: np.ndarray
    """int64 [A]: tokens of the document, including the prompt."""


def judge_answers(is_correct: Tensor, batch: PackedBatch) -> AnswersJudged:
    """Group `is_correct`, bool [T], by answer."""
    is_whole = np.array([chunk.start == 0 and chunk.is_last for chunk in batch.documents]) & (batch.chunk_labels > 0)
    counts = torch.from_numpy(batch.chunk_labels[is_whole]).to(is_correct.device)
    ends = batch.cu_seqlens[1:].long()[torch.from_numpy(is_whole).to(is_correct.device)]
    correct = torch.cat([is_correct.new_zeros(1, dtype=torch.long), is_correct.cumsum(0)])  # before each position
    first = ends - 1 - counts  # predicts the first token of the answer
    second = torch.minimum(first + 1, ends - 2)  # or the last one of a shorter answer
    lengths = np.array([chunk.end for chunk in batch.documents], dtype=np.int64)[is_whole]
    return AnswersJudged(correct[ends - 1] - correct[first] == counts, is_correct[second], lengths)


def mark_failed(losses: Losses) -> Losses:
    """The losses with NaN where the objective's has failed. In training such a sequence is left out, and counted."""
    if losses.aux is None:
        return losses
    loss_sum = losses.aux.loss_sum.masked_fill(losses.aux.failed > 0, torch.nan)
    return losses._replace(aux=losses.aux._replace(loss_sum=loss_sum))


def _explain_too_few(config: JobConfig) -> str:
    every = config.validation.holdout_every
    if config.validation.dataset:
        advice = "lower training.seq_len, or give validation.dataset more documents"
    elif every > SMALLEST_HOLDOUT:
        advice = "lower training.seq_len or validation.holdout_every, or set validation.dataset in its place"
    else:
        advice = "lower training.seq_len, or set validation.dataset in place of validation.holdout_every"
    return f"validation: the held-out documents have fewer than training.seq_len = {config.training.seq_len} tokens: {advice}"


def pack_once(config: JobConfig, held_out: Mixture) -> tuple[list[PackedBatch], int]:
    """Pack at most `validation.num_sequences` sequences. Each source is read from its beginning, at most once.

    Returns:
        the sequences, and how many of them come before a source is used up, of those that have any.
    """
    training = replace(config.training, seed=0)
    drawn = [index for index, weight in enumerate(held_out.weights) if weight]
    streams = {index: held_out.open_packer(index, 0, 1, training) for index in drawn}
    cursors = {index: stream.first_cursor for index, stream in streams.items()}
    batches: list[PackedBatch] = []
    has_any: set[int] = set()
    turn, num_even = 0, None
    while streams and len(batches) < config.validation.num_sequences:
        index = held_out.choose(turn, 1)
        turn += 1
        if index not in streams:
            continue
        sequence = streams[index].next_sequence(cursors[index])
        if sequence.documents[-1].epoch > 0:
            del streams[index]
            if index in has_any and num_even is None:
                num_even = len(batches)
            continue
        cursors[index] = sequence.cursor
        batches.append(build_batch(sequence, len(batches)))
        has_any.add(index)
    return batches, len(batches) if num_even is None else num_even
