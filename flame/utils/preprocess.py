"""Turn text into a folder of tokens, once, for runs that need not tokenize.

    python -m flame.utils.preprocess --out data/wiki --tokenizer_path bytes --dataset parquet --data_files "wiki/*.parquet"

Train on it with `--training.dataset tokens --training.data_files data/wiki`. Interrupted in any way, the same command goes on
where it stopped and writes the same bytes: `progress.json` says how much of the files is safely on disk.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import connection
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from flame.components.preemption import signals_blocked
from flame.config import STRICT, Corpus
from flame.config_conflicts import find_corpus_conflicts
from flame.data.sources import Source, open_source
from flame.data.token_folder import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    OFFSET_DTYPE,
    OFFSETS_FILE,
    TOKEN_DTYPES,
    TOKENS_FILE,
    Manifest,
    TokenDtype,
    read_manifest,
)
from flame.data.tokenizer import encode_documents, fingerprint_tokenizer, load_tokenizer
from flame.errors import UserError

PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_COMMITS = 1.0
LONGEST_SPAN = 256  # rows
CHARACTERS_AT_ONCE = 1 << 18  # through the tokenizer, which needs about 100 bytes for each
SPANS_AHEAD = 3  # of each worker
LOG_SECONDS = 60.0
INTERRUPTED = 130

ORIGIN_OPTIONS = ("dataset", "dataset_name", "dataset_split", "data_files", "text_column")
SECTION = "--"  # errors of the shared code say `{section}.{option}`


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the bytes of the folder. A restart must have the same."""

    __pydantic_config__ = STRICT

    dataset: str
    dataset_name: str
    dataset_split: str
    data_files: str
    text_column: str
    tokenizer_fingerprint: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How much is safely on disk: the result of the first `rows` rows."""

    __pydantic_config__ = STRICT

    recipe: Recipe
    tokenizer: str
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bad_rows: int = 0


@dataclass(frozen=True)
class Span:
    """The rows [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class EncodedSpan:
    """The documents of a span, end to end."""

    tokens: np.ndarray
    """uint16 or uint32 [n]"""
    lengths: np.ndarray
    """int64 [documents]"""
    bad_rows: int


def preprocess(out: Path, corpus: Corpus, tokenizer_path: str, num_workers: int) -> None:
    """Write the folder `out`, or what is missing of it, and print a summary.

    Args:
        num_workers: processes that read and tokenize; 0 does it in this process.

    Raises:
        UserError: the options or the data are wrong, `out` was begun with others, or it cannot be written.
    """
    source = _open_text(corpus)
    tokenizer = load_tokenizer(tokenizer_path)
    vocabulary_size = max(tokenizer.get_vocab().values()) + 1
    dtype: TokenDtype = "uint16" if vocabulary_size <= 1 << 16 else "uint32"
    origin = {
        field: getattr(corpus, field) for field in ("dataset", "dataset_name", "dataset_split", "data_files", "text_column")
    }
    recipe = Recipe(**origin, tokenizer_fingerprint=fingerprint_tokenizer(tokenizer), rows=len(source))
    if (out / MANIFEST_FILE).exists():
        manifest = _read_finished(out, recipe)
        (out / PROGRESS_FILE).unlink(missing_ok=True)
        print(f"{out} is complete already: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
        _print_use(out)
        return

    start = time.monotonic()
    encoder = SpanEncoder(source, tokenizer, dtype, vocabulary_size)
    with closing(FolderWriter(out, Progress(recipe=recipe, tokenizer=tokenizer_path), dtype)) as writer:
        before = writer.progress
        _write_spans(writer, encoder, num_workers, start)
        done = writer.progress
        if not done.documents:
            writer.discard()
            raise UserError(
                f'--dataset = "{corpus.dataset}" yields no usable text: {done.rows} rows read, all empty, not text or '
                "undecodable: check the data and --text_column"
            )
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
            )
        )
    seconds = time.monotonic() - start
    rate = (done.tokens - before.tokens) / seconds
    resumed = f" (from row {before.rows:,} on)" if before.rows else ""
    print(f"wrote {out}: {done.documents:,} documents, {done.tokens:,} tokens, {done.bad_rows:,} bad rows left out")
    print(f"{seconds:.1f} seconds{resumed}, {rate:,.0f} tokens/s")
    _print_use(out)


def _open_text(corpus: Corpus) -> Source:
    """The one place that knows how text is opened."""
    faults = list(find_corpus_conflicts(SECTION, corpus))
    if corpus.dataset == "tokens":
        faults = [f'{SECTION}.dataset = "tokens" is tokens already: give text']
    if faults:
        raise UserError(*faults)
    source = open_source(corpus, SECTION)
    assert not hasattr(source, "num_shards")
    return source


def _print_use(out: Path) -> None:
    print(f"train on it with: --training.dataset tokens --training.data_files {shlex.quote(str(out))}")


