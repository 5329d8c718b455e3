"""What the files that options name hold: the user's code, model configuration and tokenizer. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from flame.config.locations import TOKENIZER_FILES

CODE_OPTIONS = ("objective.path", "metrics.logger_path", "experimental.custom_model_path")
MODEL_OPTIONS = {
    "model.config": ("config.json", "*.py"),
    "model.tokenizer_path": (*TOKENIZER_FILES, "chat_template*", "*.py"),
}
"""What is read of a folder that such an option names."""


def hash_named_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the local code, model configuration and tokenizer that options name, by dotted key; none of data and weights."""
    found = {key: hash_code(path) for key, path in list_user_code(options)}
    for key, patterns in MODEL_OPTIONS.items():
        value = options.get(key)
        if value and (path := Path(value).expanduser()).exists():
            found[key] = hash_files(path, patterns)
    return found


def list_user_code(options: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Options by dotted key that name Python code here, and where it is."""
    for key, value in options.items():
        is_code = key in CODE_OPTIONS or (key.endswith(".dataset") and str(value).endswith(".py"))
        if is_code and value and (path := Path(value).expanduser()).exists():
            yield key, path


def hash_code(path: Path) -> str:
    """Hash of a Python file, or of all in a folder with their names."""
    return hash_files(path, ("**/*.py",))


def hash_files(path: Path, patterns: tuple[str, ...]) -> str:
    """Hash of a file, or of those in a folder that match, with their names."""
    digest = sha256()
    matching = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()} if path.is_dir() else {path}
    for file in sorted(matching):
        digest.update(f"{file.relative_to(path)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
