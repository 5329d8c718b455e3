"""Architectures of the user's own: Python code outside this package that registers with transformers."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from flame.errors import UserError

Registered = dict[str, type]


def import_custom_model(path: str) -> None:
    """Import the package or module of `experimental.custom_model_path`; nothing where it is empty, or imported already.

    It is imported under its own name and may import its parts relatively. Neighbours of it are importable while it is imported,
    not later. It must call `AutoConfig.register` and `AutoModelForCausalLM.register`.

    Args:
        path: a folder with `__init__.py`, or a `.py` file.

    Raises:
        UserError: there is no such code, its name is taken, it cannot be imported, it registers no causal language model, or
            does so under a `model_type` that another architecture has.
    """
    if not path:
        return
    option = f'experimental.custom_model_path = "{path}"'
    place = Path(path).expanduser().resolve()
    source = _find_source(place, option)
    name = place.name if place.is_dir() else place.stem
    if _is_imported(name, source, option):
        return
    configs, models = _list_configs(), _list_models()
    _import_from(place.parent, name, source, option)
    _check_registered(configs, models, option)


def _find_source(place: Path, option: str) -> Path:
    """The file that is run on import."""
    if not place.exists():
        raise UserError(f"{option} does not exist: name a folder with __init__.py or a .py file")
    source = place / "__init__.py" if place.is_dir() else place
    if not source.exists():
        raise UserError(f"{option} is a folder without __init__.py: add one that registers the model, or name the .py file")
    name = place.name if place.is_dir() else place.stem
    if source.suffix != ".py" or not name.isidentifier():
        raise UserError(f"{option} cannot be imported: it must be a .py file or a folder whose name is a Python identifier")
    return source


def _is_imported(name: str, source: Path, option: str) -> bool:
    """Whether exactly this code is imported already."""
    module = sys.modules.get(name)
    if module is not None and _find_file(module) == source:
        return True
    if module is not None or name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise UserError(f'{option}: "{name}" is the name of another Python module that is installed: rename it')
    return False


def _find_file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _import_from(parent: Path, name: str, source: Path, option: str) -> None:
    sys.path.insert(0, os.fspath(parent))
    importlib.invalidate_caches()
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the user's code does
        raise UserError(f"{option} cannot be imported: {_describe(error, source)}") from error
    finally:
        sys.path.remove(os.fspath(parent))


def _describe(error: Exception, source: Path) -> str:
    """What went wrong, and the line of the user's code where it did."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
    folder = os.fspath(source.parent)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    where = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {reason}"


def _list_configs() -> Registered:
    """Configurations that were registered, by model_type."""
    return dict(CONFIG_MAPPING._extra_content)


def _list_models() -> Registered:
    """Causal language models that were registered, by the name of their configuration."""
    return {key.__qualname__: value for key, value in AutoModelForCausalLM._model_mapping._extra_content.items()}


def _check_registered(configs: Registered, models: Registered, option: str) -> None:
    """Compare the registries with what they were before the import."""
    new = {name: config for name, config in _list_configs().items() if configs.get(name) is not config}
    new_models = {name: model for name, model in _list_models().items() if models.get(name) is not model}
    if not new_models:
        raise UserError(
            f"{option} registers no causal language model: it must call AutoConfig.register(model_type, YourConfig) and "
            "AutoModelForCausalLM.register(YourConfig, YourModel) with a configuration class of its own"
        )
    taken = [name for name in new if name in CONFIG_MAPPING_NAMES or name in configs]
    if taken:
        raise UserError(f'{option} registers model_type "{taken[0]}", which another architecture has: choose another name')
    without = [name for name in new_models if name not in {config.__qualname__ for config in new.values()}]
    if without:
        raise UserError(
            f"{option} registers a model for {without[0]} but not that configuration: it must call "
            "AutoConfig.register(model_type, YourConfig) too"
        )
