"""Finds the kind of source by the value of `dataset`, and checks the options of the sources of a run. Loads no data."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from flame.config.check import call_rules
from flame.config.schema import Corpus, JobConfig, list_core_sections
from flame.config.table import find_section_fault
from flame.config.types import Section
from flame.data.sources.base import USER_SUFFIX, SourceKind, TextRows, open_texts
from flame.data.sources.csv import Csv
from flame.data.sources.hub import HubDataset, is_possible_name
from flame.data.sources.json_lines import JsonLines
from flame.data.sources.parquet import Arrow, Parquet
from flame.data.sources.standard_library import StandardLibrary
from flame.data.sources.text import TextFiles
from flame.data.sources.tokens import Tokens
from flame.data.tasks.pathstar import Pathstar
from flame.data.tasks.reasoning_gym import ReasoningGym
from flame.data.tasks.siblings import Siblings
from flame.errors import UserError
from flame.runtime.user_code import find_user_class

BUILT_IN: dict[str, type[SourceKind]] = {
    kind.name: kind
    for kind in (StandardLibrary, TextFiles, JsonLines, Csv, Parquet, Arrow, Tokens, Pathstar, Siblings, ReasoningGym)
}
LIKENESS = 0.8
"""Similarity from which an unknown name counts as a misspelt built-in one."""

FindOptions = Callable[[type[Section]], Section]


def find_kind(dataset: str, section: str) -> type[SourceKind]:
    """The kind of source that `{section}.dataset` names.

    Raises:
        UserError: there is no such source, or a user's file cannot be loaded or defines no source.
    """
    if (built_in := _find_built_in(dataset)) is not None:
        return built_in
    option = f'{section}.dataset = "{dataset}"'
    if dataset.endswith(USER_SUFFIX):
        return _load_user_kind(dataset, option)
    if fault := _find_name_fault(dataset, section):
        raise UserError(f"{option} {fault}")
    return HubDataset


def build_kind(corpus: Corpus, section: str, find_options: FindOptions) -> SourceKind:
    """The source that a section names, not yet opened.

    Args:
        find_options: returns the options of a kind that has its own section (`JobConfig.get`).

    Raises:
        UserError: as `find_kind`.
    """
    kind = find_kind(corpus.dataset, section)
    return kind(corpus, section, find_options(kind.Options) if kind.Options else None)


def open_text_source(corpus: Corpus, section: str) -> tuple[SourceKind, TextRows]:
    """Open a source of texts that can be read at any place, for a command outside of a run.

    Raises:
        UserError: the options or the data are wrong, or the source has no texts or has options of its own.
    """
    kind = find_kind(corpus.dataset, section)
    if kind.Options is not None:
        option = f'{section}.dataset = "{corpus.dataset}"'
        raise UserError(f"{option} has options of its own, [{kind.Options.section}], so it is read in training runs only")
    source = kind(corpus, section)
    if kind is Tokens:
        raise UserError(f"{source.option} is tokens already: give text")
    if faults := list(find_source_conflicts(source, JobConfig())):
        raise UserError(*faults)
    rows = open_texts(source)
    if hasattr(rows, "num_shards"):
        raise UserError(f"{source.option} can only be read in order, shard by shard: train on it as it is")
    return source, rows


def find_tokenizer_kind(path: str) -> type[SourceKind] | None:
    """The kind whose own tokenizer `model.tokenizer_path` names; None if it names no such tokenizer.

    Raises:
        UserError: a user's file cannot be loaded or defines no source.
    """
    if path.endswith(USER_SUFFIX):
        kind: type[SourceKind] | None = _load_user_kind(path, f'model.tokenizer_path = "{path}"')
    else:
        kind = BUILT_IN.get(path)
    return kind if kind is not None and kind.has_tokenizer else None


def is_from_hub(dataset: str) -> bool:
    """Whether a valid value of `dataset` is a dataset on the Hub, not a local folder."""
    return (
        _find_built_in(dataset) is None and not dataset.endswith(USER_SUFFIX) and not os.path.isdir(os.path.expanduser(dataset))
    )


def _find_built_in(dataset: str) -> type[SourceKind] | None:
    """The built-in kind that a value of `dataset` names, such as "text" or "reasoning_gym:countdown"."""
    head, colon, _ = dataset.partition(":")
    return BUILT_IN.get(dataset) if not colon else ReasoningGym if head == ReasoningGym.name else None


def list_sections() -> dict[str, type[Section]]:
    """Sections of the built-in kinds' own options, by name."""
    return {kind.Options.section: kind.Options for kind in BUILT_IN.values() if kind.Options}


def load_user_sections(datasets: Iterable[tuple[str, Any]]) -> dict[str, type[Section]]:
    """Sections of the options of users' sources, by name. Sources that cannot be loaded are left out: `find_data_conflicts`
    reports them.

    Args:
        datasets: section and typed value of each `dataset`.
    """
    found: dict[str, type[Section]] = {}
    for section, dataset in datasets:
        if isinstance(dataset, str) and dataset.endswith(USER_SUFFIX):
            try:
                kind = find_kind(dataset, section)
            except UserError:
                continue
            if kind.Options is not None:
                found.setdefault(kind.Options.section, kind.Options)
    return found


