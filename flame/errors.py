"""Mistakes of the user, told apart from faults of the program."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """A mistake that the user can put right: one line a mistake, printed without a traceback.

    Each line names the key or file, the value, what is allowed and what to do. What a value or a library's message holds of line
    breaks and other characters that do not print is shown escaped.
    """

    EXIT_CODE = 2

    def __init__(self, *lines: str):
        self.lines = [_escape_unprintable(line) for line in lines]
        super().__init__("\n".join(self.lines))


class MachineFault(UserError):
    """A fault of the machine, such as a process killed for want of memory: as plain a line, and the same command may succeed."""

    EXIT_CODE = 1


def give_reason(error: BaseException, length: int = 300) -> str:
    """What an error of a library says, in one line for the user, which shows where it is cut."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= length else f"{reason[: length - 4]} ..."


def end_on_user_error(main: Callable[P, int]) -> Callable[P, int]:
    """Make a command's `main` print the user's mistakes on stderr and return `UserError.EXIT_CODE`."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(error, file=sys.stderr)
            return error.EXIT_CODE

    return run


def _escape_unprintable(text: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
