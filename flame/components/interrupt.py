"""Ctrl-C while a program is not ready for it yet."""

from __future__ import annotations

import signal


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process in silence: imports take seconds, and it would show where in them it came."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background may ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
