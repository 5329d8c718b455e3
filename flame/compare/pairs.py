"""Are two runs of a seed a pair, with the same initial weights and the same data in the same order? Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flame.compare.results import Result
from flame.compare.runs import read_record
from flame.config.data import Corpus
from flame.data.sources.registry import list_sections

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
    records = [read_record(each.folder) or {} for each in (one, other)]
    keys = [key for key in _list_data_keys(*records) if _find(records[0], key) != _find(records[1], key)]
    if keys:
        return "; ".join(f"{key} = {_find(records[0], key)} and {_find(records[1], key)}" for key in keys)
    return None


def _list_data_keys(*records: Mapping[str, Any]) -> list[str]:
    """Also those of mixtures and of generated data."""
    sections = ("sources", *list_sections())
    own = {key for record in records for key in record.get("options", {}) if key.partition(".")[0] in sections}
    return [*DATA_KEYS, *sorted(own)]


def _find(record: Mapping[str, Any], key: str) -> Any:
    return record.get("options", {}).get(key)
