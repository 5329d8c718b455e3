"""Measures the language model of a run on all that `[evaluation]` and `[held_out.*]` name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from flame.config.schema import JobConfig
from flame.data.sources.registry import build_kind
from flame.errors import UserError
from flame.evaluation.completions import Completer, read_prompts
from flame.evaluation.held_out import read_held_out
from flame.evaluation.measured import AskedTask, HeldOutSet, Measured, ProblemSet, decode
from flame.evaluation.scoring import Scorer, Scores
from flame.evaluation.tasks import read_task, split_names
from flame.logging.console import EVALUATION_PREFIX
from flame.models.wrapper import TrainingModel
from flame.runtime.agreement import run_on_all
from flame.runtime.sameness import check_same


class Completion(NamedTuple):
    """What the model makes of a prompt."""

    prompt: str
    completion: str


class Evaluated(NamedTuple):
    """Results of an evaluation."""

    metrics: dict[str, float]
    """By name, `evaluation/NAME/...`."""
    completions: list[Completion]
    """Of the prompts of `evaluation.prompts`."""


class Evaluator:
    """Reads and packs everything once. All ranks make it.

    Raises:
        UserError: a task, a held-out set or the prompts cannot be read, or nothing of them can be scored.
    """

    def __init__(self, config: JobConfig, tokenizer: PreTrainedTokenizerFast, rank: int, world_size: int, device: torch.device):
        self._tokenizer = tokenizer
        training, section = config.training, config.evaluation
        self._measured = run_on_all(lambda: read_measured(config, tokenizer))
        self._prompts, prompt_ids = run_on_all(lambda: read_prompts(section.prompts, tokenizer)) if section.prompts else ([], [])
        texts = [text for each in self._measured for text in each.texts]
        contents = b"".join(ids.astype("<i4").tobytes() for ids in (*(text.ids for text in texts), *prompt_ids))
        check_same({"content of the evaluation": sha256(contents).hexdigest()[:16]})
        self._scorer = Scorer(texts, training.seq_len, training.context_len, rank, world_size, device)

        def build_completer(
            prompts: Sequence[np.ndarray], num_tokens: int, temperature: float, needed: Sequence[int] | None = None
        ) -> Completer:
            return Completer(
                prompts,
                min(num_tokens, training.context_len),
                tokenizer,
                training.seq_len,
                training.context_len,
                rank,
                world_size,
                device,
                temperature,
                section.seed,
                needed,
            )

        self._completer = build_completer(prompt_ids, section.completion_tokens, section.temperature)
        self._solvers = [
            (each, build_completer(each.prompts, max(each.needed), 0.0, each.needed))
            for each in self._measured
            if isinstance(each, ProblemSet)
        ]

    def describe(self) -> list[str]:
        """A line for each task and held-out set, and one for the prompts."""
        lines = [each.describe() for each in self._measured]
        if self._prompts:
            cut = self._completer.num_cut
            lines.append(f"{len(self._prompts)} prompts to complete" + (f", of which {cut} lose their beginning" if cut else ""))
        return lines

    def run(self, model: TrainingModel, is_stopped: Callable[[], bool]) -> Evaluated | None:
        """Measure the model. All ranks call it.

        Args:
            is_stopped: called before each packed sequence or token. If it returns True on any rank, all ranks stop.

        Returns:
            the same results on all ranks; None if stopped.
        """
        model.eval()
        try:
            return self._run(model, is_stopped)
        finally:
            model.train()

    def _run(self, model: TrainingModel, is_stopped: Callable[[], bool]) -> Evaluated | None:
        scores = self._scorer.score(model, is_stopped)
        if scores is None:
            return None
        metrics: dict[str, float] = {}
        start = 0
        for each in self._measured:
            end = start + len(each.texts)
            own = Scores(scores.log_probs[start:end], scores.is_greedy[start:end])
            metrics |= _name(each.name, each.measure(own))
            start = end
        for problems, solver in self._solvers:
            answers = solver.complete(model, is_stopped)
            if answers is None:
                return None
            metrics |= _name(problems.name, problems.judge(answers))
        completed = self._completer.complete(model, is_stopped)
        if completed is None:
            return None
        texts = [decode(self._tokenizer, ids) for ids in completed]
        return Evaluated(metrics, [Completion(*pair) for pair in zip(self._prompts, texts, strict=True)])


def _name(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{EVALUATION_PREFIX}{name}/{metric}": value for metric, value in values.items()}


def read_measured(config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> list[Measured]:
    """Read the held-out sets and the tasks.

    Raises:
        UserError: as `Evaluator`.
    """
    context_len, section = config.training.context_len, config.evaluation
    found: list[Measured] = []
    for option, corpus in config.held_out_corpora.items():
        kind = build_kind(corpus, option, config.get)
        problems = kind.open_problems()
        if problems is not None:
            found.append(ProblemSet(kind.short_name, problems, corpus.num_documents, tokenizer, context_len))
        else:
            found.append(HeldOutSet(kind.short_name, read_held_out(kind, corpus, tokenizer), tokenizer, context_len))
    for name in split_names(section.tasks):
        found.append(AskedTask(read_task(name, section.num_questions), tokenizer, context_len))
    for each in found:
        if not each.texts:
            raise UserError(f"evaluation: nothing of {each.name} can be scored: {each.describe()}")
    return found
