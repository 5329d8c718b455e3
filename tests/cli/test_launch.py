"""`flame.launch` and train.sh: options are checked before any worker starts; stops and failures keep their exit codes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flame.errors import UserError
from flame.launch import main, report_mistake
from flame.runtime.launching import find_stop_code
from flame.runtime.rendezvous import read_place
from flame.runtime.signals import PREEMPTED_EXIT_CODE, SAME_REQUEST_SECONDS
from tests.support.options import MODEL
from tests.support.paths import REPO

WORKER = """
import os, sys, time
from flame.runtime.signals import PREEMPTED_EXIT_CODE, StopListener
from flame.errors import UserError
from flame.launch import report_mistake
if os.environ["RANK"] == "1":
    print("not shown", file=sys.stderr)
if os.environ["RANK"] != os.environ["WORKER_FAILING_RANK"]:
    with StopListener() as listener:
        while listener.requested is None:
            time.sleep(0.01)
    sys.exit(PREEMPTED_EXIT_CODE)
lines = " ".join([*sys.argv[1:], os.environ["WORLD_SIZE"]])
if os.environ["WORKER_EXIT_CODE"] == "2":
    report_mistake(UserError(lines, "second line"))
else:
    print(lines, file=sys.stderr)
sys.exit(int(os.environ["WORKER_EXIT_CODE"]))
"""

# The last argument says what rank 0 and rank 1 are at when a signal comes.
STOPPED_WORKER = """
import ctypes, os, sys, time
from pathlib import Path
from flame.runtime.signals import PREEMPTED_EXIT_CODE, StopListener
rank, others = os.environ["RANK"], sys.argv[-1].split()
phase = others.pop(int(rank))
def leave(name, text):
    Path("unfinished" + rank).write_text(text)
    Path("unfinished" + rank).rename(name + rank)
if phase == "importing":
    leave("ready", str(os.getpid()))
    time.sleep(600)
with StopListener() as listener:
    leave("ready", str(os.getpid()))
    if phase == "stuck":
        mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    while listener.requested is None:
        time.sleep(0.01)
    time.sleep(0.3)
    leave("saved", listener.requested)
    while others == ["training"] and len(list(Path().glob("saved*"))) < 2:
        time.sleep(0.01)
sys.exit(PREEMPTED_EXIT_CODE)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model configuration, a stand-in worker, and a package that must not be taken for ours."""
    (tmp_path / "m.json").write_text('{"model_type": "llama"}')
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "worker.py").write_text(WORKER)
    (tmp_path / "lib" / "stopped.py").write_text(STOPPED_WORKER)
    (tmp_path / "flame").mkdir()
    (tmp_path / "flame" / "__init__.py").write_text("raise RuntimeError('the wrong flame')")
    return tmp_path


def build_environment(environment: dict[str, str]) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**inherited, "PYTHON": sys.executable, "PYTHONSAFEPATH": "1", **environment}


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = build_environment(environment)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


@contextmanager
def start(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start the launcher; what is left of it at the end is killed."""
    command = [sys.executable, "-m", "flame.launch", *options]
    environment = build_environment({"PYTHONPATH": f"{REPO}:{folder / 'lib'}", "OMP_NUM_THREADS": "1"})
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as launcher:
        try:
            yield launcher
        finally:
            launcher.kill()


