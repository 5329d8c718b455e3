"""Data sources, opened from options; options read with the sources' sections and rules alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from flame.config.check import list_unused
from flame.config.parse import parse_config
from flame.config.schema import Corpus, JobConfig
from flame.config.types import Section
from flame.data.documents import TokenizedShards, open_documents
from flame.data.sources.base import Documents, SourceKind, TextRows, TextShards, open_texts
from flame.data.sources.registry import build_kind, find_data_conflicts, list_sections, list_used, load_user_sections
from flame.errors import UserError

MODEL = ["--model.config", "m.json", "--model.tokenizer_path", "bytes"]


def choose_kind(corpus: Corpus, section: str = "training", options: Section | None = None) -> SourceKind:
    """The source that a section names, with these options of its own or their defaults."""
    return build_kind(corpus, section, lambda kind: options if isinstance(options, kind) else kind())


def open_source(corpus: Corpus, section: str = "training", options: Section | None = None) -> TextRows | TextShards:
    return open_texts(choose_kind(corpus, section, options))


def open_ids(corpus: Corpus, section: str, tokenizer: Any, options: Section | None = None) -> Documents | TokenizedShards:
    return open_documents(choose_kind(corpus, section, options), tokenizer)


def read_job(argv: list[str]) -> JobConfig:
    """Parse a command line with the sections and rules of data sources only."""

    def find_sections(typed: Mapping[str, Any]) -> tuple[dict[str, type[Section]], list[str]]:
        named = [(key.removesuffix(".dataset"), value) for key, value in typed.items() if key.endswith(".dataset")]
        return {**list_sections(), **load_user_sections(named)}, []

    return parse_config(argv, 1, find_sections, find_data_conflicts)[0]


def read_faults(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_job(argv)
    return caught.value.lines


def list_unused_data_options(argv: list[str]) -> list[str]:
    job = read_job(argv)
    return list_unused(job, *list_used(job))
