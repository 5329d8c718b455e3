"""Changed files: every byte of a checkpoint, every value of `trainer.json` and of a model configuration. Part of `faults`.

Each case ends in one of three ways: the checkpoint before is used, with a warning; one line says what is wrong; or the change was
harmless, and what is loaded is bit-equal. Anything else, such as a traceback, other numbers or a hang, is a failure, and printed.

All cases run in this process. A checkpoint is loaded into one trainer again and again, over weights that are NaN.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash

from flame.checkpoints.manifest import DIGESTS, OWN_DIGEST, TRAINER_FILE
from flame.checkpoints.state import RunState
from flame.data.state import DataState
from flame.errors import UserError
from flame.logging.counters import Counters
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer
from flame.trainer.options import read_options

OLDER, TOLD, HARMLESS = "the one before, with a warning", "rejected in one line", "harmless, bit-equal"
WAYS = (OLDER, TOLD, HARMLESS)
SLOWEST_SECONDS = 60
STEPS, INTERVAL = 8, 4


class Case(NamedTuple):
    """A change, and how to make it again."""

    label: str
    inflict: Callable[[Path], object]


class Warnings(logging.Handler):
    """Keeps the warnings of the program."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Loader:
    """A trainer of a finished run of two checkpoints, which loads changed copies of them."""

    def __init__(self, argv: list[str], run: Path):
        set_single_process_defaults()
        Trainer(read_options(argv, 1)).train()
        self.run, self.warnings = run, Warnings()
        self.trainer = Trainer(read_options(argv, 1))
        logging.getLogger("flame").handlers = [self.warnings]
        self.expected = {}
        for step in (INTERVAL, STEPS):
            folder = run.with_name(f"only-{step}")
            shutil.copytree(run / "checkpoint" / f"step-{step}", folder / "checkpoint" / f"step-{step}")
            self.load(folder)
            self.expected[step] = self.describe()

    def load(self, folder: Path) -> None:
        """Load the newest checkpoint of a folder as a new start would."""
        trainer, config = self.trainer, self.trainer.config
        config.job.dump_folder, trainer.checkpointer.folder = str(folder), folder / "checkpoint"
        trainer.counters = Counters(tokens_by_source=dict.fromkeys(trainer.source_names, 0))
        trainer.data_state = DataState(config.training.num_streams, config.training.seed)
        trainer.state = trainer.checkpoints._state = RunState(trainer.counters, trainer.data_state)
        with torch.no_grad():
            for tensors in trainer.checkpointer._list_tensors().values():
                for tensor in tensors.values():
                    tensor.fill_(float("nan"))
        self.warnings.lines.clear()
        assert trainer.checkpoints.resume()
        trainer.data_state.check_units(trainer.mixture.count_units())

    def describe(self) -> tuple[int, str]:
        """Step, and a digest of all that was loaded."""
        digest = xxhash.xxh3_128(json.dumps(self.trainer.state.gather(), sort_keys=True).encode())
        for section, tensors in self.trainer.checkpointer._list_tensors().items():
            for name, tensor in tensors.items():
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                digest.update(f"{section}.{name}".encode() + local.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return self.trainer.state.step, digest.hexdigest()

    def try_case(self, case: Case, folder: Path) -> str:
        """Which way a case ends, or what went wrong."""
        shutil.copytree(self.run / "checkpoint", folder / "checkpoint", copy_function=os.link)
        case.inflict(folder / "checkpoint" / f"step-{STEPS}")
        try:
            self.load(folder)
        except UserError as error:
            return TOLD if len(error.lines) == 1 else f"{len(error.lines)} lines"
        found = self.describe()
        if found == self.expected[STEPS]:
            return HARMLESS
        if found != self.expected[INTERVAL]:
            return f"other numbers, of step {found[0]}"
        return OLDER if any("passed over" in line for line in self.warnings.lines) else "the one before, without a warning"


def change(path: Path, content: bytes) -> None:
    """Write other content, and leave the file that this one is a link of."""
    path.unlink()
    path.write_bytes(content)


def change_state(content: bytes, checkpoint: Path) -> None:
    change(checkpoint / TRAINER_FILE, content)


def flip(name: str, place: int, bit: int) -> Case:
    def inflict(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[place] ^= 1 << bit
        change(checkpoint / name, bytes(content))

    return Case(f"{name}: bit {bit} of byte {place}", inflict)


def draw_flips(checkpoint: Path, count: int, chooser: random.Random) -> Iterator[Case]:
    """Half of them in a file drawn first, so that small files have their share, half in a byte of all."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    names = [name for name, size in sizes.items() if size]
    for number in range(count):
        name = chooser.choice(names) if number % 2 else chooser.choices(names, [sizes[name] for name in names])[0]
        yield flip(name, chooser.randrange(sizes[name]), chooser.randrange(8))


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where all values within a value are."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from list_paths(child, (*path, key))


def find(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


ANYTHING: tuple[Any, ...] = (None, True, False, 0, 1, -1, 7, 2**31, 2**64, 1e30, 0.5, -0.5, "", "8", "two", [], [0], {}, {"a": 1})
IMPOSSIBLE = (None, -1, 8.5, "8", "two", [-1], {"a": 1})
RELIED_ON = ("step", "world_size", "validated_step", "counters", "data", "files", "service_ids", "objective")


def draw_states(state: dict[str, Any], count: int, chooser: random.Random) -> Iterator[Case]:
    """Any value is replaced or taken out. Every second one loses its digests, as if an older release had made the checkpoint:
    then it becomes what cannot be, since any other value could be the right one."""
    everywhere = list(list_paths(state))
    relied_on = [path for path in everywhere if path[0] in RELIED_ON and "content" not in path]
    for number in range(count):
        is_older = bool(number % 2)
        path = chooser.choice(relied_on if is_older else everywhere)
        value = chooser.choice(IMPOSSIBLE if is_older else ANYTHING)
        drops = chooser.random() < 0.2 and not (is_older and "cursors" in path)
        changed = deepcopy(state)
        if drops:
            del find(changed, path[:-1])[path[-1]]
        else:
            find(changed, path[:-1])[path[-1]] = value
        if is_older:
            changed.pop(DIGESTS, None), changed.pop(OWN_DIGEST, None)
        content = json.dumps(changed).encode()
        what = "taken out" if drops else f"= {json.dumps(value)}"
        label = f"{TRAINER_FILE}{', without digests' if is_older else ''}: {'.'.join(map(str, path))} {what}"
        yield Case(label, partial(change_state, content))


SIZES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    7,
    2**20,
    10**12,
    2**62,
    10**30,
    0.5,
    0.0,
    -1.0,
    1e30,
    float("inf"),
    float("nan"),
    "x",
    "",
    [],
    {},
)


def draw_models(model: dict[str, Any], count: int, chooser: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """A configuration in which one or two values, or a nested one, are others. `2^20` layers are more than a million."""
    for _ in range(count):
        changed = deepcopy(model)
        paths = chooser.sample(list(list_paths(model)), chooser.choice((1, 1, 2)))
        for path in paths:
            if len(path) == 1 or path[:1] not in paths:
                find(changed, path[:-1])[path[-1]] = chooser.choice(SIZES)
        yield json.dumps({path[0]: changed[path[0]] for path in paths}), changed


@contextmanager
def time_limit() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SLOWEST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SLOWEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_cases(kind: str, cases: Iterator[tuple[str, Callable[[], str]]], ways: tuple[str, ...] = WAYS) -> bool:
    """Run cases and print a line of the table. Returns whether all ended in one of the allowed ways."""
    counts: Counter[str] = Counter()
    for label, run in cases:
        try:
            with time_limit():
                found = run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found not in ways:
            print(f"  {kind}: {label}: {found}", flush=True)
            found = "failed"
        counts[found] += 1
    print(f"| {kind} | {counts.total()} | {' | '.join(str(counts[way]) for way in (*ways, 'failed'))} |", flush=True)
    return not counts["failed"]


def run_files(out: Path, model: dict[str, Any], options: dict[str, object], seed: int, share: float = 1.0) -> bool:
    """Run all cases and print a table. Returns whether none has failed.

    Args:
        options: of the toy run.
        share: of the number of cases.
    """
    out.mkdir(parents=True)
    (out / "model.json").write_text(json.dumps(model))
    run, chooser = out / "run", random.Random(seed)
    values = options | {"model.config": out / "model.json", "training.num_workers": 0, "training.steps": STEPS}
    values |= {"checkpoint.interval": INTERVAL, "metrics.diagnostics_interval": 0, "lr_scheduler.warmup_steps": 2}
    values |= {"training.seq_len": 128, "training.context_len": 64}
    torch.set_num_threads(1)  # the tensors are small, and threads wait for busy cores

    def list_argv(further: dict[str, object]) -> list[str]:
        return [part for key, value in (values | further).items() for part in (f"--{key}", str(value))]

    loader = Loader(list_argv({"job.dump_folder": run}), run)
    checkpoint = run / "checkpoint" / f"step-{STEPS}"
    state = json.loads((checkpoint / TRAINER_FILE).read_text())

    def load_each(cases: Iterator[Case], name: str) -> Iterator[tuple[str, Callable[[], str]]]:
        for number, case in enumerate(cases):
            folder = out / f"{name}-{number}"
            yield case.label, partial(loader.try_case, case, folder)
            shutil.rmtree(folder, ignore_errors=True)

    print(f"| changed, seed {seed} | cases | {' | '.join((*WAYS, 'failed'))} |")
    print(f"|{'---|' * (len(WAYS) + 3)}")
    is_good = run_cases("one bit of any file", load_each(draw_flips(checkpoint, int(500 * share), chooser), "flip"))
    is_good &= run_cases("one value of trainer.json", load_each(draw_states(state, int(500 * share), chooser), "state"))
    dist.destroy_process_group()

    def train(config: dict[str, Any], folder: Path) -> str:
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps(config))
        changes = {"model.config": folder / "model.json", "training.steps": 1, "job.dump_folder": folder / "run"}
        try:
            Trainer(read_options(list_argv(changes | {"checkpoint.enable_checkpoint": "false"}), 1)).train()
        except UserError as error:
            return TOLD if all("\n" not in line for line in error.lines) else "a broken line"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        (row,) = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return HARMLESS if row.get("ce_loss") is not None and not row["skipped_steps"] else "a loss that is not finite"

    def train_each() -> Iterator[tuple[str, Callable[[], str]]]:
        for number, (label, config) in enumerate(draw_models(model, int(300 * share), chooser)):
            folder = out / f"model-{number}"
            yield label, partial(train, config, folder)
            shutil.rmtree(folder, ignore_errors=True)

    logging.disable(logging.WARNING)  # each start sets up its own log
    return run_cases("values of the model's configuration (harmless: a finite loss)", train_each()) and is_good