def find_data_conflicts(job: JobConfig) -> Iterator[str]:
    """Yield one line for each option that would make the data of training or validation wrong."""
    yield from dict.fromkeys(_find_all_conflicts(job))  # without duplicates: training and validation may break the same rule


def _find_all_conflicts(job: JobConfig) -> Iterator[str]:
    tokenizer_kind = None
    try:
        tokenizer_kind = find_tokenizer_kind(job.model.tokenizer_path)
    except UserError as error:
        yield from error.lines
    for section, corpus in job.read_corpora.items():
        try:
            kind = find_kind(corpus.dataset, section)
        except UserError as error:
            yield from error.lines
            continue
        if kind.Options and not isinstance(job.extensions.get(kind.Options.section, kind.Options()), kind.Options):
            used = f"its section [{kind.Options.section}] is already used by another source"
            yield f'{section}.dataset = "{corpus.dataset}": {used}: rename it'
            continue
        source = build_kind(corpus, section, job.get)
        yield from find_source_conflicts(source, job)
        if tokenizer_kind is not None and not isinstance(source, tokenizer_kind):
            yield (
                f'model.tokenizer_path = "{job.model.tokenizer_path}" knows no text but its own, and {source.option}: change one '
                "of them"
            )


def find_source_conflicts(source: SourceKind, job: JobConfig) -> Iterator[str]:
    """Like `find_data_conflicts`, for one source and its own section."""
    if source.corpus.data_files and "data_files" not in source.uses:  # the run would read another corpus
        readers = ", ".join(f'"{name}"' for name, kind in BUILT_IN.items() if "data_files" in kind.uses)
        yield f"{source.section}.data_files is set but {source.option} does not read files: allowed with {readers}"
    yield from call_rules(source.find_conflicts, job)
    if source.options is not None:
        yield from call_rules(source.options.find_conflicts, job, source.options.section)


def list_used(job: JobConfig) -> tuple[set[str], dict[str, frozenset[str]]]:
    """Which options of sources this run reads, for `flame.config.check.list_unused`. The options must be valid.

    Returns:
        sections of sources that the run does not read; and, by section of each corpus, the options of `Corpus` that its source
        reads.
    """
    kinds = {section: find_kind(corpus.dataset, section) for section, corpus in job.read_corpora.items()}
    tokenizer_kind = find_tokenizer_kind(job.model.tokenizer_path)
    used = {kind.Options.section for kind in [*kinds.values(), *filter(None, [tokenizer_kind])] if kind.Options}
    known = {*list_sections(), *load_user_sections([("validation", job.validation.dataset)])}
    return (known & set(job.extensions)) - used, {section: kind.uses for section, kind in kinds.items()}


def _load_user_kind(path: str, option: str) -> type[SourceKind]:
    kind = find_user_class(path, option, SourceKind, "a data source")  # type: ignore[type-abstract]
    if inspect.isabstract(kind):
        raise UserError(f"{option}: {kind.__name__} does not define {' and '.join(sorted(kind.__abstractmethods__))}()")
    if not kind.name.isidentifier() or kind.name in BUILT_IN:
        raise UserError(
            f'{option}: {kind.__name__}.name = "{kind.name}": it must be a Python identifier that no built-in source has'
        )
    if unknown := sorted(set(kind.uses) - _list_corpus_options()):
        allowed = ", ".join(sorted(_list_corpus_options()))
        raise UserError(f"{option}: {kind.__name__}.uses names {', '.join(unknown)}: allowed are {allowed}")
    if kind.Options is not None and (fault := _find_section_fault(kind.Options)):
        raise UserError(f"{option}: {kind.__name__}.Options{fault}")
    return kind


def _list_corpus_options() -> set[str]:
    return set(Corpus.__dataclass_fields__) - {"dataset"}


def _find_section_fault(options: Any) -> str | None:
    if fault := find_section_fault(options, Section):
        return f" {fault}"
    if not options.section.isidentifier() or options.section in (*list_core_sections(), *list_sections()):
        return f'.section = "{options.section}": it must be a Python identifier that no other table has'
    return None


def _find_name_fault(dataset: str, section: str) -> str | None:
    """Why this cannot be the name of a Hub dataset, with a suggestion; None if it can be."""
    if os.path.isdir(os.path.expanduser(dataset)):
        return None  # a folder in the Hub's layout, which `datasets` reads like the Hub
    for kind in BUILT_IN.values():
        if any(suffix in kind.suffixes for suffix in PurePath(dataset.lower()).suffixes):
            return f'is a file: write {section}.dataset = "{kind.name}" with {section}.data_files = "{dataset}"'
    if "/" not in dataset:
        likely = difflib.get_close_matches(dataset.lower(), BUILT_IN, n=1, cutoff=LIKENESS)
        if likely:
            return f'is no kind of source: did you mean "{likely[0]}"? (a dataset of the Hub with this name is "owner/{dataset}")'
    if not is_possible_name(dataset):
        names = ", ".join(f'"{name}"' for name in BUILT_IN)
        return (
            f'is no source: allowed are {names}, a dataset of the Hub ("owner/name"), an existing folder of one, or a file '
            f'with a source of your own ("my_source{USER_SUFFIX}")'
        )
    return None
