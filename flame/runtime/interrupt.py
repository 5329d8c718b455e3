"""Ctrl-C while a program is still importing modules."""

from __future__ import annotations

import signal


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process without a traceback, while imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # jobs in the background may ignore the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
