"""Bits per byte of held-out text, by transformers alone: no code of the trainer takes part.

    python -m research.bits_per_byte TEXT.jsonl [TEXT.jsonl ...] --models FOLDER [FOLDER ...]

A document is cut into chunks of `CONTEXT` tokens. Bits are those of all tokens but the first of a chunk, and bytes those of the
whole text, so the figure compares models with the same tokenizer. Each line of the output is a model, with one number for each
text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 2048
BATCH = 8
"""Chunks. The last hidden states of a batch meet the vocabulary one chunk at a time."""
RESULT_FILE = "bits_per_byte.json"


def read_texts(path: Path) -> list[str]:
    with path.open() as file:
        return [json.loads(line)["text"] for line in file]


def cut(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Chunks of at least two tokens, longest first, so that a batch has little padding."""
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    chunks = [ids[start : start + CONTEXT] for ids in documents for start in range(0, len(ids), CONTEXT)]
    return sorted((chunk for chunk in chunks if len(chunk) > 1), key=len, reverse=True)


@torch.inference_mode()
def measure(model: PreTrainedModel, chunks: list[list[int]]) -> float:
    """Sum of the cross entropy of all predicted tokens, in bits. Padding stands at the right, where no token can see it."""
    device, nats = model.device, 0.0
    for start in range(0, len(chunks), BATCH):
        batch = [torch.tensor(chunk, device=device) for chunk in chunks[start : start + BATCH]]
        inputs = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        states = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
        for state, ids in zip(states, batch, strict=True):
            logits = model.lm_head(state[: len(ids) - 1]).float()
            nats += cross_entropy(logits, ids[1:], reduction="sum").item()
    return nats / math.log(2)


def measure_models(models: list[Path], texts: list[Path]) -> Iterator[tuple[Path, dict[str, float]]]:
    """Each model with the bits per byte of each text, by its file's stem. A result in the model's folder is kept."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    prepared: dict[Path, tuple[list[list[int]], int]] = {}
    for folder in models:
        result = folder / RESULT_FILE
        if not result.exists():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            figures = {}
            for path in texts:
                if path not in prepared:
                    contents = read_texts(path)
                    prepared[path] = cut(contents, tokenizer), sum(len(text.encode()) for text in contents)
                chunks, size = prepared[path]
                figures[path.stem] = measure(model, chunks) / size
            result.write_text(json.dumps(figures) + "\n")
        yield folder, json.loads(result.read_text())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Bits per byte of held-out text.", allow_abbrev=False)
    parser.add_argument("texts", type=Path, nargs="+", help="JSON lines with the key text")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of models that share a tokenizer")
    arguments = parser.parse_args(argv)
    for folder, figures in measure_models(arguments.models, arguments.texts):
        print(folder, *(f"{name} {value:.5f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
