"""Which module may import which: folders form layers without a cycle, and tests share helpers through tests/support."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO

LAYERS = (
    ("train", "launch"),
    ("cli",),
    ("compare",),
    ("trainer",),
    ("evaluation",),
    ("library",),
    ("weights",),
    ("checkpoints",),
    ("logging",),
    ("objectives",),
    ("models",),
    ("optimizers",),
    ("attention",),
    ("kernels",),
    ("data",),
    ("runtime",),
    ("config",),
    ("errors",),
)
"""Of flame's folders and files, from the top: each imports only what is in its own layer or below."""
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
TESTS = sorted(path.relative_to(REPO).as_posix() for path in (REPO / "tests").rglob("test_*.py"))


def list_modules(package: str) -> dict[str, Path]:
    """Dotted name -> file. A folder goes by its own name."""
    paths = {path.relative_to(REPO).with_suffix(""): path for path in (REPO / package).rglob("*.py")}
    return {
        ".".join(parts).removesuffix(".__init__"): path for parts, path in ((name.parts, path) for name, path in paths.items())
    }


def list_imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports anywhere: at its top, in functions, for type checkers."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{base}.{alias.name}" in modules:
                    yield f"{base}.{alias.name}"
                elif base in modules:
                    yield base


FLAME = list_modules("flame")
IMPORTS = {(name, other) for name, path in FLAME.items() for other in list_imports(name, path, FLAME) if other != "flame"}


def folder_of(module: str) -> str:
    """`flame.data.order` -> `data`, `flame.train` -> `train`, `flame` -> ``."""
    return [*module.split("."), ""][1]


def test_every_module_is_in_a_layer():
    assert {folder_of(module) for module in FLAME} - {""} == set(DEPTH)


def test_the_page_of_the_layout_lists_the_layers():
    page = (REPO / "docs" / "layout.md").read_text()
    assert f"\n{' > '.join(', '.join(names) for names in LAYERS)}\n" in page


def test_modules_import_from_their_own_layer_or_below():
    wrong = {(name, other) for name, other in IMPORTS if name != "flame" and DEPTH[folder_of(name)] > DEPTH[folder_of(other)]}
    assert not wrong


def test_folders_form_no_cycle():
    """By removing, again and again, the folders that import none of those left."""
    edges = {(folder_of(name), folder_of(other)) for name, other in IMPORTS}
    needs = {folder: {b for a, b in edges if a == folder} - {folder} for folder in DEPTH}
    while free := {folder for folder, others in needs.items() if not others}:
        needs = {folder: others - free for folder, others in needs.items() if folder not in free}
    assert not needs


def test_configuration_imports_only_itself_and_the_errors():
    of_configuration = {(name, other) for name, other in IMPORTS if folder_of(name) == "config"}
    assert not {(name, other) for name, other in of_configuration if folder_of(other) not in ("config", "errors")}


@pytest.mark.parametrize("path", TESTS)
def test_no_test_module_imports_another(path):
    modules = list_modules("tests")
    name = path.removesuffix(".py").replace("/", ".")
    assert not [other for other in list_imports(name, REPO / path, modules) if other.rpartition(".")[2].startswith("test_")]
