"""TOML files that users write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from flame.config.locations import read_small

BAD_VALUE = "Invalid value (at line"
"""How tomli begins its line about a value of no type."""
VALUES = ": texts need quotes, booleans are true and false"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is no TOML; the message names the line where there is one.
    """
    content = read_small(path)
    try:
        text = content.decode()
        return tomli.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"not UTF-8 (at line {line})") from None
    except tomli.TOMLDecodeError as error:
        advice = VALUES if str(error).startswith(BAD_VALUE) else ""
        line = text.count("\n") + 1
        raise ValueError(str(error).replace("at end of document", f"at line {line}, the end") + advice) from None
