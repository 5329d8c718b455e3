"""Finds what a path names: a folder here, at a remote address, or on the Hugging Face Hub. Without network the Hub fails at once,
where transformers tries again for a minute."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from flame.config.addresses import is_remote
from flame.config.locations import CHECKPOINT_MARKS, is_checkpoint
from flame.errors import UserError, give_reason
from flame.runtime.remote import fetch

T = TypeVar("T")


def fetch_files(label: str, name: str, patterns: list[str]) -> Path:
    """Download the files of a Hub model that match the patterns, and return the folder. Files in the cache suffice.

    Args:
        label: the option and its value, for messages.

    Raises:
        UserError: as `ask_hub`.
    """
    return ask_hub(label, lambda: Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns)))


def find_folder(label: str, path: str, patterns: list[str]) -> str:
    """The path itself if it exists here, else the folder with the downloaded files of the Hub model of that name or of the remote
    folder. Of an address that ends with `.json`, that file. Of a remote checkpoint, its `hf` folder.

    Raises:
        UserError: as `ask_hub` or `flame.runtime.remote.fetch`.
    """
    if is_remote(path):
        return str(_find_remote(label, path, patterns))
    here = os.path.expanduser(path)
    return here if os.path.exists(here) else str(fetch_files(label, path, patterns))


def _find_remote(label: str, address: str, patterns: list[str]) -> Path:
    if address.endswith(".json"):
        parent, _, name = address.rpartition("/")
        return fetch(label, parent, [*patterns, name]) / name
    folder = fetch(label, address, [*patterns, *CHECKPOINT_MARKS])
    if not is_checkpoint(folder):
        return folder
    return fetch(label, address, [f"hf/{pattern}" for pattern in patterns]) / "hf"


def ask_hub(label: str, action: Callable[[], T]) -> T:
    """Run an action that asks the Hub.

    Args:
        label: the option and its value, for messages.

    Raises:
        UserError: access is restricted, there is no such model, or the Hub cannot be reached.
    """
    try:
        return action()
    except GatedRepoError as error:
        raise UserError(
            f"{label}: access to this Hub model is restricted: accept its terms on its page and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{label}: no such file or folder here, and no such model on the Hub: check the name, or log in"
        ) from error
    except Exception as error:  # no network, a full disk, a server error: huggingface_hub has no common error type
        if isinstance(error, LocalEntryNotFoundError):  # its text is of folders of the cache
            is_off = huggingface_hub.constants.HF_HUB_OFFLINE
            failure = "is not asked, since HF_HUB_OFFLINE is set" if is_off else "cannot be reached"
        else:
            failure = f"cannot give it ({give_reason(error, 200)})"
        raise UserError(
            f"{label}: no such file or folder here, and the Hub {failure}: check the name or the network, or fetch it elsewhere "
            "and give its folder"
        ) from error
