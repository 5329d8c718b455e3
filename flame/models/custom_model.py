"""Custom architectures: a user's Python code that registers a model with transformers."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from flame.errors import UserError
from flame.runtime.user_code import import_user_code

Registered = dict[str, type]


def import_custom_model(path: str) -> None:
    """Import the package or module of `experimental.custom_model_path`, once.

    It must call `AutoConfig.register` and `AutoModelForCausalLM.register`.

    Args:
        path: a folder with `__init__.py`, or a `.py` file. Nothing is imported if it is empty.

    Raises:
        UserError: as `import_user_code`; or it registers no causal language model, or a `model_type` that is taken.
    """
    if not path:
        return
    option = f'experimental.custom_model_path = "{path}"'
    configs, models = _list_configs(), _list_models()
    module = import_user_code(path, option)
    if not hasattr(module, _CHECKED):
        _check_registered(configs, models, option)
        setattr(module, _CHECKED, True)


_CHECKED = "__flame_registered__"
"""Attribute that marks a module as checked: importing it again registers nothing new."""


def _list_configs() -> Registered:
    """Registered configurations by model_type."""
    return dict(CONFIG_MAPPING._extra_content)


def _list_models() -> Registered:
    """Registered causal language models by the name of their configuration class."""
    return {key.__qualname__: value for key, value in AutoModelForCausalLM._model_mapping._extra_content.items()}


def _check_registered(configs: Registered, models: Registered, option: str) -> None:
    """Check what the import has added to the registries.

    Args:
        configs, models: the registries before the import.
    """
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
