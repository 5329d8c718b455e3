"""How torchrun's processes find each other: what `flame.launch` makes of the options that train.sh passes to torchrun."""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

from flame.errors import UserError

STORE_OF_ROUND = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torchrun: each round of its rendezvous gets a store of its own. In the launcher's, keys of an earlier
round name workers that are gone."""
LAST_CALL_SECONDS = 30
"""How long a run with fewer machines than it can have waits for more."""
GONE_SECONDS = 20
"""torchrun takes a machine for gone after three heartbeats of five seconds."""
DEFAULT_PORT = 29500


class Place(NamedTuple):
    """Where this machine stands in the run, by the environment of train.sh."""

    number: int = 0
    """NODE_RANK."""
    fewest: int = 1
    most: int = 1
    """NNODES: the run starts with `fewest` machines, and at most `most` take part."""
    host: str = "localhost"
    """MASTER_ADDR."""
    port: int = DEFAULT_PORT
    """MASTER_PORT."""
    processes: int = 1
    """On this machine."""
    is_ours: bool = True
    """False if torchrun is told to use a rendezvous of its own."""

    @property
    def is_elastic(self) -> bool:
        return self.fewest != self.most

    @property
    def meets_others(self) -> bool:
        return self.is_ours and self.most > 1


def read_place(torchrun_options: list[str]) -> Place:
    """Read this machine's place from torchrun's options.

    Raises:
        UserError: a number is wrong.
    """
    defaults = {
        "nnodes": "1",
        "nproc-per-node": "1",
        "node-rank": "0",
        "master-addr": "localhost",
        "master-port": str(DEFAULT_PORT),
        "rdzv-backend": "static",
        "rdzv-endpoint": "",
    }
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in defaults.items():
        variable = f"PET_{name.upper().replace('-', '_')}"
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default=os.environ.get(variable, default))
    options, _ = parser.parse_known_args(torchrun_options)
    fewest, colon, most = options.nnodes.partition(":")
    numbers = [fewest, most] if colon else [fewest, fewest]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers) or int(numbers[0]) > int(numbers[1]):
        raise UserError(f"--nnodes = {options.nnodes}: allowed is an integer > 0, or MIN:MAX")
    return Place(
        number=int(options.node_rank),
        fewest=int(numbers[0]),
        most=int(numbers[1]),
        host=options.master_addr,
        port=int(options.master_port),
        processes=_count_local_processes(options.nproc_per_node),
        is_ours=options.rdzv_backend == "static" and not options.rdzv_endpoint,
    )


def set_rendezvous(options: Any, place: Place, address: str, timeout: int) -> None:
    """Tell torchrun where its processes meet: in the store that machine 0 serves.

    Args:
        options: torchrun's, parsed. They are changed.
        address: by which the other machines reach this one.
        timeout: seconds that a machine waits for the others.
    """
    options.standalone = False
    if not place.is_elastic and not (options.max_restarts and place.most > 1):
        options.rdzv_backend, options.node_rank, options.rdzv_conf = "static", place.number, f"timeout={timeout}"
        options.master_addr, options.master_port = place.host, place.port
        return
    # Machines that come and go, or start their workers again: torchrun's own rendezvous, in rounds.
    options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", f"{place.host}:{place.port}", "flame"
    last_call = min(timeout, LAST_CALL_SECONDS)
    options.rdzv_conf = (
        f"is_host={int(place.number == 0)},join_timeout={timeout + last_call + GONE_SECONDS},last_call_timeout={last_call},"
        f"read_timeout={timeout}"
    )
    options.local_addr, options.node_rank = address, 0
    os.environ[STORE_OF_ROUND] = "1"


def _count_local_processes(nproc_per_node: str) -> int:
    if nproc_per_node.isdecimal() and int(nproc_per_node) > 0:
        return int(nproc_per_node)
    # Words such as "gpu" depend on the machine, and need the slow import of torch.
    from torch.distributed.run import determine_local_world_size

    try:
        count = determine_local_world_size(nproc_per_node)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"--nproc-per-node = {nproc_per_node}: allowed is an integer > 0, or cpu, gpu, auto where there are any")
    return count
