"""Measure what the hidden states of models know of tokens further ahead, by a linear read-out.

    flame-readout runs/next/hf runs/future/hf --dataset json --data_files held_out.jsonl --out readout.csv

Every fifth document is held out from the read-out. Give documents that the models were not trained on.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from flame.cli.reading import add_options, check_positive, choose_longest, get_corpus, load_own_tokenizer, run_quietly
from flame.errors import UserError, end_on_user_error

HORIZONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
HELD_OUT_EVERY = 5


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flame-readout",
        description="A linear read-out of token t + k from the hidden state at t, in nats on held-out documents.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of an exported model, or a Hub name")
    add_options(parser, num_tokens=200_000)
    parser.add_argument("--horizons", type=int, nargs="+", default=list(HORIZONS), help="the k (default: 1 to 32)")
    parser.add_argument("--out", type=Path, help="also write a CSV file")
    arguments = parser.parse_args(argv)
    check_positive(arguments, "tokens", "longest", "horizons")
    return arguments


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    return run_quietly(_run, _parse(argv))


def _run(arguments: argparse.Namespace) -> int:
    from flame.library.loading import check_export, load_model
    from flame.library.readout import LEAST_PAIRS, measure
    from flame.library.texts import read_documents

    corpus = get_corpus(arguments)
    for name in arguments.models:
        check_export(name)
    longest = choose_longest(arguments, *arguments.models)
    rows = []
    for name in arguments.models:
        tokenizer = load_own_tokenizer(name, arguments.trust_remote_code)
        documents = read_documents(corpus, tokenizer, arguments.tokens, longest).tokens
        if len(documents) < HELD_OUT_EVERY:
            raise UserError(
                f"--data_files {arguments.data_files}: {len(documents)} documents, of which every {HELD_OUT_EVERY}th is held "
                "out: give more, or raise --tokens"
            )
        lm = load_model(name, device=arguments.device, trust_remote_code=arguments.trust_remote_code)
        test = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        train = [each for index, each in enumerate(documents) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        print(f"{name}: {len(train)} documents to learn from, {len(test)} held out")
        print(f"{'k':>4}{'pairs':>10}{'unigram':>10}{'read-out':>10}{'known':>8}{'right':>8}")
        for found in measure(lm, train, test, sorted(set(arguments.horizons)), longest):
            print(
                f"{found.horizon:>4}{found.pairs:>10,}{found.unigram:>10.3f}{found.loss:>10.3f}{found.known:>8.3f}"
                f"{found.accuracy:>8.1%}",
                flush=True,
            )
            rows.append([name, *found, found.known])
    if not rows:
        least = min(arguments.horizons)
        raise UserError(
            f"--horizons {least}: no held-out document is longer, or fewer than {LEAST_PAIRS} pairs are there to learn from: "
            "give smaller ones, or more text"
        )
    if arguments.out:
        _write(arguments.out, rows)
    return 0


def _write(path: Path, rows: list[list[object]]) -> None:
    try:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "horizon", "pairs", "unigram_nats", "loss_nats", "accuracy", "known_nats"])
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another path") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
