"""Speed of flame-preprocess with a real BPE tokenizer, beside the tokenizer's own speed on one core.

    python -m benchmarks.preprocess OUT --megabytes 36 --cores 1 2

The tokenizer has 8,192 entries and is trained here. The text is the Python files of the installed packages, as JSON lines.
Seconds are from the start of the command to its end. `ratio` is the rate over `cores` times the tokenizer's own rate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.pool import REPO
from flame.data.encoding import END_OF_TEXT, encode_documents
from flame.data.tokenizer import load_tokenizer

PASSES = 3
"""Of the tokenizer alone."""
ENTRIES = 8192
TRAINED_ON = 4_000_000
"""Characters."""
OWN_RATE_ON = 8_000_000
"""Characters."""


def read_texts() -> Iterator[str]:
    """The Python files of the installed packages, again and again."""
    packages = Path(torch.__file__).parents[1]
    for path in cycle(sorted(packages.rglob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text


def take(characters: int, texts: Iterator[str] | None = None) -> Iterator[str]:
    for text in read_texts() if texts is None else texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def make_tokenizer(folder: Path, texts: Iterator[str] | None = None, characters: int = TRAINED_ON) -> None:
    """Train one of `ENTRIES` entries on so much of the texts, by default those of `read_texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(take(characters, texts), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(folder)


def make_corpus(path: Path, megabytes: int) -> None:
    with path.open("w") as file:
        for text in take(megabytes * 1_000_000):
            file.write(json.dumps({"text": text}) + "\n")


def measure_own_rate(tokenizer_path: Path) -> float:
    """Tokens a second of the tokenizer alone, on one core, from texts in memory to arrays of ids."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, texts = load_tokenizer(str(tokenizer_path)), list(take(OWN_RATE_ON))
    rates = []
    for _ in range(PASSES):
        start = time.perf_counter()
        tokens = sum(
            len(ids) for index in range(0, len(texts), 64) for ids in encode_documents(tokenizer, texts[index : index + 64])
        )
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def run_preprocess(out: Path, corpus: Path, cores: int) -> tuple[float, int]:
    """Seconds and tokens of one command on so many cores, with the cache of its data empty."""
    for folder in (out / "tokens", out / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "flame.cli.preprocess", "--out", str(out / "tokens"), "--dataset", "json"]
    command += ["--tokenizer_path", str(out / "tokenizer"), "--data_files", str(corpus)]
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment["HF_DATASETS_CACHE"] = str(out / "cache")
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    start = time.perf_counter()
    subprocess.run(
        command, check=True, capture_output=True, cwd=REPO, env=environment, preexec_fn=partial(os.sched_setaffinity, 0, allowed)
    )
    seconds = time.perf_counter() - start
    return seconds, json.loads((out / "tokens" / "manifest.json").read_text())["tokens"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Speed of flame-preprocess.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for tokenizer, text and tokens")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[36], help="sizes of the text")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))], help="numbers of cores")
    parser.add_argument("--passes", type=int, default=3, help="of each, of which the median counts")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_tokenizer(arguments.out / "tokenizer")
    own = measure_own_rate(arguments.out / "tokenizer")
    print(f"the tokenizer alone, on one core: {own:,.0f} tokens/s\n")
    print("| text, MB | cores | seconds [range] | tokens/s | ratio |\n|---|---|---|---|---|")
    for megabytes in arguments.megabytes:
        corpus = arguments.out / f"{megabytes}.jsonl"
        make_corpus(corpus, megabytes)
        for cores in sorted(set(arguments.cores)):
            runs = [run_preprocess(arguments.out, corpus, cores) for _ in range(arguments.passes)]
            seconds, tokens = statistics.median(run[0] for run in runs), runs[0][1]
            spread = f"{min(run[0] for run in runs):.1f}, {max(run[0] for run in runs):.1f}"
            rate = tokens / seconds
            print(f"| {megabytes} | {cores} | {seconds:.1f} [{spread}] | {rate:,.0f} | {rate / (cores * own):.2f} |", flush=True)
        corpus.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
