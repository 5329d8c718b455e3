"""Losses, and right answers, on a fixed set of held-out sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame.components.distributed import check_same_on_all_ranks, sum_over_ranks
from flame.components.loggers import VALIDATION_PREFIX
from flame.components.loss_metrics import record_losses
from flame.components.metrics import Metrics
from flame.config import PATHSTAR, JobConfig
from flame.data.batch import PackedBatch, build_batch
from flame.data.loader import explain_no_answers
from flame.data.mixture import Mixture
from flame.data.pathstar import parse_sizes
from flame.errors import UserError
from flame.models.future_lm import FutureLM
from flame.objective import Parts, compute_losses


class Validator:
    """Packs the set once, and measures a model on it: the same sequences each time and on any number of ranks.

    Args:
        held_out: read from its beginning, in an order that does not depend on the run's seed; each document at most once.

    Attributes:
        unread_sources: names of those that are drawn from and of which no sequence is in the set.

    Raises:
        UserError: the held-out documents do not fill one sequence.
    """

    def __init__(self, config: JobConfig, held_out: Mixture, rank: int, world_size: int, device: torch.device):
        self._config, self._device = config, device
        self._has_answers = config.training.loss_on == "answer"
        self._has_branches = config.model.tokenizer_path == PATHSTAR
        self._size_names = name_by_length(config) if self._has_branches else {}
        self._sources = [source.name for source in held_out.sources]
        batches = pack_once(config, held_out)
        if not batches:
            raise UserError(
                f"validation: the held-out documents have fewer than training.seq_len = {config.training.seq_len} tokens: lower "
                "validation.holdout_every, or give validation.dataset more"
            )
        if not any(batch.piece_labels.any() for batch in batches) and self._has_answers:
            raise UserError(explain_no_answers(held_out.sources[0].option, config.training))
        contents = b"".join(batch.input_ids.numpy().tobytes() for batch in batches)
        check_same_on_all_ranks("validation set", int.from_bytes(sha256(contents).digest()[:7]))
        self.num_sequences = len(batches)
        read = {batch.source for batch in batches}
        drawn = zip(self._sources, held_out.weights, strict=True)
        self.unread_sources = [name for name, weight in drawn if weight and name not in read]
        self._own = batches[rank::world_size]
        # Ranks enter each forward together: one without a sequence left runs the first again, and it does not count.
        self._rounds = -(-len(batches) // world_size)
        self._filler = batches[0]

    def run(self, model: FutureLM, with_aux: bool, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Measure; all ranks call it.

        Args:
            with_aux: compute the loss beside the next token's too.
            is_stopped: asked before each sequence; when it is true on any rank, all give up.

        Returns:
            metrics by name, or None if given up.
        """
        metrics = Metrics(self._device)
        model.eval()
        try:
            with torch.no_grad():
                for turn in range(self._rounds):
                    (votes,) = sum_over_ranks(is_stopped())
                    if votes:
                        return None
                    has_own = turn < len(self._own)
                    batch = (self._own[turn] if has_own else self._filler).to(self._device)
                    losses = model(compute_losses, batch, self._config, Parts(with_aux, hits=self._has_answers))
                    record_losses(metrics, losses, batch, self._sources, VALIDATION_PREFIX, times=int(has_own))
                    if losses.is_hit is not None:
                        self._record_answers(metrics, losses.is_hit, batch, times=int(has_own))
        finally:
            model.train()
        values = metrics.collect()
        chosen = self._config.future_encoder if self._config.uses_future else self._config.objective
        weights = {"ce_loss": 1.0, "aux_loss": chosen.loss_weight}
        found = {name: VALIDATION_PREFIX + name for name in weights if VALIDATION_PREFIX + name in values}
        return values | {VALIDATION_PREFIX + "loss": sum(weights[name] * values[key] for name, key in found.items())}

    def _record_answers(self, metrics: Metrics, is_hit: Tensor, batch: PackedBatch, times: int) -> None:
        answers = judge_answers(is_hit, batch)
        record = {"exact_match": answers.is_exact}
        if self._has_branches:
            record["first_branch"] = answers.has_second_token
        for length, size in self._size_names.items():
            record[f"exact_match/{size}"] = answers.is_exact[torch.from_numpy(answers.lengths == length).to(self._device)]
        for name, is_right in record.items():
            metrics.record_mean(VALIDATION_PREFIX + name, is_right.sum() * times, len(is_right) * times)


def name_by_length(config: JobConfig) -> dict[int, str]:
    """Sizes of the path-star graphs to validate on, by the tokens of their documents; none if there is one size alone."""
    if config.validation.dataset != PATHSTAR:
        return {}
    names: dict[int, list[str]] = {}
    for size in dict.fromkeys(parse_sizes(config.validation.dataset_name)):
        names.setdefault(size.num_tokens, []).append(str(size))
    return {length: ",".join(alike) for length, alike in names.items()} if len(names) > 1 else {}


class AnswersJudged(NamedTuple):
    """Of the A answers of a batch whose documents it holds whole."""

    is_exact: Tensor
    """bool [A]. Greedy decoding from the prompt gives the answer, up to and with the end of the text. It does exactly where each
    token of the answer scores highest behind the true tokens before it: up to the first miss, those are what decoding has
    produced."""
    has_second_token: Tensor
    """bool [A]. Its second token scores highest behind the true ones before. The answer to a path-star graph begins with the
    start node, so that is the arm taken."""
    lengths: np.ndarray
    """int64 [A]: tokens of the document, prompt included."""


def judge_answers(is_hit: Tensor, batch: PackedBatch) -> AnswersJudged:
    """Sum up is_hit, bool [T], by document."""
    is_whole = np.array([piece.start == 0 and piece.is_last for piece in batch.documents]) & (batch.piece_labels > 0)
    counts = torch.from_numpy(batch.piece_labels[is_whole]).to(is_hit.device)
    ends = batch.cu_seqlens[1:].long()[torch.from_numpy(is_whole).to(is_hit.device)]
    hits = torch.cat([is_hit.new_zeros(1, dtype=torch.long), is_hit.cumsum(0)])  # before each position
    first = ends - 1 - counts  # predicts the first token of the answer
    second = torch.minimum(first + 1, ends - 2)  # or the last one of a shorter answer
    lengths = np.array([piece.end for piece in batch.documents], dtype=np.int64)[is_whole]
    return AnswersJudged(hits[ends - 1] - hits[first] == counts, is_hit[second], lengths)


def pack_once(config: JobConfig, held_out: Mixture) -> list[PackedBatch]:
    """At most `validation.num_sequences` packed sequences, each source from its beginning and not beyond its end."""
    training = replace(config.training, seed=0)
    drawn = [index for index, weight in enumerate(held_out.weights) if weight]
    streams = {index: held_out.open_stream(index, 0, 1, training) for index in drawn}
    cursors = {index: stream.first_cursor for index, stream in streams.items()}
    batches: list[PackedBatch] = []
    turn = 0
    while streams and len(batches) < config.validation.num_sequences:
        index = held_out.choose(turn, 1)
        turn += 1
        if index not in streams:
            continue
        sequence = streams[index].next_sequence(cursors[index])
        if sequence.documents[-1].epoch > 0:
            del streams[index]
            continue
        cursors[index] = sequence.cursor
        batches.append(build_batch(sequence, len(batches)))
    return batches
