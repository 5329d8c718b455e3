"""Where a run's model configuration, tokenizer and first weights come from."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flame.config.addresses import find_address_fault, is_remote

BRANCH = "checkpoint.branch_from"
CHECKPOINT_MARKS = (".metadata", "trainer.json")
TOKENIZER_FILES = ("token*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


class Start(NamedTuple):
    """What a run starts from, whose configuration and tokenizer it takes where no others are named."""

    key: str
    """The option that names it."""
    path: str
    """Empty for a run that starts from the seed."""


def find_start(branch_from: str, initial_load_path: str, own_folder: Path) -> Start:
    """What a run starts from. Once it has checkpoints of its own, it no longer needs what it started from.

    Args:
        own_folder: of the run's checkpoints.
    """
    start = Start("checkpoint.initial_load_path", initial_load_path)
    if branch_from:
        start = Start(BRANCH, branch_from)
    if not os.path.isdir(os.path.expanduser(start.path)) and (own := find_own_checkpoint(own_folder)):
        return Start("job.dump_folder", own)
    return start


def find_own_checkpoint(folder: Path) -> str:
    """The newest complete checkpoint of a run that has a configuration; empty if there is none."""
    found = {
        int(match[1]): os.path.join(folder, match[0])
        for name in (os.listdir(folder) if os.path.isdir(folder) else ())
        if (match := re.fullmatch(r"step-(\d+)", name))
    }
    files = (*CHECKPOINT_MARKS, os.path.join("hf", "config.json"))
    complete = [step for step in found if all(os.path.exists(os.path.join(found[step], file)) for file in files)]
    return found[max(complete)] if complete else ""


LARGEST_FILE = 16 << 20
"""Bytes of a configuration, many times those of any. A larger file, such as /dev/zero, is something else."""


def read_small(path: str | Path) -> bytes:
    """Read a configuration file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than any configuration.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB, which no configuration is")
    return content


def check_readable(config: str) -> None:
    """Check the size of a model configuration, if it is here.

    Args:
        config: a JSON file, a folder, or a Hub name.

    Raises:
        OSError, ValueError: as `read_small`.
    """
    path = os.path.join(config, "config.json") if os.path.isdir(config) else config
    if os.path.exists(path):
        read_small(path)


def find_beside_weights(weights: str) -> str:
    """Where configuration and tokenizer of what a run starts from are; empty where that is."""
    return os.path.join(weights, "hf") if weights and is_checkpoint(Path(os.path.expanduser(weights))) else weights


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a `step-N` folder of this trainer, complete or not, and no Hugging Face folder."""
    return any(os.path.exists(folder / name) for name in CHECKPOINT_MARKS)


def looks_like_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; all else can only be meant as a path."""
    return name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1


def find_model_conflicts(config: str, tokenizer_path: str, start: Start) -> Iterator[str]:
    """One line for each of model, tokenizer and first weights that is missing or cannot be what the options say.

    Args:
        config: `model.config`. tokenizer_path: `model.tokenizer_path`.
    """
    weights, label = start.path, f'{start.key} = "{start.path}"'
    yield from _find_remote_faults({start.key: weights, "model.config": config, "model.tokenizer_path": tokenizer_path})
    if is_remote(weights) and start.key == BRANCH:
        yield f"{label} is an address, and a branch starts from a folder here: copy it"
        return
    if looks_like_path(weights) and not is_remote(weights) and not os.path.isdir(os.path.expanduser(weights)):
        yield f"{label}: no such folder"
        return
    if newest := find_checkpoint_in(weights):
        yield f'{label} is a folder of checkpoints: name one of them, such as "{newest}"'
        return
    beside = find_beside_weights(weights)
    yield from _find_config_conflicts(config, start, beside)
    if not (tokenizer_path or beside):
        yield 'model.tokenizer_path is not set: give a folder, a Hub name, or "bytes" for the built-in tokenizer'
    elif not tokenizer_path and _lacks(weights, beside, TOKENIZER_FILES):
        yield f"{label} comes without a tokenizer: name the model's in model.tokenizer_path"
    elif tokenizer_path.endswith(".py"):
        return  # of a data source of the user's own, which answers for it
    elif looks_like_path(tokenizer_path) and not is_remote(tokenizer_path) and not _is_file_or_folder(tokenizer_path):
        yield f'model.tokenizer_path = "{tokenizer_path}": no such folder or tokenizer.json'


