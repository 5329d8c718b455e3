"""Tokenize text once into a folder of tokens, so that runs need not tokenize.

    flame-preprocess --out data/wiki --tokenizer_path bytes --dataset parquet --data_files "wiki/*.parquet"

Train on it with `--training.dataset tokens --training.data_files data/wiki`. After any interruption, the same command continues
and writes the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from flame.config.schema import Corpus
from flame.data.chats import prepare_rows
from flame.data.encoding import fingerprint_tokenizer
from flame.data.sources.base import SourceKind, TextRows, explain_no_text
from flame.data.sources.registry import open_text_source
from flame.data.sources.token_folder import FORMAT_VERSION, Manifest, TokenDtype
from flame.data.span_encoder import SpanEncoder, encode_in_order, plan_spans
from flame.data.token_folder_writer import Progress, Recipe, TokenFolderWriter, read_finished
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError

LOG_SECONDS = 60.0
INTERRUPTED = 130

ORIGIN_OPTIONS = ("dataset", "dataset_name", "dataset_split", "data_files", "text_column")
SECTION = "--"  # errors of the shared code say `{section}.{option}`


def preprocess(
    out: Path, corpus: Corpus, tokenizer_path: str, num_workers: int, loss_on: Literal["all", "assistant"] = "all"
) -> None:
    """Write the folder `out`, or continue an interrupted one, and print a summary.

    Args:
        num_workers: processes that read and tokenize; 0 uses only this process.
        loss_on: with "assistant", the folder also says which tokens of chats the assistant wrote.

    Raises:
        UserError: the options or the data are wrong, `out` was begun with other ones, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f'--out "{out}" names a file: give a folder')
    source, rows = _open_text(corpus)
    tokenizer = load_tokenizer(tokenizer_path)
    rows = prepare_rows(source, rows, tokenizer, loss_on)
    chat_template = getattr(rows, "chat_template", "")
    vocabulary_size = max(tokenizer.get_vocab().values()) + 1
    dtype: TokenDtype = "uint16" if vocabulary_size <= 1 << 16 else "uint32"
    origin: dict[str, Any] = {option: getattr(corpus, option) for option in ORIGIN_OPTIONS}
    stored: dict[str, Any] = {"chat_template": chat_template, "loss_on": loss_on}
    recipe = Recipe(**origin, tokenizer_fingerprint=fingerprint_tokenizer(tokenizer), rows=len(rows), **stored)
    manifest = read_finished(out, recipe)
    if manifest is not None:
        print(f"{out} is complete already: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
        _print_use(out)
        return

    start = time.monotonic()
    encoder = SpanEncoder(rows, tokenizer, dtype, vocabulary_size, loss_on == "assistant")
    with closing(TokenFolderWriter(out, Progress(recipe=recipe, tokenizer=tokenizer_path), dtype)) as writer:
        before = writer.progress
        _write_spans(writer, encoder, num_workers, start)
        done = writer.progress
        if not done.documents:
            writer.discard()
            raise UserError(explain_no_text(source, rows, f"{done.rows} rows"))
        writer.finish(
            Manifest(
                format_version=FORMAT_VERSION,
                dtype=dtype,
                documents=done.documents,
                tokens=done.tokens,
                bad_rows=done.bad_rows,
                tokenizer=done.tokenizer,
                tokenizer_fingerprint=recipe.tokenizer_fingerprint,
                eos_id=tokenizer.eos_token_id,
                vocabulary_size=vocabulary_size,
                **origin,
                **stored,
            )
        )
    seconds = time.monotonic() - start
    rate = (done.tokens - before.tokens) / seconds
    resumed = f" (from row {before.rows:,} on)" if before.rows else ""
    print(f"wrote {out}: {done.documents:,} documents, {done.tokens:,} tokens, {done.bad_rows:,} bad rows left out")
    print(f"{seconds:.1f} seconds{resumed}, {rate:,.0f} tokens/s")
    _print_use(out)


def _open_text(corpus: Corpus) -> tuple[SourceKind, TextRows]:
    source, rows = open_text_source(corpus, SECTION)
    idle = [each for each in ORIGIN_OPTIONS[1:] if each not in source.uses and getattr(corpus, each) != getattr(Corpus(), each)]
    if idle:
        print(f"without effect: {', '.join(f'--{each}' for each in idle)}", file=sys.stderr)
    return source, rows


def _print_use(out: Path) -> None:
    print(f"train on it with: --training.dataset tokens --training.data_files {shlex.quote(str(out))}")


def _write_spans(writer: TokenFolderWriter, encoder: SpanEncoder, num_workers: int, start: float) -> None:
    """Encode and write the remaining rows."""
    rows, done, before = writer.progress.recipe.rows, writer.progress.rows, writer.progress.tokens
    spans = plan_spans(done, rows, num_workers, encoder.measure_rows())
    on_screen = sys.stderr.isatty()
    seconds = 0.2 if on_screen else LOG_SECONDS
    encoded_spans = encode_in_order(encoder, spans, num_workers)
    with (
        tqdm(total=rows, initial=done, unit=" rows", mininterval=seconds, delay=0 if on_screen else seconds) as bar,
        closing(encoded_spans),
    ):
        for span, encoded in encoded_spans:
            writer.append(span, encoded)
            rate = (writer.progress.tokens - before) / (time.monotonic() - start)
            bar.set_postfix_str(f"{writer.progress.tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            bar.update(span.stop - span.start)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flame-preprocess",
        description="Tokenize text once into a folder of tokens, so that runs need not tokenize. "
        "After an interruption, the same command continues.",
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0))
    defaults = Corpus()
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer_path", required=True, help='a folder, a Hub name, or "bytes"')
    parser.add_argument(
        "--dataset",
        default=defaults.dataset,
        help='"stdlib", "text", "json", "csv", "parquet", "arrow", a Hub name, a folder of a Hub dataset, or a file with a '
        'source of your own, "my_source.py" (default: %(default)s)',
    )
    parser.add_argument("--dataset_name", default=defaults.dataset_name, help="configuration of the Hub dataset")
    parser.add_argument("--dataset_split", default=defaults.dataset_split, help="split of the Hub dataset (default: %(default)s)")
    parser.add_argument(
        "--data_files", default=defaults.data_files, help="files: paths, folders, globs or addresses, separated by commas"
    )
    parser.add_argument(
        "--text_column", default=defaults.text_column, help="column or JSON key of the documents (default: %(default)s)"
    )
    parser.add_argument(
        "--loss_on",
        default="all",
        choices=("all", "assistant"),
        help='"assistant": store what the assistant wrote in chats, for training.loss_on = "assistant"',
    )
    parser.add_argument(
        "--num_workers",
        type=_parse_count,
        default=cores,
        help="processes that tokenize; 0: only this process (default: %(default)s)",
    )
    return parser.parse_args(argv)


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is an integer >= 0")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        the exit status.
    """
    arguments = _parse(argv)
    corpus = Corpus(
        dataset=arguments.dataset,
        dataset_name=arguments.dataset_name,
        dataset_split=arguments.dataset_split,
        data_files=arguments.data_files,
        text_column=arguments.text_column,
    )
    try:
        preprocess(arguments.out, corpus, arguments.tokenizer_path, arguments.num_workers, arguments.loss_on)
    except UserError as error:
        lines = str(error).replace(f"{SECTION}.", SECTION)
        for key in ("model.tokenizer_path", "training.loss_on"):
            lines = lines.replace(key, f"--{key.partition('.')[2]}")
        print(lines, file=sys.stderr)
        return error.EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
