"""Whether a run may go on from a checkpoint, and what has changed since."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flame.config import JobConfig
from flame.errors import UserError
from flame.objective_config import resolve_objective

# Options that decide which tensors there are and what the data cursors mean. Those of training's corpus hold for each of
# `[sources.NAME]` too. Model and tokenizer are compared by content instead.
FIXED_OPTIONS = (
    "training.dataset",
    "training.dataset_name",
    "training.dataset_split",
    "training.data_files",
    "training.text_column",
    "training.streaming",
    "training.num_streams",
    "training.seed",
    "training.loss_on",
    "training.answer_separator",
    "pathstar.labels",
    "pathstar.graphs",
    "pathstar.seed",
    "siblings.parents",
    "siblings.children",
    "siblings.pairs",
    "siblings.seed",
    "validation.holdout_every",
    "optimizer.name",
    "optimizer.state_dtype",
    "objective.mtp_tokens",
    "future_encoder.target",
    "future_encoder.estimator_type",
    "future_encoder.learnable_temperature",
    "future_encoder.projection_dim",
    "future_predictor.head_type",
    "experimental.freeze_lm_for_infonce",
)

OBJECTIVE_SECTIONS = ("objective.", "future_encoder.", "future_predictor.")

# Options that say nothing about what the run computes.
UNTOLD_OPTIONS = ("job.config_file", "job.description")

# Keys of a model's configuration that do not change what it computes in training; so do those of special tokens, `*_token_id`.
FREE_MODEL_KEYS = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache")

_ABSENT = object()


def check_made_by_run(state: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a converted model, which knows of no options, data or optimizer.

    Args:
        state: the checkpoint's `trainer.json`.
        folder: of the checkpoints.

    Raises:
        UserError: it is one.
    """
    if not state["config"]:
        checkpoint = folder / f"step-{state['step']}"
        raise UserError(
            f'checkpoint.folder: "{checkpoint}" is a converted model, which no run has made: move it out of there and name it in '
            "checkpoint.initial_load_path"
        )


def check_resumable(saved: dict[str, Any], config: JobConfig) -> None:
    """Refuse to go on with a run under options that would make it another one.

    Args:
        saved: the configuration in the checkpoint, by section. An option that it does not know counts as its default, which is
            what a release before the option did; one that only it knows is let pass.

    Raises:
        UserError: one line for each option that has changed.
    """
    before, now = _complete(saved), flatten(dataclasses.asdict(config))
    fixed = (*FIXED_OPTIONS, "future_encoder.temperature") if _learns_temperature(config) else FIXED_OPTIONS
    changed = [key for key in now if _is_among(key, fixed) and key in before and now[key] != before[key]]
    lines = []
    learned, learning = find_saved_objective(saved), config.objective_name
    if learned != learning:
        changed = [key for key in changed if not key.startswith(OBJECTIVE_SECTIONS)]  # they follow from this one
        lines.append(
            f'objective.name = "{learning}" (with future_encoder.loss_weight = {config.future_encoder.loss_weight}), but the '
            f'run in {config.job.dump_folder} was made with "{learned}": they have different heads; set it back, or start a '
            "new run in another job.dump_folder"
        )
    lines += [
        f"{key} = {json.dumps(now[key])}, but the run in {config.job.dump_folder} was made with "
        f"{json.dumps(before[key])}: set it back, or start a new run in another job.dump_folder"
        for key in changed
    ]
    if lines:
        raise UserError(*lines)


def find_saved_objective(saved: dict[str, Any]) -> str:
    """What the run of a saved configuration, by section, has learned: a value of `objective.name`."""
    future = saved.get("future_encoder", {})
    return resolve_objective(saved.get("objective", {}).get("name"), future.get("enable"), future.get("loss_weight", 1.0))


def list_changes(saved: dict[str, Any], config: JobConfig) -> list[str]:
    """Lines such as `optimizer.lr: 0.001 -> 0.0005` for the options that differ and that `check_resumable` lets pass.

    Args:
        saved: as for `check_resumable`. An option that only it knows is `unset` now.
    """
    before, now = _complete(saved), flatten(dataclasses.asdict(config))
    told = (each for each in _diff(before, now) if not _is_among(each[0], (*FIXED_OPTIONS, *UNTOLD_OPTIONS)))
    return [f"{key}: {old} -> {new}" for key, old, new in told]


def check_model(saved: dict[str, Any], model_config: dict[str, Any]) -> None:
    """Refuse to go on with the weights of one model in another.

    Args:
        saved, model_config: Hugging Face configurations as dictionaries, in the checkpoint and now. Keys that only one of them
            has are let pass: releases of the library add and drop some.

    Raises:
        UserError: one line that names each key with both values.
    """
    shared = {key for key in saved.keys() & model_config.keys() if key not in FREE_MODEL_KEYS and not key.endswith("_token_id")}
    before, now = ({key: value for key, value in each.items() if key in shared} for each in (saved, model_config))
    differences = [f"{key} = {new} (before: {old})" for key, old, new in _diff(flatten(before), flatten(now))]
    if differences:
        raise UserError(
            f"model.config: {', '.join(differences)}: the checkpoint is of another model; set it back, or start a new run in "
            "another job.dump_folder"
        )


def check_sources(saved: list[str], names: list[str]) -> None:
    """Refuse to go on without a source of the checkpoint: under another name it would begin again.

    Raises:
        UserError: one line for each source that is missing.
    """
    missing = [
        f'source "{name}" of the checkpoint is not trained on any more (now: {", ".join(names)}): give it back under its name, '
        f"with sources.{name}.weight = 0 to draw from it no more, or start a new run in another job.dump_folder"
        for name in saved
        if name not in names
    ]
    if missing:
        raise UserError(*missing)


def check_tokenizer(saved_fingerprint: str, fingerprint: str) -> None:
    """Refuse to go on with another tokenizer.

    Raises:
        UserError: the fingerprints differ.
    """
    if fingerprint != saved_fingerprint:
        raise UserError(
            f"model.tokenizer_path: the tokenizer (fingerprint {fingerprint}) is not the one that the checkpoint was made with "
            f"({saved_fingerprint}): set it back, or start a new run in another job.dump_folder"
        )


def _complete(saved: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint by dotted key, with defaults for those that it does not know."""
    return flatten(dataclasses.asdict(JobConfig())) | flatten(saved)


def _is_among(key: str, options: tuple[str, ...]) -> bool:
    section, _, name = key.rpartition(".")
    return key in options or (section.startswith("sources.") and f"training.{name}" in options)


def _learns_temperature(config: JobConfig) -> bool:
    """Whether the option is but the start of something learned, which the checkpoint holds."""
    future = config.future_encoder
    return config.uses_future and (future.learnable_temperature or future.estimator_type == "bilinear")


def flatten(options: dict[str, Any]) -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key, their values as they would come back from JSON."""
    return dict(_walk(json.loads(json.dumps(options)), ""))


def _walk(options: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in options.items():
        leaves += _walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def _diff(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Key, old and new value as text, for each key whose value differs; keys of now come first, in their order."""
    both = ((key, before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in now | before)
    return [(key, _show(old), _show(new)) for key, old, new in both if old != new]


def _show(value: Any) -> str:
    return "unset" if value is _ABSENT else json.dumps(value)