def _find_remote_faults(paths: dict[str, str]) -> Iterator[str]:
    for key, path in paths.items():
        if is_remote(path) and (fault := find_address_fault(path)):
            yield f'{key} = "{path}": {fault}'


def _is_file_or_folder(path: str) -> bool:
    path = os.path.expanduser(path)
    return os.path.isdir(path) or os.path.isfile(path)


def find_branch_conflicts(branch_from: str, own_folder: Path) -> Iterator[str]:
    """One line if `checkpoint.branch_from` cannot be what a run starts from. What is no folder, `find_model_conflicts` reports.

    Args:
        own_folder: of the run's checkpoints.
    """
    path = os.path.expanduser(branch_from)
    if not branch_from:
        return
    if os.path.realpath(os.path.dirname(os.path.abspath(path))) == os.path.realpath(own_folder):
        yield f'checkpoint.branch_from = "{branch_from}" is in this run\'s own folder: to go back to it, set checkpoint.load_step'
    elif find_own_checkpoint(own_folder):
        return  # the branch goes on from its own
    elif not looks_like_path(branch_from) and not os.path.isdir(path):
        yield f'checkpoint.branch_from = "{branch_from}": no such folder'
    elif os.path.isdir(path) and not is_checkpoint(Path(path)) and not find_checkpoint_in(branch_from):
        yield (
            f'checkpoint.branch_from = "{branch_from}" is no step-N checkpoint folder: name one, or take the weights alone with '
            "checkpoint.initial_load_path"
        )


def _find_config_conflicts(config: str, start: Start, beside: str) -> Iterator[str]:
    source = config or beside
    if not source:
        yield "model.config is not set: give a JSON file, a folder with config.json, or a Hub name (examples: configs/models/)"
    elif not config and _lacks(start.path, source, ("config.json",)):
        yield f'{start.key} = "{start.path}" comes without a config.json: name the model\'s in model.config'
    elif os.path.exists(os.path.expanduser(source)):
        yield from _find_json_faults(source, "model.config" if config else start.key)
    elif looks_like_path(config) and not is_remote(config):
        yield f'model.config = "{config}": no such file or folder'


def find_checkpoint_in(weights: str) -> str:
    """The newest checkpoint in a folder that is none itself, but a run's or its checkpoints'."""
    folder = os.path.expanduser(weights)
    if not os.path.isdir(folder) or is_checkpoint(Path(folder)) or os.path.exists(os.path.join(folder, "config.json")):
        return ""
    marks = [
        mark for depth in ((), ("*",)) for mark in glob.glob(os.path.join(glob.escape(folder), *depth, "step-*", "trainer.json"))
    ]
    steps = (os.path.dirname(mark) for mark in marks)
    found = {int(match[1]): step for step in steps if (match := re.search(r"step-(\d+)$", step))}
    return found[max(found)] if found else ""


def _lacks(weights: str, beside: str, patterns: tuple[str, ...]) -> bool:
    """Whether the weights are a folder here, and what comes with them holds no file of these names."""
    is_local = os.path.isdir(os.path.expanduser(weights))
    return is_local and not any(glob.glob(os.path.join(glob.escape(os.path.expanduser(beside)), name)) for name in patterns)


def _find_json_faults(config: str, key: str) -> Iterator[str]:
    path = Path(os.path.expanduser(config))
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(read_small(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f'{key} = "{config}": {path.name} cannot be read as JSON ({error})'
        return
    if not isinstance(content, dict) or "model_type" not in content:
        yield f'{key} = "{config}": {path.name} has no "model_type"; it must be a Hugging Face model configuration'


def find_cache_home() -> Path:
    """Where the Hugging Face libraries keep what they fetch, by their own variables."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser()
