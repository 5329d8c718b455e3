"""Places of machines that are threads of a test."""

from __future__ import annotations

from flame.runtime.rendezvous import Place

TIMEOUT = 30.0


def place(number: int, port: int, fewest: int = 2, most: int = 2) -> Place:
    return Place(number, fewest, most, "127.0.0.1", port)