@contextmanager
def start_workers(folder: Path, phases: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start two stand-in workers; go on when they are in these phases, with the launcher and their process ids."""
    options = ["--standalone", "--nproc-per-node=2", "-m", "stopped", *MODEL, "--job.description", phases]
    with start(folder, *options) as launcher:
        ready = [folder / "ready0", folder / "ready1"]
        wait_until(lambda: launcher.poll() is not None or all(path.exists() for path in ready))
        yield launcher, [int(path.read_text()) for path in ready]


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, once the launcher and all workers, which share them, have ended."""
    output, errors = launcher.communicate(timeout=100)
    return launcher.returncode, output, errors


def read_saved(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("saved*")}


def run_script(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(["bash", str(REPO / "train.sh"), *options], folder, **environment)


def run_worker(folder: Path, exit_code: int, failing_rank: int = 0) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "flame.launch", "--standalone", "--nproc-per-node=2", "--local-ranks-filter=0"]
    return run(
        [*launch, "-m", "worker", *MODEL],
        folder,
        PYTHONPATH=f"{REPO}:{folder / 'lib'}",
        OMP_NUM_THREADS="1",
        WORKER_EXIT_CODE=str(exit_code),
        WORKER_FAILING_RANK=str(failing_rank),
    )


def test_script_prints_help_and_starts_nothing(folder: Path) -> None:
    done = run_script(folder, "--training.steps", "wrong", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--training.steps" in done.stdout
    assert run_script(folder, "--help", "nonsense").returncode == UserError.EXIT_CODE
    assert sorted(path.name for path in folder.iterdir()) == ["flame", "lib", "m.json"]


def test_script_ends_with_the_mistakes_alone(folder: Path) -> None:
    # NGPU reaches the check of the data streams; m.json is found only if the caller's folder is kept.
    done = run_script(folder, *MODEL, "--training.stepz", "a b", "--optimizer.lr=0", "--training.num_workers=7", NGPU="6")
    assert (done.returncode, done.stdout) == (UserError.EXIT_CODE, "")
    typo, out_of_range, conflict = done.stderr.splitlines()
    assert typo == 'training.stepz = "a b" (command line): no such option, did you mean training.steps?'
    assert out_of_range == "optimizer.lr = 0 (command line): allowed is a finite number > 0"
    assert conflict.startswith("training.num_streams = 192 is not a multiple of ranks x workers = 6 x 7")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"NGPU": "two"}, "NGPU = two (environment): allowed is an integer > 0"),
        ({"NGPU": "0"}, "NGPU = 0 (environment): allowed is an integer > 0"),
        ({"LOG_RANK": "x"}, "LOG_RANK = x (environment): allowed are ranks below NGPU = 1, separated by commas"),
        ({"LOG_RANK": "1"}, "LOG_RANK = 1 (environment): allowed are ranks below NGPU = 1, separated by commas"),
        (
            {"LOG_RANK": "0,08", "NGPU": "8"},
            "LOG_RANK = 0,08 (environment): allowed are ranks below NGPU = 8, separated by commas",
        ),
        ({"NNODES": "1:x"}, "NNODES = 1:x (environment): allowed is an integer > 0, or MIN:MAX"),
        ({"NNODES": "3:2"}, "NNODES = 3:2 (environment): allowed is an integer > 0, or MIN:MAX"),
        ({"NNODES": "1:2", "NODE_RANK": "2"}, "NODE_RANK = 2 (environment): allowed is 0 to 1, another one on each machine"),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": "65536"},
            "MASTER_PORT = 65536 (environment): allowed is 1 to 65535, the same on all machines",
        ),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS = -1 (environment): allowed is an integer >= 0"),
        ({"NNODES": "2"}, "NODE_RANK =  (environment): allowed is 0 to 1, another one on each machine"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK = 2 (environment): allowed is 0 to 1, another one on each machine"),
    ],
)
def test_script_names_mistakes_in_the_environment(folder: Path, environment: dict[str, str], line: str) -> None:
    done = run_script(folder, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (UserError.EXIT_CODE, "", line + "\n")


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, "--nnodes 1 --nproc-per-node 1 --local-ranks-filter 0"),
        ({"NGPU": "2", "LOG_RANK": "0,1"}, "--nnodes 1 --nproc-per-node 2 --local-ranks-filter 0,1"),
        ({"MAX_RESTARTS": "3"}, "--nnodes 1 --nproc-per-node 1 --max-restarts 3 --local-ranks-filter 0"),
        ({"NGPU": "2", "LOG_RANK": "01"}, "--nnodes 1 --nproc-per-node 2 --local-ranks-filter 01"),
        (
            {"NNODES": "10", "NODE_RANK": "08", "MASTER_ADDR": "first", "MASTER_PORT": "7"},
            "--nnodes 10 --nproc-per-node 1 --node-rank 8 --master-addr first --master-port 7 --local-ranks-filter 0",
        ),
    ],
)
def test_script_passes_environment_and_arguments(folder: Path, environment: dict[str, str], arguments: str) -> None:
    echo = folder / "echo"
    echo.write_text('#!/bin/bash\nprintf "%s\\n" "$OMP_NUM_THREADS" "$@"\n')
    echo.chmod(0o755)
    shown = run_script(folder, "--a.b", "c  d", "", "*", **{**environment, "PYTHON": str(echo)}).stdout.split("\n")
    threads = max(1, len(os.sched_getaffinity(0)) // int(environment.get("NGPU", "1")))
    assert shown == [str(threads), *f"-m flame.launch {arguments} -m flame.train --a.b".split(), "c  d", "", "*", ""]
    kept = run_script(folder, **{**environment, "PYTHON": str(echo), "OMP_NUM_THREADS": "3"}).stdout.split("\n")
    assert kept[0] == "3"


@pytest.mark.parametrize("failing_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_mistake_that_a_worker_met_is_all_that_is_shown(folder: Path, failing_rank: int) -> None:
    """Also that of a rank whose output is not shown."""
    done = run_worker(folder, UserError.EXIT_CODE, failing_rank)
    lines = " ".join([*MODEL, "2\n"]) + "second line\n"
    assert (done.returncode, done.stdout, done.stderr) == (UserError.EXIT_CODE, "", lines)


def test_without_torchrun_the_worker_prints_the_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    report_mistake(UserError("one", "two"))
    assert capsys.readouterr().err == "one\ntwo\n"


@pytest.mark.slow
def test_other_failures_keep_their_code_and_are_one_line(folder: Path) -> None:
    done = run_worker(folder, 7)
    assert done.returncode == 7
    assert done.stderr.splitlines()[1:] == [
        f"rank 0 on {socket.gethostname()} ended with exit code 7; nothing is saved yet: the same command begins anew"
    ]


@pytest.mark.slow
def test_a_finished_run_ends_with_zero(folder: Path) -> None:
    launch = [sys.executable, "-m", "flame.launch", "--standalone", "-m", "worker", *MODEL]
    done = run(launch, folder, PYTHONPATH=f"{REPO}:{folder / 'lib'}", WORKER_EXIT_CODE="0", WORKER_FAILING_RANK="0")
    assert (done.returncode, done.stderr) == (0, " ".join([*MODEL, "1\n"]))


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_stop_signal_lets_all_workers_save(folder: Path, stop: signal.Signals) -> None:
    with start_workers(folder, "training training") as (launcher, workers):
        launcher.send_signal(stop)
        if stop == signal.SIGTERM:  # as a scheduler may send it to every process
            for pid in workers:
                os.kill(pid, stop)
        assert end(launcher) == (PREEMPTED_EXIT_CODE, "", "")
    assert read_saved(folder) == {"saved0": stop.name, "saved1": stop.name}


@pytest.mark.slow
def test_a_second_stop_signal_ends_stuck_workers(folder: Path) -> None:
    with start_workers(folder, "stuck stuck") as (launcher, _):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(SAME_REQUEST_SECONDS + 1.0)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGUSR1)
        assert end(launcher) == (128 + signal.SIGUSR1, "", "")


@pytest.mark.slow
def test_a_stop_signal_while_the_workers_start_loses_nothing(folder: Path) -> None:
    with start_workers(folder, "importing importing") as (launcher, _):
        launcher.send_signal(signal.SIGUSR1)
        assert end(launcher) == (PREEMPTED_EXIT_CODE, "", "")


@pytest.mark.slow
def test_a_worker_may_be_asked_alone(folder: Path) -> None:
    """The other one, which torchrun then kills, hides neither the exit code nor the silence."""
    with start_workers(folder, "importing training") as (launcher, workers):
        os.kill(workers[1], signal.SIGUSR1)
        assert end(launcher) == (PREEMPTED_EXIT_CODE, "", "")
    assert read_saved(folder) == {"saved1": "SIGUSR1"}


@pytest.mark.slow
def test_workers_end_with_a_killed_launcher(folder: Path) -> None:
    with start_workers(folder, "training stuck") as (launcher, _):
        launcher.kill()
        assert end(launcher) == (-signal.SIGKILL, "", "")
    assert read_saved(folder) == {}


@pytest.mark.slow
def test_a_stop_signal_before_there_are_workers_ends_the_launcher(folder: Path) -> None:
    """Also while torchrun waits inside C code for another machine."""
    with socket.create_server(("localhost", 0)) as free:
        address = free.getsockname()
    options = ["--nnodes=2", "--node-rank=0", "--master-addr=localhost", f"--master-port={address[1]}"]
    with start(folder, *options, "-m", "stopped", *MODEL) as launcher:
        wait_until(lambda: launcher.poll() is not None or is_open(address))
        launcher.send_signal(signal.SIGUSR1)
        assert end(launcher) == (128 + signal.SIGUSR1, "", "")


def test_an_interpreter_without_the_packages_is_one_line(folder: Path) -> None:
    command = [sys.executable, "-S", "-m", "flame.launch", "-m", "flame.train", *MODEL]
    environment = build_environment({"PYTHONPATH": str(REPO)})
    outcome = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout) == (UserError.EXIT_CODE, "")
    assert outcome.stderr.startswith(f"PYTHON = {sys.executable} (environment): has no package ")
    assert outcome.stderr.endswith("an interpreter that has them all\n") and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["flame.launch", "flame.train"])
