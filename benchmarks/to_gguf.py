"""Check that llama.cpp's converter reads exports: a table of what comes back from its GGUF files.

    pip install gguf
    python -m benchmarks.to_gguf OUT

The converter is in the source distribution of llama-cpp-python, on the package index. It knows a tokenizer by what it makes of a
text, so that of a real model is taken (`benchmarks.fetch_smollm2`). Each model goes through a checkpoint, our export and the
converter (`--outtype f32`), and is read back by transformers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import fetch_smollm2
from flame.weights.export import convert
from flame.weights.to_checkpoint import convert_to_checkpoint

PACKAGE, LIBRARY = "llama-cpp-python==0.3.36", "sentencepiece==0.2.2"
VENDORED = "vendor/llama.cpp/"
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
TEXT = "Hello  world 12345, it's\n\n\tdef f(x): é 漢字 <b>\n x"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 256,
}
BASE: dict[str, object] = {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": BASE,
    "llama, untied": BASE | {"tie_word_embeddings": False},
    "mistral": BASE | {"sliding_window": 8},
    "qwen3": BASE,
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def fetch_converter(out: Path) -> Path:
    """The converter's program, unpacked, with the library that it needs."""
    program = out / "llama.cpp" / NEEDED[0]
    if program.exists():
        return program
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, PACKAGE], check=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(out / "packages"), LIBRARY], check=True)
        (source,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(source) as archive:
            for member in archive:
                _, found, name = member.name.partition(VENDORED)
                if found and name.startswith(NEEDED) and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    path = out / "llama.cpp" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
    return program


def make_model(folder: Path, name: str, smollm2: Path) -> None:
    """A toy model with the tokenizer of the real one."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    options = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **ids, **SHAPE, **FAMILIES[name]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition(",")[0], **options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_model(source: Path, work: Path, program: Path) -> Path:
    """Source to checkpoint to export to GGUF."""
    convert_to_checkpoint(str(source), work / "step-0")
    convert(work / "step-0", work / "hf", check=False)
    command = [sys.executable, str(program), str(work / "hf"), "--outtype", "f32", "--outfile", str(work / "model.gguf")]
    environment = os.environ | {"PYTHONPATH": str(program.parents[1] / "packages")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name}: the converter fails:\n{done.stderr[-2000:]}")
    return work / "model.gguf"


def compare(source: Path, gguf: Path) -> list[str]:
    """What came back: tensors that are the same to the bit, the largest difference, and whether settings and tokenizer are. The
    converter stores the norms of Gemma plus one, which rounds them."""
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights, found = before.state_dict(), after.state_dict()
    assert weights.keys() == found.keys(), weights.keys() ^ found.keys()
    same = [name for name, tensor in weights.items() if torch.equal(tensor, found[name])]
    largest = max((tensor - found[name]).abs().max().item() for name, tensor in weights.items())
    tokenizers = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    checks = [
        before.config.rope_parameters == after.config.rope_parameters,
        tokenizers[0].eos_token_id == tokenizers[1].eos_token_id == after.config.eos_token_id,
        tokenizers[0](TEXT)["input_ids"] == tokenizers[1](TEXT)["input_ids"],
    ]
    return [f"{len(same)} of {len(weights)}", f"{largest:.1g}", *("same" if check else "DIFFERENT" for check in checks)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Exports through llama.cpp's converter.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for converter, models and GGUF files")
    names = ["SmolLM2-135M", *FAMILIES]
    parser.add_argument("--models", nargs="+", default=names, choices=names, help="which of them")
    arguments = parser.parse_args(argv)
    out = arguments.out.absolute()
    if find_spec("gguf") is None:
        sys.exit("the package gguf is not installed: pip install gguf")
    out.mkdir(parents=True, exist_ok=True)
    program, smollm2 = fetch_converter(out), out / "smollm2"
    if not (smollm2 / "config.json").exists():
        fetch_smollm2.main([str(smollm2)])
    print("| model | tensors the same | largest difference | rotary settings | end token | ids of a text |")
    print("|---|---|---|---|---|---|")
    for name in arguments.models:
        with TemporaryDirectory(dir=out) as folder:
            source = smollm2 if name not in FAMILIES else Path(folder) / "source"
            if name in FAMILIES:
                make_model(source, name, smollm2)
            print(f"| {name} | {' | '.join(compare(source, convert_model(source, Path(folder), program)))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
