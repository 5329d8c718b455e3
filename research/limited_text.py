"""A small corpus that is read many times: few tokens of Python, and other packages to be measured on.

    python -m research.continued_corpora TEXT
    python -m research.limited_text OUT --text TEXT [--tokens 10000000]

OUT then has a tokenizer of 8,192 entries, trained on the first documents, and two folders of its tokens, `train` and
`held_out`, for `training.dataset = "tokens"`. The documents of `train` are the first of TEXT/python.jsonl, as many as have the
tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.preprocess import make_tokenizer
from flame.cli.preprocess import preprocess
from flame.config.schema import Corpus
from flame.data.encoding import encode_documents
from flame.data.tokenizer import load_tokenizer

TRAINED_ON = 20_000_000
"""Characters."""


def read_texts(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


def take_tokens(path: Path, tokenizer_path: Path, tokens: int) -> Iterator[str]:
    """Documents until they have so many tokens."""
    tokenizer = load_tokenizer(str(tokenizer_path))
    for text in read_texts(path):
        if tokens <= 0:
            return
        tokens -= sum(len(ids) for ids in encode_documents(tokenizer, [text]))
        yield text


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="A small corpus that is read many times.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--text", type=Path, required=True, help="folder of research.continued_corpora")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens to train on, default 10 million")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    learned, tokenizer = arguments.text / "python.jsonl", arguments.out / "tokenizer"
    make_tokenizer(tokenizer, read_texts(learned), TRAINED_ON)
    limited = arguments.out / "train.jsonl"
    with limited.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in take_tokens(learned, tokenizer, arguments.tokens))
    for name, path in (("train", limited), ("held_out", arguments.text / "python_held_out.jsonl")):
        preprocess(arguments.out / name, Corpus(dataset="json", data_files=str(path)), str(tokenizer), num_workers=0)
    limited.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
