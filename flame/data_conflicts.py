"""What must hold between the options of what is trained and validated on."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from flame.config import (
    DEFAULT_SEPARATOR,
    GENERATED,
    LOCAL_FORMATS,
    PATHSTAR,
    SIBLINGS,
    STANDARD_LIBRARY,
    TOKENS_FORMAT,
    Corpus,
    JobConfig,
)
from flame.data.pathstar import FEWEST_GRAPHS, parse_sizes
from flame.data.siblings import NUM_TOKENS

SMALLEST_SHARE = 1e-6
"""Of the largest weight: a smaller one would hardly ever be drawn."""


def find_data_conflicts(config: JobConfig, world_size: int) -> Iterator[str]:
    """One line for each option about what is read, packed, or validated on that does not suit another."""
    yield from _find_packing_conflicts(config, world_size)
    yield from _find_validation_conflicts(config)
    yield from _find_generated_conflicts(config)
    yield from _find_answer_conflicts(config)


def _find_packing_conflicts(config: JobConfig, world_size: int) -> Iterator[str]:
    training = config.training
    if training.context_len > training.seq_len:
        yield (
            f"training.context_len = {training.context_len} is more than training.seq_len = {training.seq_len}: "
            "a document's piece must fit in a packed sequence; lower the one or raise the other"
        )
    if config.sources:
        for option in fields(Corpus):
            if (value := getattr(training, option.name)) != option.default:
                yield f"training.{option.name} = {json.dumps(value)} beside [sources.NAME]: move it into a source of its own"
    for section, corpus in config.corpora.items():
        yield from find_corpus_conflicts(section, corpus)
    yield from _find_weight_conflicts(config)
    readers = world_size * max(1, training.num_workers)
    if training.num_streams % readers:
        yield (
            f"training.num_streams = {training.num_streams} is not a multiple of ranks x workers = {world_size} x "
            f"{max(1, training.num_workers)}: change training.num_workers or, for a new run, set num_streams to a multiple "
            f"of {readers}"
        )


def find_corpus_conflicts(section: str, corpus: Corpus) -> Iterator[str]:
    """Conflicts inside one section that names a corpus."""
    chosen = f'{section}.dataset = "{corpus.dataset}"'
    if corpus.dataset in (*LOCAL_FORMATS, TOKENS_FORMAT):
        if not corpus.data_files:
            what = "a folder" if corpus.dataset == TOKENS_FORMAT else "paths or globs, separated by commas"
            yield f"{chosen} needs {section}.data_files ({what})"
        elif corpus.dataset in LOCAL_FORMATS:
            for pattern in filter(None, corpus.data_files.split(",")):
                if not any(map(os.path.isfile, expand_glob(pattern))):
                    yield f'{section}.data_files: "{pattern.strip()}" matches no file'
    elif corpus.data_files:
        yield (
            f"{section}.data_files is set but {chosen} does not read files: "
            f"allowed with {', '.join((*LOCAL_FORMATS, TOKENS_FORMAT))}"
        )
    from_hub = corpus.dataset not in (STANDARD_LIBRARY, TOKENS_FORMAT, *GENERATED, *LOCAL_FORMATS)
    for option, default, has_effect in (
        ("dataset_name", "", from_hub or corpus.dataset == PATHSTAR),
        ("dataset_split", "train", from_hub),
        ("text_column", "text", from_hub or corpus.dataset in ("json", "parquet")),
    ):
        if getattr(corpus, option) != default and not has_effect:
            yield f'{section}.{option} = "{getattr(corpus, option)}" has no effect with {chosen}: leave it out'
    if corpus.streaming and corpus.dataset in (STANDARD_LIBRARY, TOKENS_FORMAT, *GENERATED):
        yield (
            f"{section}.streaming = true but {chosen} is read in place: allowed with {', '.join(LOCAL_FORMATS)} and Hub datasets"
        )


def _find_weight_conflicts(config: JobConfig) -> Iterator[str]:
    heaviest = max((source.weight for source in config.sources.values()), default=1.0)
    if heaviest == 0:
        yield "sources.NAME.weight = 0 for all sources leaves nothing to train on: raise one"
    for name, source in config.sources.items():
        if 0 < source.weight < SMALLEST_SHARE * heaviest:
            yield (
                f"sources.{name}.weight = {source.weight:g} is less than a millionth of the largest, {heaviest:g}: raise it, or "
                "set it to 0 to draw nothing"
            )


def _find_validation_conflicts(config: JobConfig) -> Iterator[str]:
    validation = config.validation
    if validation.dataset:
        yield from find_corpus_conflicts("validation", validation)
        if validation.holdout_every:
            yield (
                f'validation.dataset = "{validation.dataset}" and validation.holdout_every = {validation.holdout_every} '
                "both name a held-out set: leave one of them out"
            )
        return
    for option in fields(Corpus):
        if option.name != "dataset" and (value := getattr(validation, option.name)) != option.default:
            yield f"validation.{option.name} = {json.dumps(value)} has no effect without validation.dataset: set that too"
    if validation.interval and not validation.holdout_every:
        yield (
            f"validation.interval = {validation.interval} without held-out documents: set validation.dataset, or "
            "validation.holdout_every to keep some of the training data for it"
        )
    if validation.holdout_every == 1:
        yield "validation.holdout_every = 1 leaves nothing to train on: allowed are 0 (off) and 2 or more"
    for section, corpus in config.corpora.items() if validation.holdout_every else ():
        if corpus.streaming and corpus.dataset == "text":
            yield (
                f'{section}.dataset = "text" with streaming has one document a shard, from which validation.holdout_every = '
                f"{validation.holdout_every} cannot hold out some: set streaming = false, or give validation.dataset"
            )


def expand_glob(pattern: str) -> list[Path]:
    """Paths that a pattern from `training.data_files` stands for, sorted; `**` reaches into sub-folders."""
    # Unlike pathlib's, these and the os.path checks above take any string: one that cannot be a path matches nothing.
    return sorted(map(Path, glob.glob(os.path.expanduser(pattern.strip()), recursive=True)))


def _find_generated_conflicts(config: JobConfig) -> Iterator[str]:
    sections: dict[str, Corpus] = dict(config.corpora)
    if config.validation.dataset:
        sections["validation"] = config.validation
    for section, corpus in sections.items():
        if corpus.dataset == PATHSTAR:
            yield from _find_size_conflicts(config, f"{section}.dataset_name", corpus.dataset_name)
        if corpus.dataset in GENERATED and section != "validation" and config.validation.holdout_every:
            yield (
                f'validation.holdout_every = {config.validation.holdout_every} beside {section}.dataset = "{corpus.dataset}", '
                f'where another number is not another content: set validation.dataset = "{corpus.dataset}", which is never '
                "trained on"
            )
        if config.model.tokenizer_path in GENERATED and corpus.dataset != config.model.tokenizer_path:
            yield (
                f'model.tokenizer_path = "{config.model.tokenizer_path}" knows no text but its own, and {section}.dataset = '
                f'"{corpus.dataset}": change one of them'
            )
    used = {config.model.tokenizer_path, *(corpus.dataset for corpus in sections.values())}
    if config.model.tokenizer_path == SIBLINGS and config.training.context_len < NUM_TOKENS:
        yield f"training.context_len = {config.training.context_len} cuts pairs of siblings, of {NUM_TOKENS} tokens: raise it"
    for name in GENERATED:
        options = getattr(config, name)
        for option in fields(options) if name not in used else ():
            if (value := getattr(options, option.name)) != option.default:
                yield f'{name}.{option.name} = {value} has no effect without a dataset = "{name}": leave it out'


def _find_size_conflicts(config: JobConfig, option: str, names: str) -> Iterator[str]:
    try:
        sizes = parse_sizes(names)
    except ValueError as error:
        yield (
            f'{option} = "{names}": "{error}" is no size of path-star graphs: give arms x nodes of a path with the center, both '
            '2 to 999, such as "5x5", or several, "2x3,5x5"'
        )
        return
    labels, context_len = config.pathstar.labels, config.training.context_len
    for size in sizes:
        if labels < size.num_nodes:
            yield f"pathstar.labels = {labels} are too few for {option}: a graph {size} has {size.num_nodes} nodes: raise it"
        elif size.count_graphs(labels) < FEWEST_GRAPHS:
            yield (
                f"pathstar.labels = {labels} leaves {size.count_graphs(labels)} graphs of {option} = {size}, too few to keep "
                f"some for validation (at least {FEWEST_GRAPHS}): raise it"
            )
        if config.model.tokenizer_path == PATHSTAR and context_len < size.num_tokens:
            yield (
                f"training.context_len = {context_len} cuts the graphs {size} of {option}, which have {size.num_tokens} tokens: "
                "raise it"
            )


def _find_answer_conflicts(config: JobConfig) -> Iterator[str]:
    training = config.training
    if training.loss_on == "all" and training.answer_separator != DEFAULT_SEPARATOR:
        yield (
            f"training.answer_separator = {json.dumps(training.answer_separator)} has no effect with training.loss_on = "
            '"all": leave it out, or set loss_on to "answer"'
        )
