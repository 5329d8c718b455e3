"""Finds the sources of a checkpoint among those of the run, by what they hold and not by how they are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flame.config.data import Corpus
from flame.config.schema import JobConfig
from flame.data.corpus_content import Content, list_differences
from flame.errors import UserError

ELSEWHERE = "or start a new run in another job.dump_folder"


def match_sources(saved: dict[str, Any], config: JobConfig, contents: Mapping[str, Content]) -> dict[str, str]:
    """Names of the run's sources by their names in the checkpoint. A source of the same name and content goes first.

    Args:
        saved: the checkpoint's `trainer.json`.
        contents: of the run's sources, by name, in order.

    Raises:
        UserError: one line for each source of the checkpoint that the run lacks.
    """
    known: dict[str, Content | None] = {name: each.get("content") for name, each in saved["data"]["sources"].items()}
    sections = dict(zip(contents, config.corpora, strict=True))
    changed = {name: _list_changed_options(saved["config"], name, config, sections[name]) for name in known if name in contents}
    names = {
        name: name
        for name, content in known.items()
        if name in contents and not (list_differences(content, contents[name]) if content else changed[name])
    }
    for name, content in known.items():
        free = [other for other in contents if other not in names.values()]
        same = [other for other in free if content and not list_differences(content, contents[other])]
        if name not in names and same:
            names[name] = same[0]
    faults = []
    for name, content in known.items():
        if name in names:
            continue
        if name in contents:
            differences = list_differences(content, contents[name]) if content else []
            faults.append(_explain_other_content(name, differences, changed[name]))
        else:
            faults.append(
                f'source "{name}" of the checkpoint is not trained on any more (now: {", ".join(contents)}): give it back, with '
                f"sources.{name}.weight = 0 to draw from it no more, {ELSEWHERE}"
            )
    if faults:
        raise UserError(*faults)
    return names


def rename_sources(saved: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give the sources of a checkpoint's `trainer.json` the names that they have in this run, in place."""
    if all(old == new for old, new in names.items()):
        return
    data, counters = saved["data"], saved["counters"]
    for old, new in names.items():
        if old != new:
            data["sources"][old].setdefault("former_names", []).append((old, saved["step"]))
    data["sources"] = {names[name]: each for name, each in data["sources"].items()}
    tokens = counters["tokens_by_source"]
    kept = {name: count for name, count in tokens.items() if name not in names}
    counters["tokens_by_source"] = kept | {new: tokens[old] for old, new in names.items() if old in tokens}


def _explain_other_content(name: str, differences: list[str], changed: list[str]) -> str:
    options = f"; changed: {', '.join(changed)}" if changed else ""
    return (
        f'source "{name}" does not hold what the checkpoint was made with ({", ".join(differences) or "its options differ"}'
        f"{options}): give it the same data, which may be elsewhere, {ELSEWHERE}"
    )


def _list_changed_options(saved: dict[str, Any], name: str, config: JobConfig, section: str) -> list[str]:
    """Options that name the corpus, as `training.data_files = "new" (before: "old")`."""
    before = saved["sources"].get(name) if saved.get("sources") else saved["training"]
    if before is None:
        return []
    now = config.corpora[section]
    pairs = [(each.name, before.get(each.name, each.default), getattr(now, each.name)) for each in fields(Corpus)]
    return [f"{section}.{key} = {json.dumps(new)} (before: {json.dumps(old)})" for key, old, new in pairs if old != new]
