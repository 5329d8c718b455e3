"""Checks whether a run may resume from a checkpoint, and lists the options that have changed since."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flame.config.data import Corpus
from flame.config.schema import NAMED, JobConfig
from flame.config.types import Section, get_declaration, list_fixed
from flame.data.sources.registry import list_used
from flame.errors import UserError
from flame.objectives.registry import BUILT_IN, choose_objective, load_user_objective

FORMAT = 2
"""Format of a checkpoint's `trainer.json`. To be incremented when older checkpoints cannot be resumed any more."""

# Keys of a model's configuration that do not change what it computes in training. The ids of special tokens do not either.
FREE_MODEL_KEYS = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache")

_ABSENT = object()


def check_made_by_run(state: dict[str, Any], folder: Path) -> None:
    """Reject checkpoints that no run of this release has made, such as a converted model, which has no options or optimizer.

    Args:
        state: the checkpoint's `trainer.json`.
        folder: of the checkpoints.

    Raises:
        UserError: the checkpoint is a converted model, or has another format.
    """
    checkpoint = folder / f"step-{state['step']}"
    if not state["config"]:
        raise UserError(
            f'"{checkpoint}" is a converted model, which no run has made: move it out of there and name it in '
            "checkpoint.initial_load_path"
        )
    check_format(state, checkpoint)


