"""Runs of several machines, each a launcher of its own on this host, or in a network of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from flame.checkpoints.manager import list_checkpoints
from flame.runtime.endings import LOST_EXIT_CODE
from flame.runtime.sameness import ADVICE
from tests.support.paths import REPO
from tests.support.runs import act_as_machine, find_free_port, measured, options, read_metrics

HOST = socket.gethostname()
WAIT_SECONDS = 120
LONG = {"training__steps": 4000, "training__gradient_accumulation_steps": 2, "comm__timeout_seconds": 20}


class Machine:
    """train.sh, running."""

    def __init__(self, number: int, arguments: list[str], variables: dict[str, str], prefix: list[str]):
        own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NODE_RANK": str(number)} | act_as_machine(number)
        environment = os.environ | own | variables
        if torch.cuda.device_count() > 1 and environment.get("NNODES", "1") != "1":
            environment["CUDA_VISIBLE_DEVICES"] = str(number)
        command = [*prefix, "bash", str(REPO / "train.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and the lines on stderr that are not of torch's C++ log."""
        _, errors = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, [line for line in errors.splitlines() if not line.startswith("[")]

    def find_workers(self) -> list[int]:
        """Process ids of its workers."""
        children = ["ps", "--ppid", str(self.process.pid), "-o", "pid=,args="]
        found = subprocess.run(children, capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in found.splitlines() if " -m flame.train" in line]

    def kill(self) -> None:
        """All of it at once, as by a power cut."""
        for pid in [self.process.pid, *self.find_workers()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@contextmanager
def start(arguments: list[list[str]], prefixes: list[list[str]] | None = None, **variables: str) -> Iterator[list[Machine]]:
    """Start one machine for each list of arguments; at the end, kill what is left of them."""
    variables = {"NNODES": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()} | variables
    with ExitStack() as ending:
        machines = []
        for number, own in enumerate(arguments):
            machine = Machine(number, own, variables, prefixes[number] if prefixes else [])
            ending.callback(machine.kill)
            machines.append(machine)
        yield machines


def get_only_line(lines: list[str]) -> str:
    """What a machine says at its end. On a GPU, torch may say something before, for NCCL."""
    assert len(lines) == 1 or torch.cuda.is_available(), lines
    return lines[-1]


def wait_for_steps(run: Path, count: int, machines: list[Machine]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < count:
        assert time.monotonic() < deadline and all(machine.process.poll() is None for machine in machines)
        time.sleep(0.05)


@pytest.mark.long
def test_machines_that_differ_are_refused_on_both(workspace: Path, tmp_path: Path) -> None:
    arguments = [options(workspace, tmp_path / "run", optimizer__lr=lr) for lr in ("1e-3", "5e-3")]
    line = f"optimizer.lr is 0.001 on rank 0 ({HOST}), 0.005 on rank 1 ({HOST}): {ADVICE}"
    with start(arguments) as machines:
        for machine in machines:
            code, lines = machine.end()
            assert code == 2 and len(lines) == 1 and lines[0].endswith(line)


@pytest.mark.long
def test_documents_that_differ_are_refused_on_both(workspace: Path, tmp_path: Path) -> None:
    """Another path is no difference, one word in one document is."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text((workspace / "corpus.jsonl").read_text().replace("alpha", "omega", 1))
    arguments = [options(workspace, tmp_path / "run", training__data_files=path) for path in (workspace / "corpus.jsonl", copy)]
    with start(arguments) as machines:
        for machine in machines:
            code, lines = machine.end()
            assert code == 2 and len(lines) == 1 and "content of source json is " in lines[0]


@pytest.mark.long
def test_what_one_machine_lacks_ends_both(workspace: Path, tmp_path: Path) -> None:
    files = (workspace / "corpus.jsonl", "no.jsonl")
    arguments = [options(workspace, tmp_path / "run", training__data_files=path) for path in files]
    with start(arguments) as machines:
        line = 'training.data_files: "no.jsonl" matches no file'
        assert machines[1].end() == (2, [line])
        assert machines[0].end() == (2, [f"machine 1 ({HOST}): {line}"])


def send_to_rank_1(number: signal.Signals, workspace: Path, run: Path) -> list[tuple[int, list[str]]]:
    """How both machines of a run end after a signal to the rank of the second."""
    with start([options(workspace, run, **LONG)] * 2) as machines:
        wait_for_steps(run, 4, machines)
        os.kill(machines[1].find_workers()[-1], number)
        return [machine.end() for machine in machines]


@pytest.mark.slow
def test_a_killed_rank_is_named_on_both(workspace: Path, tmp_path: Path) -> None:
    (code, lines), (killed_code, killed_lines) = send_to_rank_1(signal.SIGKILL, workspace, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run" / "checkpoint")[-1]
    assert (code, killed_code) == (LOST_EXIT_CODE, 128 + signal.SIGKILL), lines
    line = get_only_line(lines)
    assert [line] == killed_lines
    assert line.startswith(f"rank 1 on {HOST} was ended by SIGKILL") and line.endswith(f"goes on from {newest}")


@pytest.mark.long
def test_a_rank_that_torch_has_aborted_is_named_unless_another_was_the_cause(workspace: Path, tmp_path: Path) -> None:
    """As NCCL does where it has lost a rank."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    ended = send_to_rank_1(signal.SIGABRT, workspace, alone)
    assert [code for code, _ in ended] == [LOST_EXIT_CODE, 128 + signal.SIGABRT]
    assert all(lines[-1].startswith(f"rank 1 on {HOST} was ended by SIGABRT") for _, lines in ended)
    with start([options(workspace, both, **LONG)] * 2) as machines:
        wait_for_steps(both, 4, machines)
        for machine, number in zip(machines, (signal.SIGABRT, signal.SIGKILL), strict=True):
            os.kill(machine.find_workers()[-1], number)
        ended = [machine.end() for machine in machines]
    assert [code for code, _ in ended] == [LOST_EXIT_CODE, 128 + signal.SIGKILL]
    assert all(lines[-1].startswith(f"rank 1 on {HOST} was ended by SIGKILL") for _, lines in ended)


@pytest.mark.long
def test_a_stopped_rank_is_named_on_both(workspace: Path, tmp_path: Path) -> None:
    ended = send_to_rank_1(signal.SIGSTOP, workspace, tmp_path / "run")
    assert [code for code, _ in ended] == [LOST_EXIT_CODE] * 2, ended
    assert all(get_only_line(lines).startswith(f"rank 1 on {HOST} is silent (stopped by a signal)") for _, lines in ended)
    if torch.cuda.is_available():
        assert (tmp_path / "run" / "nccl-0").exists(), "the record for torchfrtrace"


@pytest.mark.long
def test_a_stop_request_to_one_machine_stops_both(workspace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start([options(workspace, run, **LONG)] * 2) as machines:
        wait_for_steps(run, 4, machines)
        os.kill(machines[1].find_workers()[-1], signal.SIGTERM)
        assert [machine.end() for machine in machines] == [(75, [])] * 2


@pytest.mark.long
@pytest.mark.parametrize("machines_count", [1, 2])
def test_restarted_ranks_go_on_to_the_bit(workspace: Path, tmp_path: Path, machines_count: int) -> None:
    changes = {"training__gradient_accumulation_steps": 2, "training__steps": 40, "checkpoint__interval": 10}
    variables = {"NGPU": str(2 // machines_count)}
    runs = {}
    for name, restarts in (("plain", "0"), ("killed", "1")):
        run = tmp_path / name
        with start([options(workspace, run, **changes)] * machines_count, MAX_RESTARTS=restarts, **variables) as machines:
            if name == "killed":
                wait_for_steps(run, 13, machines)
                os.kill(machines[-1].find_workers()[-1], signal.SIGKILL)
            ended = [machine.end() for machine in machines]
        assert [code for code, _ in ended] == [0] * machines_count
        runs[name] = measured([row for row in read_metrics(run) if "loss" in row])
    assert any("was ended by SIGKILL" in line and "starting again, restart 1 of 1" in line for line in ended[-1][1])
    assert runs["killed"] == runs["plain"]


@pytest.mark.long
def test_a_run_goes_on_with_fewer_machines(workspace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"training__gradient_accumulation_steps": 2, "training__steps": 60, "comm__timeout_seconds": 30}
    with start([options(workspace, run, **changes)] * 2, NNODES="1:2", MAX_RESTARTS="2") as machines:
        wait_for_steps(run, 5, machines)
        machines[1].kill()
        assert machines[0].end()[0] == 0
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 61))


@pytest.mark.long
def test_on_one_machine_nothing_listens_to_others(workspace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start([options(workspace, run, **LONG)], NGPU="2") as machines:
        wait_for_steps(run, 2, machines)
        launcher = machines[0].process.pid
        found = {address for pid in (launcher, *machines[0].find_workers()) for address in list_listening(pid)}
        os.kill(launcher, signal.SIGTERM)
        machines[0].end()
    assert found and found <= {"0100007F"}, "127.0.0.1, in the byte order of /proc/net/tcp"


def list_listening(pid: int) -> Iterator[str]:
    """Addresses, in hexadecimal, on which a process accepts TCP connections."""
    folder = Path(f"/proc/{pid}/fd")
    inodes = {os.readlink(entry).removeprefix("socket:[").rstrip("]") for entry in folder.iterdir()}
    for table in ("tcp", "tcp6"):
        for row in (line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]):
            if row[3] == "0A" and row[9] in inodes:
                yield row[1].rpartition(":")[0]


@pytest.fixture
def networks() -> Iterator[list[list[str]]]:
    """Two network namespaces with addresses 10.77.0.1 and 10.77.0.2: the commands that run another in them."""
    names = [f"flame{os.getpid()}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "toother", "netns", names[0], "type", "veth", "peer", "name", "toother", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "toother")
            for interface in ("lo", "toother"):
                ip("-n", name, "link", "set", interface, "up")
    except FileNotFoundError:
        pytest.skip("`ip` is not installed here: package iproute2")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        pytest.skip(f"`ip netns` is not allowed here: {getattr(error, 'stderr', error)}")
    yield [["ip", "netns", "exec", name] for name in names]
    for name in names:
        ip("netns", "delete", name)


@pytest.mark.long
def test_machines_find_the_interface_that_joins_them(workspace: Path, tmp_path: Path, networks: list[list[str]]) -> None:
    run = tmp_path / "run"
    with start([options(workspace, run)] * 2, networks, MASTER_ADDR="10.77.0.1") as machines:
        assert [machine.end()[0] for machine in machines] == [0, 0]
    assert read_metrics(run)[-1]["step"] == 6


@pytest.mark.long
def test_a_cut_network_ends_both(workspace: Path, tmp_path: Path, networks: list[list[str]]) -> None:
    run = tmp_path / "run"
    with start([options(workspace, run, **LONG)] * 2, networks, MASTER_ADDR="10.77.0.1") as machines:
        wait_for_steps(run, 4, machines)
        subprocess.run(["ip", "-n", networks[1][3], "link", "set", "toother", "down"], check=True)
        ended = [machine.end() for machine in machines]
    assert [code for code, _ in ended] == [LOST_EXIT_CODE] * 2
    for number, (_, lines) in enumerate(ended):
        assert len(lines) == 1 and lines[0].startswith(f"machine {1 - number} ({HOST}) has ended without a word, or cannot")
