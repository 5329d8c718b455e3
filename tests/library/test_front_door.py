"""`from flame import ...`: what is there, what it costs, and the page that describes it."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import flame

REPO = Path(__file__).parents[2]


def test_all_names_are_there_and_no_others():
    assert all(getattr(flame, name) is not None for name in flame.__all__)
    assert set(flame.__all__) == set(flame._MODULES) and set(flame.__all__) <= set(dir(flame))
    with pytest.raises(AttributeError, match="no attribute 'build_future_mask_from_cu'"):
        _ = flame.build_future_mask_from_cu  # it leaks


def test_importing_it_imports_no_torch():
    code = "import sys, flame, flame.errors; dir(flame); from flame import UserError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "library.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
    assert "num_anchors" in capsys.readouterr().out


def test_console_scripts_are_mains_that_return_their_exit_code():
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert all(name.startswith("flame-") for name in scripts) and len(scripts) == 10
    for target in scripts.values():
        module, _, function = target.partition(":")
        if (REPO / (module.replace(".", "/") + ".py")).exists():
            main = getattr(importlib.import_module(module), function)
            assert str(inspect.signature(main)) == "(argv: 'list[str] | None' = None) -> 'int'", target


@pytest.mark.slow
def test_it_installs_and_its_scripts_run_from_any_folder(tmp_path):
    """Beside the packages that are here: what pip would fetch is not fetched."""
    pytest.importorskip("setuptools")
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)  # the older one of venv
    options = ["install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(REPO)]
    subprocess.run([python, "-m", "pip", *options], check=True, timeout=300)
    for command in (["flame-leak-check", "--help"], ["flame-audit", str(tmp_path)], ["flame-plot", "nowhere"]):
        done = subprocess.run(
            [python.parent / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == (0 if "--help" in command else 2), done.stderr
        assert "Traceback" not in done.stderr
