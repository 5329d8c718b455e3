"""A small model with its checkpointer, filled with numbers that name the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flame.checkpoints.manager import Checkpointer, list_checkpoints
from flame.checkpoints.manifest import DIGESTS, OWN_DIGEST, TRAINER_FILE, render


class Net(nn.Module):
    """Shapes that 2 and 4 ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 3))
        self.bias = nn.Parameter(torch.zeros(5))
        self.square = nn.Parameter(torch.zeros(4, 4))


class Moments:
    """An optimizer's state: sharded moments, a plain counter and a number that is no tensor."""

    def __init__(self, model: Net):
        self.state: dict[str, Any] = {f"state.{name}.exp_avg": torch.zeros_like(p.data) for name, p in model.named_parameters()}
        self.state |= {"state.step": torch.zeros(()), "param_groups.lr": 0.1}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)


class Case(NamedTuple):
    model: Net
    optimizer: Moments
    checkpointer: Checkpointer

    def save(self, step: int) -> None:
        self.checkpointer.save(step, {"step": step, "config": {"training": {"seed": 1}}})

    def load(self) -> int | None:
        state = self.checkpointer.load_latest(lambda state: None)
        return None if state is None else state["step"]

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name."""
        moments = {name: value for name, value in self.optimizer.state.items() if isinstance(value, Tensor)}
        return {f"model.{k}": v.data for k, v in self.model.named_parameters()} | {
            f"optimizer.{k}": v for k, v in moments.items()
        }

    def fill(self, seed: int) -> None:
        """Change the live tensors in place, as training does, to what `expected(seed)` is on any number of ranks."""
        for name, tensor in self.tensors().items():
            full = expected(seed)[name]
            if isinstance(tensor, DTensor):
                tensor.copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements))
            else:
                tensor.copy_(full)

    def full(self) -> dict[str, Tensor]:
        return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in self.tensors().items()}


def write_assets(folder: Path) -> None:
    (folder / "nested").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "nested" / "vocab.txt").write_text("a b c")


def build_case(folder: Path, mesh: DeviceMesh | None = None, keep: int = 2, asynchronous: bool = False) -> Case:
    model = Net()
    fully_shard(model, mesh=mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
    optimizer = Moments(model)
    arguments: Any = (folder, model, optimizer, keep, write_assets)
    return Case(model, optimizer, Checkpointer(*arguments, asynchronous=asynchronous))


def expected(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"table": (7, 3), "bias": (5,), "square": (4, 4)}
    wanted = {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    wanted |= {f"optimizer.state.{name}.exp_avg": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return wanted | {"optimizer.state.step": torch.tensor(float(seed))}


def read_stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by the library alone."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    tensors: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(tensors, checkpoint_id=folder)
    return tensors


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def edit_state(checkpoint: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = False) -> None:
    """Change a checkpoint's `trainer.json`.

    Args:
        signed: it gets a digest of what it then says. Otherwise all digests are taken out, as if an older release had made it.
    """
    path = checkpoint / TRAINER_FILE
    state = json.loads(path.read_text())
    del state[OWN_DIGEST]
    change(state)
    if signed:
        path.write_bytes(render(state))
    else:
        state.pop(DIGESTS, None)
        path.write_text(json.dumps(state))


def age(checkpoint: Path) -> None:
    """Make a checkpoint one of an older release, without digests."""
    edit_state(checkpoint, lambda state: None)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]
