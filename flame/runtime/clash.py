"""Whether another installed package is imported under this one's name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

DISTRIBUTION, PACKAGE = "flame-future", "flame"


def find_clash(installed: Iterable[Distribution] | None = None) -> str | None:
    """One line if another distribution, such as that of fla-org/flame, also installs a package named `flame`.

    Reads a small file of each installed distribution.

    Args:
        installed: what to look through; None is all that is installed.
    """
    found = filter(_brings_package, distributions() if installed is None else installed)
    others = sorted({_name(distribution) for distribution in found} - {DISTRIBUTION})
    if not others:
        return None
    here = Path(__file__).parent.parent
    return (
        f'The installed distribution "{others[0]}" also brings a package named {PACKAGE}; this program runs the one in {here}. '
        f"They overwrite each other: use separate environments, or pip uninstall {others[0]}"
    )


def _brings_package(distribution: Distribution) -> bool:
    """By the list of top-level names; by the list of files where there is none, as other tools than setuptools leave it."""
    names = distribution.read_text("top_level.txt")
    if names is not None:
        return PACKAGE in names.split()
    if not Path(str(distribution.locate_file(PACKAGE))).exists():  # spares reading the list
        return False
    return any(file.parts[0] == PACKAGE and len(file.parts) > 1 for file in distribution.files or ())


def _name(distribution: Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
