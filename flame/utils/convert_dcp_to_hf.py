"""Turn a checkpoint into an ordinary Hugging Face folder.

    python -m flame.utils.convert_dcp_to_hf --checkpoint exp/run/checkpoint/step-1000 --out exp/run/hf

One process on the CPU; no GPU and no process group. `flame.weights.hf_export` is the machinery.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flame.errors import UserError
from flame.models.custom_model import import_custom_model
from flame.weights.hf_export import FUTURE_FILE, convert
from flame.weights.model_tensors import read_model_tensors

__all__ = ["FUTURE_FILE", "convert", "read_model_tensors"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a checkpoint into an ordinary Hugging Face folder.", allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-N folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an exported model in it is replaced")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights; float32 is exact")
    parser.add_argument(
        "--skip-check", action="store_true", help="do not load the result and compare its logits: for models larger than memory"
    )
    parser.add_argument(
        "--custom-model-path", default="", help="package that registers the architecture (experimental.custom_model_path)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("flame").setLevel(logging.INFO)
    try:
        import_custom_model(arguments.custom_model_path)
        convert(arguments.checkpoint, arguments.out, arguments.dtype, check=not arguments.skip_check)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.EXIT_CODE)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
