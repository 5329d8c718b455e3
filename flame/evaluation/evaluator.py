"""Measures the language model of a run on all that `[evaluation]` and `[held_out.*]` name."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import torch
from transformers import PreTrainedTokenizerFast

from flame.config.schema import JobConfig
from flame.data.sources.registry import build_kind
from flame.errors import UserError
from flame.evaluation.held_out import read_held_out
from flame.evaluation.measured import AskedTask, HeldOutSet, Measured
from flame.evaluation.scoring import Scorer, Scores
from flame.evaluation.tasks import read_task, split_names
from flame.logging.console import EVALUATION_PREFIX
from flame.models.wrapper import TrainingModel
from flame.runtime.agreement import run_on_all
from flame.runtime.sameness import check_same


class Evaluator:
    """Reads and packs everything once. All ranks make it.

    Raises:
        UserError: a task or a held-out set cannot be read, or nothing of it can be scored.
    """

    def __init__(self, config: JobConfig, tokenizer: PreTrainedTokenizerFast, rank: int, world_size: int, device: torch.device):
        self._measured = run_on_all(lambda: read_measured(config, tokenizer))
        texts = [text for each in self._measured for text in each.texts]
        contents = b"".join(text.ids.astype("<i4").tobytes() for text in texts)
        check_same({"content of the evaluation": sha256(contents).hexdigest()[:16]})
        training = config.training
        self._scorer = Scorer(texts, training.seq_len, training.context_len, rank, world_size, device)

    def describe(self) -> list[str]:
        """A line for each task and held-out set."""
        return [each.describe() for each in self._measured]

    def run(self, model: TrainingModel, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Measure the model. All ranks call it.

        Args:
            is_stopped: called before each packed sequence. If it returns True on any rank, all ranks stop.

        Returns:
            metrics by name, the same on all ranks; None if stopped.
        """
        model.eval()
        try:
            scores = self._scorer.score(model, is_stopped)
        finally:
            model.train()
        if scores is None:
            return None
        values: dict[str, float] = {}
        start = 0
        for each in self._measured:
            end = start + len(each.texts)
            own = Scores(scores.log_probs[start:end], scores.is_greedy[start:end])
            values |= {f"{EVALUATION_PREFIX}{each.name}/{name}": value for name, value in each.measure(own).items()}
            start = end
        return values


def read_measured(config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> list[Measured]:
    """Read the held-out sets and the tasks.

    Raises:
        UserError: as `Evaluator`.
    """
    context_len, section = config.training.context_len, config.evaluation
    found: list[Measured] = []
    for name, corpus in config.held_out_corpora.items():
        kind = build_kind(corpus, name, config.get)
        found.append(HeldOutSet(kind.short_name, read_held_out(kind, corpus, tokenizer), tokenizer, context_len))
    for name in split_names(section.tasks):
        found.append(AskedTask(read_task(name, section.num_questions), tokenizer, context_len))
    for each in found:
        if not each.texts:
            raise UserError(f"evaluation: nothing of {each.name} can be scored: {each.describe()}")
    return found
