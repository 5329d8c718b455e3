"""Compare objectives, or any options, over seeds: `flame-compare SPEC.toml`. See `flame.compare.command`."""

from __future__ import annotations

import sys

from flame.compare.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
