"""Convert a Hugging Face model to a checkpoint that a run can start from.

    python -m flame.cli.convert_hf_to_dcp --model PATH_OR_HUB_NAME --out exp/converted/step-0

It takes one process on the CPU, with one tensor in memory at a time, in the dtype of the files. Use the result as
checkpoint.initial_load_path (which also accepts the Hugging Face folder itself), or with flame.cli.convert_dcp_to_hf. It has no
optimizer state, so a run cannot resume from it: do not put it among a run's own checkpoints.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from flame.errors import end_on_user_error


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flame-convert-hf-to-dcp",
        description="Convert a Hugging Face model to a checkpoint that a run can start from.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a folder with safetensors, or a Hub name")
    parser.add_argument("--out", type=Path, required=True, help="the step-N folder to create")
    parser.add_argument(
        "--custom_model_path", default="", help="package that registers the architecture (experimental.custom_model_path)"
    )
    arguments = parser.parse_args(argv)
    from flame.models.custom_model import import_custom_model  # torch takes seconds to load
    from flame.weights.to_checkpoint import convert_to_checkpoint

    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    import_custom_model(arguments.custom_model_path)
    convert_to_checkpoint(arguments.model, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
