"""User errors of one line."""

from __future__ import annotations

from flame.errors import UserError


def expect_one_line(error: UserError, *parts: str) -> None:
    assert len(error.lines) == 1 and str(error).isprintable(), error
    for part in parts:
        assert part in str(error)
