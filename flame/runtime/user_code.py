"""Imports the user's own Python code: an objective, a data source, a metric logger, an architecture."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from flame.errors import UserError, give_reason

T = TypeVar("T")


def import_user_code(path: str, label: str) -> ModuleType:
    """Import a package or module outside the import path, once.

    It is imported under its own name, and may use relative imports. During its import it can also import its neighbors.

    Args:
        path: a folder with `__init__.py`, or a `.py` file.
        label: how error lines name the option and its value.

    Raises:
        UserError: there is no such code, another module has its name, or it cannot be imported.
    """
    try:
        location = Path(path).expanduser().resolve()
        source = _find_source(location, label)
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a null character, the home of nobody
        raise UserError(f"{label} cannot be a file ({getattr(error, 'strerror', None) or error}): choose another name") from error
    name = location.name if location.is_dir() else location.stem
    if not _is_imported(name, source, label):
        _import_from(location.parent, name, source, label)
    return sys.modules[name]


def find_user_class(path: str, label: str, base: type[T], what: str) -> type[T]:
    """The class in a user's file that is derived from `base`.

    Args:
        what: such as "an objective", for error lines.

    Raises:
        UserError: as in `import_user_code`, or the file does not define exactly one such class.
    """
    module = import_user_code(path, label)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    leaves = [each for each in found if not any(other is not each and issubclass(other, each) for other in found)]
    if len(leaves) != 1:
        names = ", ".join(sorted(each.__name__ for each in leaves)) or "none"
        raise UserError(
            f"{label} must define {what}, exactly one class derived from {base.__module__}.{base.__name__}: it has {names}"
        )
    return leaves[0]


def _find_source(location: Path, label: str) -> Path:
    """The file that is run on import."""
    if not location.exists():
        raise UserError(f"{label} does not exist: name a folder with __init__.py or a .py file")
    source = location / "__init__.py" if location.is_dir() else location
    if not source.exists():
        raise UserError(f"{label} is a folder without __init__.py: add one, or name the .py file")
    name = location.name if location.is_dir() else location.stem
    if source.suffix != ".py" or not name.isidentifier():
        raise UserError(f"{label} cannot be imported: it must be a .py file or a folder whose name is a Python identifier")
    return source


def _is_imported(name: str, source: Path, label: str) -> bool:
    """Whether this file is already imported under this name."""
    module = sys.modules.get(name)
    if module is not None and _find_file(module) == source:
        return True
    spec = importlib.util.find_spec(name) if module is None else None
    is_itself = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == source
    if module is not None or name in sys.stdlib_module_names or (spec is not None and not is_itself):
        raise UserError(f'{label}: "{name}" is the name of another Python module that is installed: rename it')
    return False


def _find_file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _import_from(parent: Path, name: str, source: Path, label: str) -> None:
    sys.path.insert(0, os.fspath(parent))
    importlib.invalidate_caches()
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise UserError(f"{label} cannot be imported: {_describe(error, source)}") from error
    finally:
        sys.path.remove(os.fspath(parent))


def _describe(error: BaseException, source: Path) -> str:
    """The error, with the line of the user's code that raised it."""
    reason = give_reason(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    folder = os.fspath(source.parent)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    where = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {reason}"