def check_format(state: dict[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint that another release has made.

    Args:
        state: its `trainer.json`.
        checkpoint: its folder.

    Raises:
        UserError: it has another format.
    """
    if state.get("format") != FORMAT:
        raise UserError(
            f'"{checkpoint}" was made by another release (format {state.get("format", 1)}, this one reads {FORMAT}): continue '
            "with that release, or start a new run from its model with checkpoint.initial_load_path"
        )


def list_used_sections(config: JobConfig) -> set[str]:
    """Sections that this run reads: all but those of other objectives and of unused data sources."""
    kind = choose_objective(config)
    idle_sources, _ = list_used(config)
    user = load_user_objective(config.objective.name, config.objective.path)
    known = (*BUILT_IN.values(), *filter(None, [user]))
    idle = {name for each in known for name in each.sections} - set(kind.sections if kind else ())
    return {name for name, _ in config.list_sections() if name not in idle and name not in idle_sources}


def check_resumable(
    saved: dict[str, Any],
    saved_objective: str,
    config: JobConfig,
    objective: str,
    used_sections: Collection[str],
    label: str = "the checkpoint",
) -> None:
    """Reject changes of options that must stay fixed at a resume.

    Args:
        saved: the configuration in the checkpoint, by section. An option that it lacks counts as its default, since older
            releases behaved like that. An option that only it has is ignored.
        saved_objective, objective: names of the objective in the checkpoint and now.
        used_sections: sections that the run reads.
        label: what was made with the saved options, for error lines.

    Raises:
        UserError: one line for each option that has changed.
    """
    advice = "set it back, or start a new run in another job.dump_folder"
    lines = []
    if saved_objective != objective:
        lines.append(
            f'objective.name = "{objective}" (or its loss_weight), but {label} was made with '
            f'"{saved_objective}": they have different modules; {advice}'
        )
    before, now = _complete(saved, config), flatten(config.to_dict())
    for section, options in config.list_sections():
        if section not in used_sections or (section in config.extensions and saved_objective != objective):
            continue  # changes there have no effect, or follow from the change of objective
        for name in list_fixed(options):
            key = f"{section}.{name}"
            if key in before and now[key] != before[key]:
                lines.append(f"{key} = {json.dumps(now[key])}, but {label} was made with {json.dumps(before[key])}: {advice}")
    if lines:
        raise UserError(*lines)


def list_changes(saved: dict[str, Any], config: JobConfig) -> list[str]:
    """Lines such as `optimizer.lr: 0.001 -> 0.0005` for the changed options that `check_resumable` allows.

    Args:
        saved: as for `check_resumable`. An option that only it has is shown as `unset` now.
    """
    before, now = _complete(saved, config), flatten(config.to_dict())
    unreported = {*_list_unreported(config), *_list_new_defaults(before, config)}
    differences = _diff(before, now)
    return [f"{key}: {old} -> {new}" for key, old, new in differences if key not in unreported]


def _list_unreported(config: JobConfig) -> Iterator[str]:
    """Options that `check_resumable` compares, and those that do not change what the run computes."""
    if config.sources:  # which replace the corpus of [training]
        yield from (f"training.{each.name}" for each in fields(Corpus))
    for section, options in config.list_sections():
        fixed = list_fixed(options)
        silent = [each.name for each in fields(options) if get_declaration(each).is_silent]  # type: ignore[arg-type]
        yield from (f"{section}.{name}" for name in [*fixed, *silent])


def _list_new_defaults(before: Mapping[str, Any], config: JobConfig) -> Iterator[str]:
    """Options that the checkpoint lacks and nobody has set."""
    for section, options in config.list_sections():
        defaults = type(options)()
        for each in fields(options):  # type: ignore[arg-type]  # every section is a dataclass
            key = f"{section}.{each.name}"
            if key not in before and getattr(options, each.name) == getattr(defaults, each.name):
                yield key


def check_model(saved: dict[str, Any], model_config: dict[str, Any]) -> None:
    """Reject a model configuration that differs from the one in the checkpoint.

    Args:
        saved, model_config: Hugging Face configurations as dictionaries, in the checkpoint and now. Keys that only one of them
            has are ignored, since releases of transformers add and drop keys.

    Raises:
        UserError: one line with each changed key and both values.
    """
    shared = {key for key in saved.keys() & model_config.keys() if key not in FREE_MODEL_KEYS and not key.endswith("_token_id")}
    before, now = ({key: value for key, value in each.items() if key in shared} for each in (saved, model_config))
    differences = [f"{key} = {new} (before: {old})" for key, old, new in _diff(flatten(before), flatten(now))]
    if differences:
        raise UserError(
            f"model.config: {', '.join(differences)}: the checkpoint is of another model; set it back, or start a new run in "
            "another job.dump_folder"
        )


def check_tokenizer(saved_fingerprint: str, fingerprint: str) -> None:
    """Reject another tokenizer than that of the checkpoint.

    Raises:
        UserError: the fingerprints differ.
    """
    if fingerprint != saved_fingerprint:
        raise UserError(
            f"model.tokenizer_path: the tokenizer (fingerprint {fingerprint}) is not the one that the checkpoint was made with "
            f"({saved_fingerprint}): set it back, or start a new run in another job.dump_folder"
        )


def _complete(saved: dict[str, Any], config: JobConfig) -> dict[str, Any]:
    """The options of a checkpoint by dotted key, with defaults for options of the run's sections that it lacks."""
    defaults: dict[str, Section] = {name: type(section)() for name, section in config.list_sections()}
    known = {
        f"{name}.{each.name}": getattr(section, each.name)
        for name, section in defaults.items()
        for each in fields(section)  # type: ignore[arg-type]  # every section is a dataclass
        if (parts := name.partition("."))[0] not in NAMED or parts[2] in saved.get(parts[0], {})
    }
    found = flatten(saved)
    older = {key: spelled for (key, value), spelled in _SPELLED.items() if found.get(key) is value}
    return flatten(known) | found | older


_SPELLED: dict[tuple[str, Any], str] = {("training.float8", False): "none", ("training.float8", True): "rowwise"}
"""Values of older releases, as they are written now."""


def flatten(options: dict[str, Any]) -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key, with values as JSON would return them."""
    return dict(_walk(json.loads(json.dumps(options)), ""))


def _walk(options: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in options.items():
        leaves += _walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def _diff(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Key, old and new value as text for each key whose value differs: first the keys of `now`, then those only in `before`."""
    both = ((key, before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in now | before)
    return [(key, _show(old), _show(new)) for key, old, new in both if old != new]


def _show(value: Any) -> str:
    return "unset" if value is _ABSENT else json.dumps(value)
