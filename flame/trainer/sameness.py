"""What must be the same on all ranks of a run: its options, its code, the libraries that decide numbers, its inputs."""

from __future__ import annotations

import importlib.metadata
import platform
from hashlib import sha256
from pathlib import Path
from typing import Any

import flame
from flame.checkpoints.resume import FREE_MODEL_KEYS, flatten
from flame.config.schema import JobConfig
from flame.data.corpus_content import describe_contents
from flame.data.encoding import fingerprint_tokenizer
from flame.runtime.sameness import reads_for_machine
from flame.trainer.named_files import CODE_OPTIONS, hash_code, list_user_code
from flame.trainer.run_record import read_git_revision
from flame.trainer.setup import RunInputs

LIBRARIES = ("torch", "transformers", "tokenizers", "torchtitan", "flash-linear-attention", "triton", "datasets", "numpy")
"""Those that decide numbers."""
PLACES = (
    "job.config_file",
    "job.dump_folder",
    "job.description",
    "model.config",
    "model.tokenizer_path",
    "checkpoint.initial_load_path",
    "checkpoint.branch_from",
    *CODE_OPTIONS,
)
"""Options whose value may be another one on each machine, since what they name is compared. Any `data_files` is too."""


def describe_program(config: JobConfig) -> dict[str, Any]:
    """Options, code and libraries of this rank, for `check_same`."""
    options = flatten(config.to_dict())
    named = {key: value for key, value in options.items() if key not in PLACES and not key.endswith(".data_files")}
    found = {**named, "python": platform.python_version(), **{f"version of {name}": _find_version(name) for name in LIBRARIES}}
    if not reads_for_machine():
        return found
    found["git revision"] = read_git_revision()
    found["hash of flame's code"] = hash_code(Path(flame.__file__).parent)
    for key, path in list_user_code(options):
        found[f"hash of {key}"] = hash_code(path)
    return found


def describe_inputs(config: JobConfig, inputs: RunInputs) -> dict[str, Any]:
    """Model configuration, tokenizer and data of this rank, for `check_same`. Reads a few documents of each source."""
    found: dict[str, Any] = {f"documents of source {name}": count for name, count in inputs.mixture.count_units().items()}
    if reads_for_machine():
        settings = flatten(inputs.model_config.to_dict())
        found |= {f"model configuration {key}": value for key, value in settings.items() if key not in FREE_MODEL_KEYS}
        found["fingerprint of the tokenizer"] = fingerprint_tokenizer(inputs.tokenizer)[:16]
        for name, content in describe_contents(config, inputs.mixture).items():
            found |= {f"{key} of source {name}": value for key, value in content.items() if key not in ("documents", "sample")}
            found[f"content of source {name}"] = sha256(repr(sorted(content["sample"].items())).encode()).hexdigest()[:16]
    return found


def _find_version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
