"""Text for continued pre-training: Python packages to learn, other packages and English prose to be measured on.

    python -m research.continued_corpora OUT

OUT then has three files of JSON lines, one document a line, under the key "text":

- `python.jsonl`: the Python files of the packages in LEARNED, in random order;
- `python_held_out.jsonl`: those of the packages in HELD_OUT, none of which is also in LEARNED;
- `prose_held_out.jsonl`: the pages of the Debian Administrator's Handbook in English.

The packages come from the package index through pip, the handbook from Debian through apt (or `--handbook FILE.deb`). All
versions are fixed, so the files are the same everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

LEARNED = (
    "sympy==1.14.0",
    "twisted==25.5.0",
    "wagtail==7.2",
    "xarray==2025.10.1",
    "networkx==3.5",
    "dask==2025.11.0",
    "django==5.2.8",
    "apache-airflow-core==3.3.2",
    "nltk==3.9.2",
    "holoviews==1.22.0",
    "panel==1.8.3",
    "django-cms==5.1.3",
    "reportlab==4.4.5",
    "sphinx==8.2.3",
    "bokeh==3.8.1",
    "distributed==2025.11.0",
    "ipython==9.7.0",
    "pymc==5.26.1",
    "pylint==4.0.3",
    "pytest==9.0.1",
)
HELD_OUT = ("celery==5.5.3", "jedi==0.19.2", "openpyxl==3.1.5", "pyramid==2.0.2", "Trac==1.6")
HANDBOOK = "debian-handbook=11.20220922"
SHORTEST = 200
"""Characters of a document; shorter files are mostly empty packages."""
ORDER_SEED = 0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Text for continued pre-training.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--handbook", type=Path, help="the handbook's Debian package, where apt has it not")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        seen: set[bytes] = set()
        held_out = list(read_packages(HELD_OUT, Path(folder, "held_out"), seen))
        learned = list(read_packages(LEARNED, Path(folder, "learned"), seen))
        random.Random(ORDER_SEED).shuffle(learned)
        prose = list(read_handbook(arguments.handbook, Path(folder)))
    for name, texts in (("python", learned), ("python_held_out", held_out), ("prose_held_out", prose)):
        with (arguments.out / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        print(f"{name}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB")


def read_packages(packages: tuple[str, ...], folder: Path, seen: set[bytes]) -> Iterator[str]:
    """The Python files of packages, without those whose hash is in `seen`, which it adds to."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*command, *packages], check=True)
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                content = archive.read(name) if name.endswith(".py") else b""
                text, digest = content.decode(errors="replace"), hashlib.sha256(content).digest()
                if len(text) >= SHORTEST and digest not in seen:
                    seen.add(digest)
                    yield text


def read_handbook(package: Path | None, folder: Path) -> Iterator[str]:
    """The text of each page."""
    if package is None:
        subprocess.run(["apt-get", "download", "-q", HANDBOOK], check=True, cwd=folder)
        (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(package.resolve()), str(folder / "handbook")], check=True)
    for path in sorted((folder / "handbook").rglob("html/en-US/*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        if len(text := page.text()) >= SHORTEST:
            yield text


class _Page(HTMLParser):
    """Collects what a reader sees: text outside of head, scripts and the lists of links."""

    HIDDEN = ("head", "script", "style", "nav")
    BLOCKS = ("p", "div", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "tr")

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._depth += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag in self.HIDDEN

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self._parts.append(data)

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self._parts).split("\n"))
        return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    main(sys.argv[1:])
