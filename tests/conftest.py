"""Settings of the whole suite, and the fixtures of many folders."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

# Fresh memory holds NaN, so that a missed initialisation shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# The tensors are small, and threads that wait for a busy core cost more than they give.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("flame", deadline=None, max_examples=40)
settings.load_profile("flame")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and what takes long unless it is asked for."""
    wants_slow, wants_long = (marker in config.getoption("-m") for marker in ("slow", "long"))
    gpus = torch.cuda.device_count()
    for item in items:
        if (item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu")) and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))
        elif item.get_closest_marker("long") and not wants_long:
            item.add_marker(pytest.mark.skip(reason="long: pytest -m long"))


def pytest_collection_finish() -> None:
    """What is imported stays, and is no garbage to look for: an export looks twice, for a third of a second each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # some libraries count at exit what is left


@pytest.fixture(scope="session", autouse=True)
def draw_no_curves() -> Iterator[None]:
    """Runs of this process end without their picture, which takes half of a toy run's time. A test that wants it puts it back."""
    with patch("flame.logging.plots.plot_run"):
        yield


@pytest.fixture(scope="session", autouse=True)
def fork_ranks_from_what_they_import() -> Iterator[None]:
    """The server process imports what ranks need. Each loader would name only its own modules, and each rank import the rest."""
    from tests.support.ranks import PROCESSES  # not at the top: the environment is set first

    with patch.object(PROCESSES, "set_forkserver_preload"):
        yield


@pytest.fixture(scope="session", autouse=True)
def seed_no_absent_devices() -> Iterator[None]:
    """Each seed for a device that is not there yet is kept with the stack of its call, which costs more than the seed."""
    with ExitStack() as patches:
        if not torch.cuda.is_available():
            for devices in ("torch.cuda", "torch.mtia"):
                patches.enter_context(patch(f"{devices}.manual_seed_all"))
        yield


@pytest.fixture(autouse=True)
def leave_no_trace() -> Iterator[None]:
    """A run changes its process: group, environment, garbage collection, what Ctrl-C does."""
    before, interrupt, had_group = dict(os.environ), signal.getsignal(signal.SIGINT), dist.is_initialized()
    yield
    signal.signal(signal.SIGINT, interrupt)
    if dist.is_initialized() and not had_group:
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    gc.enable()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A toy model and a corpus of short documents. No test changes them."""
    from tests.support.models import tiny_llama  # not at the top: the environment is set first

    folder = tmp_path_factory.mktemp("workspace")
    tiny_llama(vocab_size=264).save_pretrained(folder / "model")
    chooser = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    documents = [" ".join(chooser.choices(words, k=chooser.randint(1, 30))) for _ in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


@pytest.fixture(scope="session")
def plain_run(workspace, tmp_path_factory) -> Path:
    """The folder of a finished run with no changes. A test that would change it takes a copy."""
    from tests.support.runs import run_here

    run = tmp_path_factory.mktemp("runs") / "plain"
    run_here(workspace, run)
    return run


@pytest.fixture(scope="session")
def exported_run(workspace, tmp_path_factory) -> Path:
    """As `plain_run`, with the model that it exports at its end."""
    from tests.support.runs import run_here

    run = tmp_path_factory.mktemp("runs") / "exported"
    run_here(workspace, run, checkpoint__export_hf=True)
    return run


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def own_remote_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of what lies elsewhere go to a folder of the test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """One of the memory file system, for this test alone."""
    return f"memory://bucket/{request.node.name}"
