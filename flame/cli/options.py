"""Print docs/options.md: every option with its help text, allowed values and default.

python -m flame.cli.options > docs/options.md
"""

from __future__ import annotations

import argparse
import sys

from flame.config.help import render_markdown
from flame.trainer.options import build_table


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    argparse.ArgumentParser(prog="flame-options", description="Print every option of a run as Markdown.").parse_args(argv)
    print(render_markdown(build_table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
