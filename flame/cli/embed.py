"""Vectors of the future of texts, from an export of a run with the future loss.

    flame-embed runs/future/hf --data_files texts.jsonl --out vectors.npz
    flame-embed runs/future/hf --data_files texts.jsonl --retrieve

docs/after_training.md says what the vectors are good for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flame.cli.reading import add_options, check_positive, choose_longest, get_corpus, load_own_tokenizer, run_quietly
from flame.errors import UserError, end_on_user_error

MOST_ROWS = 10
"""Numbers of skipped rows that are printed."""


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flame-embed",
        description="Vectors of texts: the prediction of their future, their summary as a future, and the plain hidden state.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help='export (hf/) of a run with objective.name = "future"')
    add_options(parser, num_tokens=1_000_000)
    parser.add_argument("--out", type=Path, help="write the vectors to this .npz file: rows, states, predictions, summaries")
    parser.add_argument("--retrieve", action="store_true", help="match the first half of each text with its second half")
    arguments = parser.parse_args(argv)
    if not (arguments.out or arguments.retrieve):
        raise UserError("nothing to do: give --out FILE.npz, --retrieve, or both")
    if arguments.out and arguments.out.suffix != ".npz":
        raise UserError(f"--out {arguments.out}: vectors are written to an .npz file; give a name that ends in .npz")
    check_positive(arguments, "tokens", "longest")
    return arguments


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    return run_quietly(_run, _parse(argv))


def _run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from flame.library.embeddings import embed, load_modules
    from flame.library.loading import check_export, load_model
    from flame.library.retrieval import retrieve, split_texts
    from flame.library.texts import read_documents

    corpus = get_corpus(arguments)
    check_export(arguments.model)
    longest = choose_longest(arguments, arguments.model)
    lm = load_model(arguments.model, device=arguments.device, trust_remote_code=arguments.trust_remote_code)
    modules = load_modules(Path(arguments.model), next(lm.parameters()).device)
    tokenizer = load_own_tokenizer(arguments.model, arguments.trust_remote_code)
    documents = read_documents(corpus, tokenizer, arguments.tokens, longest)
    texts = documents.tokens
    if skipped := documents.list_skipped():
        print(f"{len(skipped):,} rows skipped, without a text of two tokens: {_list_rows(skipped)}")
    if documents.num_read < documents.num_rows:
        print(f"stopped after {documents.num_read:,} of {documents.num_rows:,} rows, at --tokens {arguments.tokens}")
    if arguments.out:
        vectors = embed(modules, lm, texts, longest, tokenizer.eos_token_id)
        try:
            arrays = {name: each.numpy() for name, each in vectors._asdict().items()}
            np.savez(arguments.out, rows=np.array(documents.rows, dtype=np.int64), **arrays)
        except OSError as error:
            raise UserError(f"--out {arguments.out}: cannot be written ({error.strerror}); choose another path") from error
        print(f"wrote {arguments.out}: {len(texts):,} texts, {vectors.predictions.shape[1]} numbers a prediction")
    if arguments.retrieve:
        found = retrieve(modules, lm, texts, longest, tokenizer.eos_token_id)
        print(f"{'prefix':<26}{'continuation':<34}{'found':>8}{'1 / rank':>10}")
        for each in found:
            print(f"{each.queries:<26}{each.keys:<34}{each.accuracy:>8.1%}{each.reciprocal_rank:>10.3f}")
        count = len(split_texts(texts, modules.shift)[0])
        short = f"; {len(texts) - count:,} more are too short to be cut in two" if count < len(texts) else ""
        print(f"{count:,} texts{short}")
    return 0


def _list_rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:MOST_ROWS]))
    return shown if len(rows) <= MOST_ROWS else f"{shown}, ..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
