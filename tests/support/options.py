"""Command lines, and what they come to."""

from __future__ import annotations

from typing import Any

import pytest

from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.trainer.options import build_table, read_options

MODEL = ["--model.config", "m.json", "--model.tokenizer_path", "bytes"]


TABLE = build_table()
"""All options of a run without code of the user's own."""


def list_values(job: JobConfig) -> dict[str, Any]:
    """Every option's value by section, also of sections that nobody has asked for."""
    for kind in TABLE.extensions.values():
        job.get(kind)
    return job.to_dict()


def read_mistakes(argv: list[str], world_size: int = 1) -> list[str]:
    """The lines of what is wrong with a command line."""
    with pytest.raises(UserError) as caught:
        read_options(argv, world_size)
    return caught.value.lines
