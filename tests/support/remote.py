"""Places elsewhere: the memory file system of fsspec, and web servers."""

from __future__ import annotations

import http.server
import io
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path

import fsspec


def put(folder: Path, address: str) -> None:
    """Copy a folder to an address of the memory file system."""
    memory = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            memory.pipe_file(f"{address}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def read_memory(address: str) -> dict[str, bytes]:
    """Contents of all files at an address, by path."""
    memory = fsspec.filesystem("memory")
    root = memory._strip_protocol(address)
    return {name.removeprefix(root + "/"): memory.cat_file(name) for name in memory.find(root)}


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, gets: Counter[str], lists: bool, **settings: object):
        self.gets, self.lists = gets, lists
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.gets[self.path] += 1
        super().do_GET()

    def list_directory(self, path: str) -> io.BytesIO | None:  # type: ignore[override]
        if self.lists:
            return super().list_directory(path)  # type: ignore[return-value]
        self.send_error(404)
        return None

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve(folder: Path, *, lists: bool) -> Iterator[tuple[str, Counter[str]]]:
    """Serve a folder by http.

    Args:
        lists: show what a folder holds.

    Yields:
        its address, and how often each path was got.
    """
    gets: Counter[str] = Counter()
    handler = partial(_Handler, directory=str(folder), gets=gets, lists=lists)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, redirect_stderr(io.StringIO()):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", gets
        finally:
            server.shutdown()
