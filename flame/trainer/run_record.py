"""Records the resolved configuration and the code version in the run's folder."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import flame
from flame.config.help import write_config
from flame.config.run import STARTS_FILE
from flame.config.schema import JobConfig
from flame.trainer.named_files import hash_code

CONFIG_FILE = "config.toml"
DIRTY = "-dirty"
LIBRARIES = ("torch", "torchtitan", "transformers", "flash-linear-attention", "datasets")


def record_run(config: JobConfig, folder: Path, start_step: int, world_size: int) -> None:
    """Write `config.toml`, which is that of the latest start, and append a line about this start to `starts.jsonl`."""
    write_config(config, folder / CONFIG_FILE)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "start_step": start_step,
        "world_size": world_size,
        "git_revision": describe_code(),
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }
    with (folder / STARTS_FILE).open("a") as file:
        file.write(json.dumps(start) + "\n")


def describe_code() -> str | None:
    """As `read_git_revision`, with a hash of flame's code behind "-dirty": two states of it are not one."""
    revision = read_git_revision()
    is_dirty = revision is not None and revision.endswith(DIRTY)
    return f"{revision}-{hash_code(Path(flame.__file__).parent)[:8]}" if is_dirty else revision


def read_git_revision() -> str | None:
    """Commit of the code, with the suffix "-dirty" if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
