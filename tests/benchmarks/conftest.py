"""A toy model, and a mesh of this process alone."""

from __future__ import annotations

import pytest
from torch.distributed.device_mesh import init_device_mesh

from tests.support.models import tiny_llama


@pytest.fixture
def mesh(one_process):
    return init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))


@pytest.fixture
def toy(tmp_path):
    tiny_llama(num_hidden_layers=6, initializer_range=0.3).to_json_file(tmp_path / "toy.json")
    return tmp_path / "toy.json"
