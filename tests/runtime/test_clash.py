"""Another package under this one's name is said in one line."""

from __future__ import annotations

from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from flame.runtime.clash import find_clash


def install(folder: Path, name: str, top_level: str | None, files: str = "") -> PathDistribution:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(files)
    if top_level is not None:
        (info / "top_level.txt").write_text(top_level)
    return PathDistribution(info)


@pytest.mark.parametrize(
    "name, top_level, files, clashes",
    [
        ("flame", "flame\n", "", True),
        ("FLA_org.flame", None, "flame/train.py,,\n", True),
        ("flame-graphs", None, "flame_graphs/draw.py,,\n", False),
        ("numpy", "numpy\n", "", False),
        ("hatch-built", None, "flame/draw.py,,\n", True),
        ("Flame_Future", "flame\n", "", False),
    ],
)
def test_a_clash_is_one_line(tmp_path, name, top_level, files, clashes):
    (tmp_path / "flame").mkdir()
    own = install(tmp_path, "flame-future", "flame\n") if name != "Flame_Future" else install(tmp_path, "pip", "pip\n")
    line = find_clash([own, install(tmp_path, name, top_level, files)])
    assert (line is not None) == clashes
    if line is not None:
        assert "\n" not in line and name.lower().replace("_", "-").replace(".", "-") in line


def test_this_environment_is_read():
    assert find_clash() is None or "also brings a package named flame" in str(find_clash())
