"""Draw the curves of runs: `flame-plot RUN [RUN ...] --out curves.png`. See `flame.logging.plots`."""

from __future__ import annotations

import sys

from flame.logging.plots import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