def test_ctrl_c_while_modules_are_imported_ends_in_silence(folder: Path, module: str) -> None:
    """By the signal, which a shell shows as 130."""
    (folder / "lib" / "torch.py").write_text("import time, pathlib\npathlib.Path('ready').touch()\ntime.sleep(600)")
    command = [sys.executable, "-m", module, *(["-m", "flame.train"] if module == "flame.launch" else []), *MODEL]
    environment = build_environment({"PYTHONPATH": f"{folder / 'lib'}:{REPO}"})
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit that it is ignored
    ) as process:
        try:
            wait_until(lambda: process.poll() is not None or (folder / "ready").exists())
            process.send_signal(signal.SIGINT)
            assert end(process) == (-signal.SIGINT, "", "")
        finally:
            process.kill()


def is_open(address: tuple[str, int]) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(address) == 0


@pytest.mark.parametrize(
    ("exit_codes", "forwarded", "code"),
    [
        ([75], [], 75),
        ([75, -15], [], 75),
        ([75, 1], [], 75),
        ([7, 75], [], None),
        ([1, 75], [15], 75),
        ([143, 75], [15], 75),
        ([-10], [10], 75),
        ([-15, 143, -9], [10, 15], 75),
        ([-15], [], None),
        ([-9, 143], [15], None),
        ([143, -9], [15], 143),
        ([138, 138], [10], 138),
        ([143], [], None),
        ([7, 143], [15], None),
    ],
)
def test_tells_stopped_workers_from_failed_ones(exit_codes: list[int], forwarded: list[int], code: int | None) -> None:
    assert find_stop_code(exit_codes, set(forwarded)) == code


