"""Addresses of files elsewhere, as fsspec opens them: `s3://bucket/folder`."""

from __future__ import annotations

READ_ONLY = ("http", "https")


def is_remote(path: str) -> bool:
    """Whether this is an address that fsspec opens, such as `s3://bucket/file`."""
    return "://" in path


def find_target_fault(path: str) -> str | None:
    """Why nothing can be uploaded there; None if it may be. Asks no network."""
    if not is_remote(path) or path.startswith(tuple(f"{each}://" for each in READ_ONLY)):
        return "it must be an address that can be written, such as s3://bucket/folder, gs://bucket/folder or file:///folder"
    return find_address_fault(path)


def find_address_fault(address: str) -> str | None:
    """Why nothing at this address can be opened on this machine, whatever is there; None if it may be. Asks no network."""
    import fsspec

    protocol = address.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        return f"needs a package that is not installed ({' '.join(str(error).split())}): install it"
    except ValueError:
        return f"fsspec knows no {protocol}://: check the address"
    return None
