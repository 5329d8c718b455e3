"""Convert a checkpoint to an ordinary Hugging Face folder, in one process on the CPU.

    python -m flame.cli.convert_dcp_to_hf --checkpoint exp/run/checkpoint/step-1000 --out exp/run/hf

`flame.weights.export` does the work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flame.config.addresses import is_remote
from flame.errors import end_on_user_error


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flame-convert-dcp-to-hf",
        description="Convert a checkpoint to an ordinary Hugging Face folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-N folder")
    parser.add_argument(
        "--out",
        required=True,
        help="folder to write, or its address (s3://bucket/folder); an earlier export of flame is replaced, "
        "a folder that holds anything else is rejected",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights; float32 is exact"
    )
    parser.add_argument(
        "--skip_check", action="store_true", help="do not compare the result's logits; for models larger than memory"
    )
    parser.add_argument(
        "--custom_model_path", default="", help="package that registers the architecture (experimental.custom_model_path)"
    )
    arguments = parser.parse_args(argv)
    from flame.models.custom_model import import_custom_model  # torch takes seconds to load
    from flame.weights.export import convert, convert_and_upload

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("flame").setLevel(logging.INFO)
    import_custom_model(arguments.custom_model_path)
    if is_remote(arguments.out):
        convert_and_upload(arguments.checkpoint, arguments.out, arguments.dtype, check=not arguments.skip_check)
    else:
        convert(arguments.checkpoint, Path(arguments.out), arguments.dtype, check=not arguments.skip_check)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