@pytest.mark.parametrize(
    ("options", "environment", "count"),
    [
        ([], {}, 1),
        (["--nnodes=2", "--nproc-per-node", "8"], {}, 16),
        (["--nnodes", "2:4", "--nproc_per_node=3", "--standalone", "--local-ranks-filter", "0"], {}, 6),
        ([], {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "2"}, 6),
        (["--nproc-per-node=5"], {"PET_NPROC_PER_NODE": "2"}, 5),
    ],
)
def test_counts_processes_over_the_fewest_machines(
    options: list[str], environment: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    place = read_place(options)
    assert place.fewest * place.processes == count


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--nnodes=x", "-m", "flame.train"], "--nnodes = x: allowed is an integer > 0, or MIN:MAX"),
        (["--nnodes=3:2", "-m", "flame.train"], "--nnodes = 3:2: allowed is an integer > 0, or MIN:MAX"),
        (["--nnodes=0", "-m", "flame.train"], "--nnodes = 0: allowed is an integer > 0, or MIN:MAX"),
        (
            ["--nproc-per-node=0", "-m", "flame.train"],
            "--nproc-per-node = 0: allowed is an integer > 0, or cpu, gpu, auto where there are any",
        ),
        (["-m"], "no module to run: usage is python -m flame.launch [torchrun options] -m flame.train [options]"),
    ],
)
def test_names_mistakes_in_torchruns_options(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == UserError.EXIT_CODE
    assert capsys.readouterr().err == line + "\n"
