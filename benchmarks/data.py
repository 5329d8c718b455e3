"""Speed of the data pipeline: packing from text, tokens and generated graphs, and starting in the middle of a run.

    OMP_NUM_THREADS=1 python -m benchmarks.data OUT

Medians over five passes, with the range, one process unless said otherwise. Text is the Python standard library as bytes.
`--only resume` and so on measure one part.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.faults import MODEL, OPTIONS, count_steps
from benchmarks.pool import REPO
from flame.checkpoints.manager import list_checkpoints
from flame.config.schema import Corpus, JobConfig, Training
from flame.data.batch import build_batch
from flame.data.document_streams import open_document_stream
from flame.data.documents import WHOLE, TokenizedSource, open_documents
from flame.data.encoding import encode_document, find_separator, fingerprint_tokenizer
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture
from flame.data.packing import Packer
from flame.data.sources.base import open_texts
from flame.data.sources.registry import build_kind
from flame.data.sources.token_folder import FORMAT_VERSION, MANIFEST_FILE, OFFSETS_FILE, TOKENS_FILE
from flame.data.state import DataState
from flame.data.tasks.generated import GeneratedDocuments
from flame.data.tasks.pathstar import PathstarOptions, Size
from flame.data.tokenizer import load_tokenizer

PASSES = 5
TOKENS = 40_000_000
DISTANT_STEP = 100_000
TOKENIZER = load_tokenizer("bytes")


def show(name: str, values: list[float], unit: str) -> None:
    print(f"| {name} | {statistics.median(values):,.2f} | {min(values):,.2f} - {max(values):,.2f} | {unit} |", flush=True)


def make_token_folder(folder: Path, mean_length: int) -> None:
    """Random tokens in documents of exponential lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lengths = np.maximum(1, generator.exponential(mean_length, size=TOKENS // mean_length)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    generator.integers(0, 256, offsets[-1], dtype=np.uint16).tofile(folder / TOKENS_FILE)
    offsets.astype("<i8").tofile(folder / OFFSETS_FILE)
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": "uint16",
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "bad_rows": 0,
        "tokenizer": "bytes",
        "tokenizer_fingerprint": fingerprint_tokenizer(TOKENIZER),
        "eos_id": TOKENIZER.eos_token_id,
        "vocabulary_size": len(TOKENIZER),
        "dataset": "random",
        "dataset_name": "",
        "dataset_split": "",
        "data_files": "",
        "text_column": "",
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def open_tokens(folder: Path):
    corpus = Corpus(dataset="tokens", data_files=str(folder))
    return open_documents(build_kind(corpus, "training", JobConfig().get), TOKENIZER)


def open_loader(source, training: Training, state: DataState) -> PackedLoader:
    return PackedLoader(training, Mixture((source,), (1.0,)), 0, 1, state)


def measure_packing_text() -> None:
    spent = 0.0

    def timed_encode(text: str) -> np.ndarray:
        nonlocal spent
        start = time.perf_counter()
        ids = encode_document(TOKENIZER, text)
        spent += time.perf_counter() - start
        return ids

    kind = build_kind(Corpus(), "training", JobConfig().get)
    source = TokenizedSource(kind, open_texts(kind), timed_encode)
    training = Training(num_workers=0)
    rates, shares = [], []
    for _ in range(PASSES):
        spent = 0.0
        loader = open_loader(source, training, DataState(training.num_streams, training.seed))
        start = time.perf_counter()
        sequences = sum(1 for _ in islice(loader, 300))
        elapsed = time.perf_counter() - start
        rates.append(sequences * training.seq_len / elapsed / 1e6)
        shares.append(100 * spent / elapsed)
    show("packing from text", rates, "M tokens/s a core")
    show("of which the tokenizer", shares, "% of the time")


def measure_packing_tokens(out: Path) -> None:
    for mean_length in (256, 1024):
        folder = out / f"mean_{mean_length}"
        make_token_folder(folder, mean_length)
        source = open_tokens(folder)
        for seq_len in (8192, 65536):
            training = Training(num_workers=0, seq_len=seq_len)
            rates = []
            for _ in range(PASSES):
                loader = open_loader(source, training, DataState(training.num_streams, training.seed))
                start = time.perf_counter()
                sequences = sum(1 for _ in islice(loader, TOKENS // seq_len))
                rates.append(sequences * seq_len / (time.perf_counter() - start) / 1e6)
            show(f"packing from tokens, mean length {mean_length:,}, sequences of {seq_len:,}", rates, "M tokens/s a core")


def measure_generating() -> None:
    """G(5, 5) over 30 node ids as packs of 2,048 graphs: made anew all the time, and drawn from a set that has been made."""
    corpus, seq_len = Corpus(dataset="pathstar", dataset_name="5x5"), 2048 * Size(5, 5).num_tokens
    for name, graphs in (("new graphs", 0), ("graphs of a set of 300,000", 300_000)):
        job = JobConfig(extensions={"pathstar": PathstarOptions(graphs=graphs)})
        tokenizer = load_tokenizer("pathstar", find_options=job.get)
        documents = open_documents(build_kind(corpus, "training", job.get), tokenizer)
        if graphs:
            assert isinstance(documents, GeneratedDocuments)
            for block in range(-(-graphs // documents.block_size)):
                documents.read_block(block)
        separator = find_separator(tokenizer, "=")
        stream = Packer(open_document_stream(documents, WHOLE, 0, 192, 42), "pathstar", 0, seq_len, 128, separator)
        cursor = stream.first_cursor
        packing, receiving = [], []
        for index in range(PASSES):
            start = time.perf_counter()
            sequence = stream.next_sequence(cursor)
            message = pickle.dumps(sequence)
            packed = time.perf_counter()
            build_batch(pickle.loads(message), index)
            receiving.append((time.perf_counter() - packed) / 2048 * 1e6)
            packing.append((packed - start) / 2048 * 1e6)
            cursor = sequence.cursor
        show(f"packing {name}, in a worker", packing, "us a document")
        show(f"receiving {name}, in the training process", receiving, "us a document")


def measure_resume(out: Path) -> None:
    """From the command to the first step, of a run of a toy model that is at step 0, and one that is at step 100,000."""
    make_token_folder(out / "mean_256", 256)
    (out / "model.json").write_text(json.dumps(MODEL))
    tokens = {"training.dataset": "tokens", "training.data_files": out / "mean_256", "model.config": out / "model.json"}
    options = OPTIONS | tokens | {"metrics.log_freq": 1, "checkpoint.interval": 1000}

    def start(run: Path, steps: int) -> float:
        """Seconds from the command to the end of its first step."""
        command = ["bash", str(REPO / "train.sh"), "--job.dump_folder", str(run), "--training.steps", str(steps)]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        before, began = count_steps(run), time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | {"PYTHON": sys.executable}, stdout=subprocess.DEVNULL)
        while count_steps(run) == before:
            assert process.poll() is None
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.wait()
        return seconds

    shutil.rmtree(out / "near", ignore_errors=True)
    shutil.rmtree(out / "far", ignore_errors=True)
    start(out / "far", 1)
    (checkpoint,) = list_checkpoints(out / "far" / "checkpoint")
    state = json.loads((checkpoint / "trainer.json").read_text())
    state |= {"step": DISTANT_STEP, "data": pack_ahead(options, DISTANT_STEP)}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    checkpoint.rename(checkpoint.with_name(f"step-{DISTANT_STEP}"))
    (out / "far" / "metrics.jsonl").unlink()
    seconds: dict[str, list[float]] = {"0": [], f"{DISTANT_STEP:,}": []}
    for turn in range(PASSES):
        for name, run, steps in zip(seconds, ("near", "far"), (1, DISTANT_STEP + 1), strict=True):
            copy = out / f"{run}_{turn}"
            shutil.rmtree(copy, ignore_errors=True)
            if run == "far":
                shutil.copytree(out / run, copy)
            seconds[name].append(start(copy, steps))
            shutil.rmtree(copy)
    for name, values in seconds.items():
        show(f"from the command to the end of the first step, started at step {name}", values, "s")


def pack_ahead(options: dict, steps: int) -> dict:
    """The data position after so many steps of the toy run, by really packing them."""
    training = Training(
        num_workers=0,
        num_streams=options["training.num_streams"],
        seq_len=options["training.seq_len"],
        context_len=options["training.context_len"],
    )
    source = open_tokens(options["training.data_files"])
    state = DataState(training.num_streams, training.seed)
    state.check_units({source.name: len(source)})
    sequences: Iterator = open_loader(source, training, state)
    state.advance(islice(sequences, steps * options["training.gradient_accumulation_steps"]), 1)
    return state.state_dict()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Speed of the data pipeline.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for the data")
    parts = {
        "text": lambda out: measure_packing_text(),
        "tokens": measure_packing_tokens,
        "generated": lambda out: measure_generating(),
        "resume": measure_resume,
    }
    parser.add_argument("--only", choices=parts, help="one part")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("| what | median | range | unit |\n|---|---|---|---|")
    for name, measure in parts.items():
        if arguments.only in (None, name):
            measure(arguments.out)


if __name__ == "__main__":
    main(sys.argv[1:])