def _write_spans(writer: FolderWriter, encoder: SpanEncoder, num_workers: int, start: float) -> None:
    """Encode and write all rows that are not written yet."""
    rows, done, before = writer.progress.recipe.rows, writer.progress.rows, writer.progress.tokens
    spans = plan_spans(done, rows, num_workers)
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


def plan_spans(done: int, rows: int, num_workers: int) -> Iterator[Span]:
    """Cut the rows from `done` on into spans, short enough that all workers have several."""
    length = min(LONGEST_SPAN, -(-rows // (8 * max(1, num_workers))))
    return (Span(start, min(start + length, rows)) for start in range(done, rows, length))


class SpanEncoder:
    """Reads and tokenizes spans of a source. Pickled into each worker."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerFast, dtype: TokenDtype, vocabulary_size: int):
        self._source, self._tokenizer = source, tokenizer
        self._dtype, self._vocabulary_size = TOKEN_DTYPES[dtype], vocabulary_size

    def encode(self, span: Span) -> EncodedSpan:
        documents: list[np.ndarray] = []
        bad_rows = 0
        texts: list[str] = []
        characters = 0
        for text in map(self._source.read, range(span.start, span.stop)):
            if text is None:
                bad_rows += 1
                continue
            texts.append(text)
            characters += len(text)
            if characters >= CHARACTERS_AT_ONCE:
                documents += self._encode_batch(texts)
                texts, characters = [], 0
        documents += self._encode_batch(texts)
        tokens = np.concatenate([np.empty(0, self._dtype), *documents])
        return EncodedSpan(tokens, np.array([len(ids) for ids in documents], dtype=np.int64), bad_rows)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        documents = encode_documents(self._tokenizer, texts)
        assert all(ids.max() < self._vocabulary_size for ids in documents)
        return [ids.astype(self._dtype) for ids in documents]


def encode_in_order(
    encoder: SpanEncoder, spans: Iterable[Span], num_workers: int
) -> Generator[tuple[Span, EncodedSpan], None, None]:
    """Yield each span with its documents, encoded ahead by `num_workers` processes, or here when 0.

    Raises:
        UserError: a worker process died. The pool may also wait for it forever (CPython gh-94777); killed, a restart goes on.
    """
    if not num_workers:
        for span in spans:
            yield span, encoder.encode(span)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[tuple[Span, Future[EncodedSpan]]] = deque()
    try:
        for span in spans:
            with signals_blocked():  # which starts workers as needed
                pending.append((span, pool.submit(_encode_in_worker, span)))
            if len(pending) == SPANS_AHEAD * num_workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, for want of memory perhaps: the same command goes on where this one stopped; "
            f"--num_workers = {num_workers} may be lowered"
        ) from error
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # its work is not wanted any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: SpanEncoder


def _start_worker(encoder: SpanEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:  # killed, it cannot say so, and the pool's queue would wait for it forever
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def _encode_in_worker(span: Span) -> EncodedSpan:
    return _worker_encoder.encode(span)


class FolderWriter:
    """Appends to a folder of tokens, begun anew or gone on with.

    `offsets.bin` holds the starts of the documents until `finish` adds the end of the last.
    """

    def __init__(self, out: Path, beginning: Progress, dtype: TokenDtype):
        """
        Raises:
            UserError: the folder was begun with another recipe, is being written, or is not one of ours.
        """
        self._out = out
        with self._name_write_errors():
            out.mkdir(parents=True, exist_ok=True)
            if not (out / PROGRESS_FILE).exists():
                for file in (TOKENS_FILE, OFFSETS_FILE):
                    if (out / file).exists():
                        raise UserError(f'"{out / file}" exists without {PROGRESS_FILE} beside it: give another --out')
                _replace_file(out / PROGRESS_FILE, _to_json(beginning))
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            self._files = [os.open(out / file, flags, 0o666) for file in (TOKENS_FILE, OFFSETS_FILE)]
        try:
            self._lock()
            self.progress = _read_progress(out, beginning.recipe)
            self._cut(self.progress.tokens * TOKEN_DTYPES[dtype].itemsize, self.progress.documents * OFFSET_DTYPE.itemsize)
        except BaseException:
            self.close()
            raise
        self._committed_at = time.monotonic()

    def append(self, span: Span, encoded: EncodedSpan) -> None:
        """Write the next span. It is safe once committed, which happens about once a second."""
        progress = self.progress
        assert span.start == progress.rows
        ends = progress.tokens + np.cumsum(encoded.lengths)
        with self._name_write_errors():
            self._write(encoded.tokens, (ends - encoded.lengths).astype(OFFSET_DTYPE))
            self.progress = Progress(
                recipe=progress.recipe,
                tokenizer=progress.tokenizer,
                rows=span.stop,
                documents=progress.documents + len(encoded.lengths),
                tokens=progress.tokens + len(encoded.tokens),
                bad_rows=progress.bad_rows + encoded.bad_rows,
            )
            if time.monotonic() - self._committed_at >= SECONDS_BETWEEN_COMMITS:
                self._commit()

    def finish(self, manifest: Manifest) -> None:
        """Complete the folder: from here on it can be trained on."""
        with self._name_write_errors():
            self._commit()
            self._write(np.empty(0), np.array([manifest.tokens], dtype=OFFSET_DTYPE))
            self._sync()
            _replace_file(self._out / MANIFEST_FILE, _to_json(manifest))
            (self._out / PROGRESS_FILE).unlink()

    def discard(self) -> None:
        """Remove what was written."""
        for file in (TOKENS_FILE, OFFSETS_FILE, PROGRESS_FILE):
            (self._out / file).unlink(missing_ok=True)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is writing --out "{self._out}": wait for it, or give another --out') from None
        except OSError:
            return  # a file system without locks

    def _cut(self, *sizes: int) -> None:
        """Bring the files to the sizes of the last commit."""
        for file, name, size in zip(self._files, (TOKENS_FILE, OFFSETS_FILE), sizes, strict=True):
            if os.fstat(file).st_size < size:
                raise UserError(
                    f'"{self._out / name}" is shorter than the {size} bytes of {PROGRESS_FILE}: delete the folder to start over'
                )
            with self._name_write_errors():
                os.truncate(file, size)

    def _write(self, *contents: np.ndarray) -> None:
        for file, content in zip(self._files, contents, strict=True):
            rest = memoryview(content.tobytes())
            while rest:
                rest = rest[os.write(file, rest) :]

    def _sync(self) -> None:
        for file in self._files:
            os.fsync(file)

    def _commit(self) -> None:
        self._sync()
        _replace_file(self._out / PROGRESS_FILE, _to_json(self.progress))
        self._committed_at = time.monotonic()

    @contextmanager
    def _name_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f'cannot write to --out "{self._out}" ({error.strerror}): when that is put right, the same command goes on '
                "where this one stopped"
            ) from error


def _to_json(content: Progress | Manifest) -> str:
    return json.dumps(asdict(content), indent=1) + "\n"


def _replace_file(path: Path, content: str) -> None:
    """Write a file so that after a crash of the machine the old or the new content is there, whole."""
    new = path.with_name(path.name + ".tmp")
    with open(new, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_progress(out: Path, recipe: Recipe) -> Progress:
    path = out / PROGRESS_FILE
    try:
        progress = TypeAdapter(Progress).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f'"{path}" is damaged ({type(error).__name__}): delete the folder to start over') from error
    _require_same_recipe(out, progress.recipe, recipe, progress.tokenizer)
    return progress


def _read_finished(out: Path, recipe: Recipe) -> Manifest:
    manifest = read_manifest(out)
    content = asdict(manifest) | {"rows": manifest.documents + manifest.bad_rows}
    finished = Recipe(**{field.name: content[field.name] for field in fields(Recipe)})
    _require_same_recipe(out, finished, recipe, manifest.tokenizer)
    return manifest


def _require_same_recipe(out: Path, before: Recipe, now: Recipe, tokenizer_before: str) -> None:
    differences = []
    for field in fields(Recipe):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old == new:
            continue
        if field.name == "tokenizer_fingerprint":
            differences.append(f'another tokenizer (--tokenizer_path was "{tokenizer_before}")')
        elif field.name == "rows":
            differences.append(f"{old} rows of data, now {new}")
        else:
            differences.append(f'--{field.name} "{old}", now "{new}"')
    if differences:
        raise UserError(f'--out "{out}" was made with {", ".join(differences)}: give the same, or another --out')


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flame.utils.preprocess",
        description="Turn text into a folder of tokens, once, for runs that need not tokenize. "
        "Interrupted in any way, the same command goes on where it stopped.",
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0))
    defaults = Corpus()
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer_path", required=True, help='a folder, a Hub name, or "bytes"')
    parser.add_argument("--dataset", default=defaults.dataset, help='"stdlib", "text", "json", "parquet" or a Hub name')
    parser.add_argument("--dataset_name", default=defaults.dataset_name, help="configuration of the Hub dataset")
    parser.add_argument("--dataset_split", default=defaults.dataset_split, help="split of the Hub dataset (%(default)s)")
    parser.add_argument("--data_files", default=defaults.data_files, help="local files: paths or globs, separated by commas")
    parser.add_argument("--text_column", default=defaults.text_column, help="column or JSON key of the text (%(default)s)")
    parser.add_argument(
        "--num_workers", type=_parse_count, default=cores, help="processes that tokenize; 0: none but this one (%(default)s)"
    )
    return parser.parse_args(argv)


def _parse_count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is an integer >= 0")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    corpus = Corpus(
        dataset=arguments.dataset,
        dataset_name=arguments.dataset_name,
        dataset_split=arguments.dataset_split,
        data_files=arguments.data_files,
        text_column=arguments.text_column,
    )
    try:
        preprocess(arguments.out, corpus, arguments.tokenizer_path, arguments.num_workers)
    except UserError as error:
        lines = str(error).replace(f"{SECTION}.", SECTION).replace("model.tokenizer_path", "--tokenizer_path")
        print(lines, file=sys.stderr)
        sys.exit(error.EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
