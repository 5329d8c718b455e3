"""Mistakes of the user, told apart from faults of the program."""


class UserError(Exception):
    """A mistake that the user can put right: one line a mistake, printed without a traceback.

    Each line names the key or file, the value, what is allowed and what to do.
    """

    EXIT_CODE = 2

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = list(lines)
