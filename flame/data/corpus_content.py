"""What a source holds, told by a sample of it: a run knows its corpus again under another path or name.

Compared are the number of documents, the bytes of its local files, and hashes of a few documents, evenly spaced. Of a streamed
source the number of shards, hashes of pieces of its files, and its name are compared. Of chats the messages and the chat
template are compared, not what it makes of them: that may hold the date.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

from flame.config.addresses import is_remote
from flame.config.schema import JobConfig
from flame.data.documents import TokenizedShards
from flame.data.mixture import Mixture
from flame.data.sources.base import Documents, SourceKind
from flame.data.sources.contents import Conversation
from flame.data.sources.files import find_size
from flame.data.sources.registry import build_kind

Content = dict[str, Any]
"""JSON-serializable: `documents` or `shards`, `bytes` (None without local files), `name` (of a streamed source), `chat_template`
(SHA-256 of what renders its chats), and `sample`, hashes by number."""

SAMPLED = 64
LONGEST_SAMPLE = 1 << 16
"""Characters, tokens or bytes of a document, or of a piece of a file, that are hashed."""
UNITS = ("documents", "shards", "bytes")


def describe_contents(job: JobConfig, mixture: Mixture) -> dict[str, Content]:
    """The content of each source of the training data, by its name in the run."""
    kinds = (build_kind(corpus, section, job.get) for section, corpus in job.corpora.items())
    return {source.name: describe_content(kind, source) for kind, source in zip(kinds, mixture.sources, strict=True)}


def describe_content(kind: SourceKind, source: Documents | TokenizedShards) -> Content:
    """The content of one source. Reads at most `SAMPLED` documents, or pieces of as many files."""
    files = kind.list_content_files()
    size = sum(map(find_size, files)) if files else None
    template = getattr(source, "chat_template", "")
    rendered = {"chat_template": template} if template else {}
    if not isinstance(source, TokenizedShards):
        return {"documents": len(source), "bytes": size, **rendered, "sample": _sample(len(source), _find_reader(source))}
    sample = _sample(len(files), lambda number: _read_file(files[number]))
    return {"shards": source.num_shards, "bytes": size, "name": kind.identity, **rendered, "sample": sample}


def list_differences(saved: Content, now: Content) -> list[str]:
    """What differs, such as `41 documents instead of 40`; empty if nothing does."""
    found = [
        f"{now[unit]} {unit}" + (f" instead of {saved[unit]}" if unit in saved else "")
        for unit in UNITS
        if unit in now and saved.get(unit) != now[unit]
    ]
    if saved.get("name") != now.get("name"):
        found.append(f"{now.get('name')} instead of {saved.get('name')}")
    if "chat_template" in now and saved.get("chat_template", now["chat_template"]) != now["chat_template"]:
        found.append("another chat template of model.tokenizer_path")
    if found:
        return found
    shared = [number for number in saved["sample"] if number in now["sample"]]
    other = [number for number in shared if saved["sample"][number] != now["sample"][number]]
    unit = "document" if "documents" in now else "file"
    return [f"{unit} {other[0]} is another ({len(other)} of the {len(shared)} compared are)"] if other else []


def _sample(count: int, read: Callable[[int], bytes]) -> dict[str, str]:
    """Hashes by number. What cannot be read is left out: the run reports it when it comes to it."""
    hashes = {}
    for number in _choose(count):
        try:
            hashes[str(number)] = sha256(read(number)).hexdigest()[:16]
        except Exception:  # a source of the user's own can raise anything
            continue
    return hashes


def _choose(count: int) -> Iterable[int]:
    """At most `SAMPLED` numbers below `count`, with the first and the last."""
    if count <= SAMPLED:
        return range(count)
    return [index * (count - 1) // (SAMPLED - 1) for index in range(SAMPLED)]


def _find_reader(source: Documents) -> Callable[[int], bytes]:
    """Reads a document as it is stored, neither rendered nor tokenized."""
    read: Callable[[int], Any] = getattr(source, "read_untokenized", source.read)

    def encode(number: int) -> bytes:
        document = read(number)
        if document is None:
            return b""
        if isinstance(document, Conversation):
            document = json.dumps(document.messages, sort_keys=True, default=str)
        start = document[:LONGEST_SAMPLE]
        content = start.encode("utf-8", "replace") if isinstance(start, str) else start.astype("<i8").tobytes()
        return len(document).to_bytes(8, "little") + content

    return encode


def _read_file(path: str) -> bytes:
    """The beginning, the middle and the end of a file, and its size. Of a remote file its name and its size."""
    size = find_size(path)
    if is_remote(path):
        return f"{os.path.basename(path)} {size}".encode()
    with open(path, "rb") as file:
        pieces = [size.to_bytes(8, "little")]
        for start in (0, max(size // 2 - LONGEST_SAMPLE // 2, 0), max(size - LONGEST_SAMPLE, 0)):
            file.seek(start)
            pieces.append(file.read(LONGEST_SAMPLE))
    return b"".join(pieces)
