"""Which family of models passes which check. Runs the suite's tables of families, and prints one row a family.

    python -m benchmarks.families OUT

`tests/attention/test_families.py` runs anywhere, most of `tests/attention/test_fla_families.py` where there is a GPU.
A cell says how many cases passed, were skipped, or were refused by the library in its own words.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.timing import Report
from tests.support import families, fla_families

REPO = Path(__file__).parent.parent
TABLES: dict[str, tuple[str, Iterable[str]]] = {
    "softmax attention": ("tests/attention/test_families.py", families.TOYS),
    "flash-linear-attention": ("tests/attention/test_fla_families.py", fla_families.TOYS),
}


def run_table(file: str, out: Path) -> dict[str, list[tuple[str, str]]]:
    """Outcomes of a test file: name of the test -> [(its parameters, "passed" | "failed" | "skipped" | "refused")]."""
    report = out / "junit.xml"
    command = [sys.executable, "-m", "pytest", file, "-q", f"--junitxml={report}"]
    subprocess.run(command, cwd=REPO, stdout=sys.stderr, check=False)
    outcomes = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        name, parameters = re.fullmatch(r"([^\[]*)(?:\[(.*)\])?", case.attrib["name"]).groups()  # type: ignore[union-attr]
        result = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        words = {"failure": "failed", "error": "failed"}
        kind = "passed" if result is None else words.get(result.tag, result.attrib.get("type", "").removeprefix("pytest."))
        outcomes[name.removeprefix("test_")].append((parameters or "", {"skip": "skipped", "xfail": "refused"}.get(kind, kind)))
    return outcomes


def belongs(parameters: str, family: str) -> bool:
    return f"-{family}-" in f"-{parameters}-"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Which family passes which check.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for families.md")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out / "families.md")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ("torch", "transformers", "flash-linear-attention", "triton")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    for kind, (file, toys) in TABLES.items():
        outcomes = run_table(file, arguments.out)
        checks = [check for check, cases in outcomes.items() if any(belongs(p, family) for p, _ in cases for family in toys)]
        rows = [[family, *(summarize(outcomes[check], family) for check in checks)] for family in toys]
        title = f"{kind}, on {where}; Python {platform.python_version()}, {versions}"
        report.table(title, ["family", *(check.replace("_", " ") for check in checks)], rows)


def summarize(cases: list[tuple[str, str]], family: str) -> str:
    counts = Counter(outcome for parameters, outcome in cases if belongs(parameters, family))
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "-"


if __name__ == "__main__":
    main(sys.argv[1:])
