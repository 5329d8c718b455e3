"""Turn a checkpoint into an ordinary Hugging Face folder.

    python -m flame.utils.convert_dcp_to_hf --checkpoint exp/run/checkpoint/step-1000 --out exp/run/hf

One process on the CPU; no GPU and no process group. Predictor and estimator, which Hugging Face does not know, go into
`future_modules.safetensors` beside the model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from flame.components.checkpoint import HF_FOLDER, TRAINER_FILE
from flame.components.checkpoint_files import find_missing, read_state
from flame.components.checkpoint_storage import TensorReader, verify_tensors
from flame.errors import UserError
from flame.models.causal_lm import load_model_config

LM_PREFIX = "lm."
FUTURE_FILE = "future_modules.safetensors"


def convert(checkpoint: Path, out: Path) -> None:
    """Write the model of a checkpoint, its tokenizer and its future modules.

    Args:
        checkpoint: a committed `step-N/` folder.
        out: folder to write; files in it with the same names are replaced.

    Raises:
        UserError: the folder is no complete checkpoint.
    """
    weights = read_model_tensors(checkpoint)
    config = load_model_config(str(checkpoint / HF_FOLDER))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({k.removeprefix(LM_PREFIX): v for k, v in weights.items() if k.startswith(LM_PREFIX)}, assign=True)
    model.tie_weights()
    disable_progress_bar()  # of the one file being written, in the middle of a run's log
    shutil.copytree(checkpoint / HF_FOLDER, out, dirs_exist_ok=True)  # the tokenizer
    model.save_pretrained(out)
    future = {k: v for k, v in weights.items() if not k.startswith(LM_PREFIX)}
    if future:
        save_file(future, out / FUTURE_FILE)


def read_model_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of the model, whole, by name within `FutureLM`.

    Raises:
        UserError: the folder is no complete checkpoint, or is damaged.
    """
    if checkpoint.suffix or find_missing(checkpoint):
        raise UserError(f'checkpoint "{checkpoint}" is not a complete checkpoint folder (step-N, with {TRAINER_FILE} in it)')
    reader = TensorReader(checkpoint)
    try:
        read_state(checkpoint)
        metadata = reader.read_metadata()
        verify_tensors(checkpoint, metadata, share=0, shares=1)
    except (OSError, ValueError) as error:
        raise UserError(f'checkpoint "{checkpoint}" is damaged: {error}; convert another one') from error
    tensors = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
        dcp.load({"model": tensors}, storage_reader=reader, no_dist=True)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a checkpoint into an ordinary Hugging Face folder.", allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-N folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.EXIT_CODE)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
