"""Are two runs of a seed a pair, with the same initial weights and the same data in the same order? Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields

from flame.compare.results import Result
from flame.compare.runs import read_record
from flame.config.data import Corpus
from flame.data.sources.registry import list_sections
from flame.logging.console import EVALUATION_PREFIX

CORPUS_KEYS = tuple(each.name for each in fields(Corpus))
TRAINING_KEYS = (*CORPUS_KEYS, "num_streams", "seq_len", "context_len", "gradient_accumulation_steps", "seed")
VALIDATION_KEYS = (*CORPUS_KEYS, "num_sequences", "holdout_every")
DATA_KEYS = (
    *(f"training.{name}" for name in TRAINING_KEYS),
    *(f"validation.{name}" for name in VALIDATION_KEYS),
    "model.tokenizer_path",
)
"""Options that decide which tokens a step holds and what is measured on. Tokens of the first step could agree where later ones do
not."""
LABEL_KEYS = ("training.loss_on", "training.answer_separator")
"""Options that decide which tokens a loss counts, in training and in validation."""
EVALUATION_KEYS = ("evaluation.tasks", "evaluation.num_questions")
"""Options that decide what an evaluation asks, beside the sections of held-out documents."""
HELD_OUT = "held_out"


def find_fault(one: Result, other: Result) -> str | None:
    """Why two runs are no pair, in some words; None if they are one."""
    first, second = one.first_step, other.first_step
    if first is None or second is None:
        return "what a run began with is not recorded"
    if first.get("step") != second.get("step"):
        return f"they began at step {first.get('step')} and {second.get('step')}"
    for name, what in (("weights", "initial weights differ"), ("data", "the first batches differ")):
        if name not in first or first[name] != second.get(name):
            return what
    sections = ("sources", *list_sections())
    return _list_differences(one, other, DATA_KEYS, sections)


def find_measure_fault(one: Result, other: Result, metric: str) -> str | None:
    """Why a metric of two runs is not measured on the same, in some words; None if it is."""
    if metric.startswith(EVALUATION_PREFIX):
        return _list_differences(one, other, EVALUATION_KEYS, (HELD_OUT,))
    return _list_differences(one, other, LABEL_KEYS)


def _list_differences(one: Result, other: Result, keys: Iterable[str], sections: Collection[str] = ()) -> str | None:
    """Options that differ, of these and of all in some sections, such as those of mixtures and of generated data."""
    first, second = ((read_record(each.folder) or {}).get("options", {}) for each in (one, other))
    own = sorted({key for key in (*first, *second) if key.partition(".")[0] in sections})
    different = [key for key in (*keys, *own) if first.get(key) != second.get(key)]
    return "; ".join(f"{key} = {first.get(key)} and {second.get(key)}" for key in different) or None
