"""Writes the folders that `flame.data.sources.token_folder` reads.

After any interruption it resumes and writes the same bytes. `progress.json` records how much of the files is safely on disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from flame.config.types import STRICT
from flame.data.sources.token_folder import (
    LABELS_FILE,
    MANIFEST_FILE,
    OFFSET_DTYPE,
    OFFSETS_FILE,
    TOKEN_DTYPES,
    TOKENS_FILE,
    Manifest,
    StoredLossOn,
    TokenDtype,
    read_manifest,
)
from flame.data.span_encoder import EncodedSpan, Span
from flame.errors import UserError

PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_COMMITS = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of the folder. A restart must have the same recipe."""

    __pydantic_config__ = STRICT

    dataset: str
    dataset_name: str
    dataset_split: str
    data_files: str
    text_column: str
    tokenizer_fingerprint: str
    rows: int
    chat_template: str = ""
    """SHA-256 of what renders chats; empty for other documents."""
    loss_on: StoredLossOn = "all"
    """"assistant": the folder says what the assistant wrote."""

    @property
    def files(self) -> tuple[str, ...]:
        """What is appended to."""
        return (TOKENS_FILE, OFFSETS_FILE, LABELS_FILE) if self.loss_on == "assistant" else (TOKENS_FILE, OFFSETS_FILE)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is safely on disk: the documents of the first `rows` rows."""

    __pydantic_config__ = STRICT

    recipe: Recipe
    tokenizer: str
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bad_rows: int = 0


def read_finished(out: Path, recipe: Recipe) -> Manifest | None:
    """Return the manifest of a complete folder, else None. A `progress.json` that a crash left in a complete folder is removed.

    Raises:
        UserError: the folder was made with another recipe, or is damaged.
    """
    if not (out / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(out)
    content = asdict(manifest) | {"rows": manifest.documents + manifest.bad_rows}
    finished = Recipe(**{field.name: content[field.name] for field in fields(Recipe)})
    _require_same_recipe(out, finished, recipe, manifest.tokenizer)
    (out / PROGRESS_FILE).unlink(missing_ok=True)
    return manifest


class TokenFolderWriter:
    """Appends to a folder of tokens, which is new or unfinished.

    `offsets.bin` holds the starts of the documents. `finish` adds the end of the last document.
    """

    def __init__(self, out: Path, beginning: Progress, dtype: TokenDtype):
        """
        Raises:
            UserError: the folder was started with another recipe, is being written, or was not made by flame-preprocess.
        """
        self._out, self._names = out, beginning.recipe.files
        with self._name_write_errors():
            out.mkdir(parents=True, exist_ok=True)
            if not (out / PROGRESS_FILE).exists():
                for file in self._names:
                    if (out / file).exists():
                        raise UserError(f'"{out / file}" exists without {PROGRESS_FILE} beside it: give another --out')
                _replace_file(out / PROGRESS_FILE, _to_json(beginning))
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            self._files = [os.open(out / file, flags, 0o666) for file in self._names]
        try:
            self._lock()
            self.progress = _read_progress(out, beginning.recipe)
            done = self.progress
            self._cut(done.tokens * TOKEN_DTYPES[dtype].itemsize, done.documents * OFFSET_DTYPE.itemsize, done.tokens)
        except BaseException:
            self.close()
            raise
        self._committed_at = time.monotonic()

    def append(self, span: Span, encoded: EncodedSpan) -> None:
        """Write the next span. It is safe after the next commit; commits are about a second apart."""
        progress = self.progress
        assert span.start == progress.rows
        ends = progress.tokens + np.cumsum(encoded.lengths)
        with self._name_write_errors():
            self._write(encoded.tokens, (ends - encoded.lengths).astype(OFFSET_DTYPE), encoded.labels)
            self.progress = Progress(
                recipe=progress.recipe,
                tokenizer=progress.tokenizer,
                rows=span.stop,
                documents=progress.documents + len(encoded.lengths),
                tokens=progress.tokens + len(encoded.tokens),
                bad_rows=progress.bad_rows + encoded.bad_rows,
            )
            if time.monotonic() - self._committed_at >= SECONDS_BETWEEN_COMMITS:
                self._commit()

    def finish(self, manifest: Manifest) -> None:
        """Complete the folder, so that it can be trained on."""
        with self._name_write_errors():
            self._commit()
            self._write(np.empty(0), np.array([manifest.tokens], dtype=OFFSET_DTYPE), np.empty(0))
            self._sync()
            _replace_file(self._out / MANIFEST_FILE, _to_json(manifest))
            (self._out / PROGRESS_FILE).unlink()

    def discard(self) -> None:
        """Remove all files that were written."""
        for file in (*self._names, PROGRESS_FILE):
            (self._out / file).unlink(missing_ok=True)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is writing --out "{self._out}": wait for it, or give another --out') from None
        except OSError:
            return  # a file system without locks

    def _cut(self, *sizes: int) -> None:
        """Truncate the files to their sizes at the last commit. The last size is that of labels, if there are any."""
        for file, name, size in zip(self._files, self._names, sizes, strict=False):
            if os.fstat(file).st_size < size:
                raise UserError(
                    f'"{self._out / name}" is shorter than the {size} bytes of {PROGRESS_FILE}: delete the folder to start over'
                )
            with self._name_write_errors():
                os.truncate(file, size)

    def _write(self, *contents: np.ndarray) -> None:
        """Append to each file. The last content is that of labels, if there are any."""
        for file, content in zip(self._files, contents, strict=False):
            rest = content.view(np.uint8).data
            while rest:
                rest = rest[os.write(file, rest) :]

    def _sync(self) -> None:
        for file in self._files:
            os.fsync(file)

    def _commit(self) -> None:
        self._sync()
        _replace_file(self._out / PROGRESS_FILE, _to_json(self.progress))
        self._committed_at = time.monotonic()

    @contextmanager
    def _name_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f'cannot write to --out "{self._out}" ({error.strerror}): fix that, then run the same command again to go on '
                "where this one stopped"
            ) from error


def _to_json(content: Progress | Manifest) -> str:
    """A folder without labels says nothing of them, as those of earlier releases."""
    settings = asdict(content)
    for each in (settings, settings.get("recipe", {})):
        if each.get("loss_on") == "all":
            del each["loss_on"]
    return json.dumps(settings, indent=1) + "\n"


def _replace_file(path: Path, content: str) -> None:
    """Replace a file atomically: after a crash of the machine it has either the whole old or the whole new content."""
    new = path.with_name(path.name + ".tmp")
    with open(new, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_progress(out: Path, recipe: Recipe) -> Progress:
    path = out / PROGRESS_FILE
    try:
        progress = TypeAdapter(Progress).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f'"{path}" is damaged ({type(error).__name__}): delete the folder to start over') from error
    _require_same_recipe(out, progress.recipe, recipe, progress.tokenizer)
    return progress


def _require_same_recipe(out: Path, before: Recipe, now: Recipe, tokenizer_before: str) -> None:
    differences = []
    for field in fields(Recipe):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old == new:
            continue
        if field.name == "tokenizer_fingerprint":
            differences.append(f'another tokenizer (--tokenizer_path was "{tokenizer_before}")')
        elif field.name == "rows":
            differences.append(f"{old} rows of data, now {new}")
        elif field.name == "chat_template":
            differences.append("another chat template")
        else:
            differences.append(f'--{field.name} "{old}", now "{new}"')
    if differences:
        raise UserError(f'--out "{out}" was made with {", ".join(differences)}: give the same, or another --out')
