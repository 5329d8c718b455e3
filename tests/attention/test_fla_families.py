"""The families of flash-linear-attention, by one table of toy models. Their kernels need a GPU, or Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from flame.attention import fla_families
from flame.attention.fla_families import TESTED, find_unsupported_fla
from flame.config.schema import JobConfig
from flame.models.causal_lm import load_model_config
from flame.models.leak_check import check_no_leak, needs_leak_check
from flame.trainer.setup import build_modules
from tests.support import fla_families as toys
from tests.support.fla_families import RUNS_INTERPRETED, TOYS, build_toy
from tests.support.models import future_config, needs_interpreter, shard
from tests.support.paths import REPO
from tests.support.runs import final_weights, run_here

CUDA = torch.device("cuda")
REFUSAL = "on Hopper GPUs produces incorrect results for gated chunk_bwd_dqkwg"
every_family = pytest.mark.parametrize("name", TOYS)
RESULTS: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def show_results(request) -> Iterator[None]:
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if not RESULTS or reporter is None:
        return
    columns = list(dict.fromkeys(column for row in RESULTS.values() for column in row))
    width = max(map(len, RESULTS))
    reporter.write_line("")
    for name, row in RESULTS.items():
        reporter.write_line(f"{name:{width}}  " + "  ".join(f"{column}: {row.get(column, '-')}" for column in columns))


def checked(name: str, what: str, check: Callable[[], None]) -> None:
    """Run a check of a family and note how it ends.

    A family that flash-linear-attention itself refuses here, in its own words, is an expected failure.
    """
    RESULTS.setdefault(name, {})[what] = "FAILED"
    try:
        check()
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        RESULTS[name][what] = "refused by fla"
        pytest.xfail(str(error))
    RESULTS[name][what] = "ok"


@pytest.fixture
def mesh(leave_no_trace) -> DeviceMesh:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


# ---------------------------------------------------------------- on any machine


def test_the_table_has_every_tested_family():
    assert set(TOYS) == TESTED


@every_family
def test_it_is_loaded_and_accepted(name, tmp_path):
    config = build_toy(name)
    config.save_pretrained(tmp_path)
    found = load_model_config(str(tmp_path))
    assert type(found) is type(config) and not needs_leak_check(found)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@every_family
def test_meta_build_and_sharding_start_as_the_plain_constructor(name, tied, mesh):
    """Names, shapes, buffers, tied weights; mean and spread of each tensor to sampling error."""
    config = future_config()
    model = build_modules(config, build_toy(name, tie_word_embeddings=tied), "cuda")  # nothing runs
    shard(model, config, mesh, seed=1)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(build_toy(name, tie_word_embeddings=tied), dtype=torch.float32)
    ours = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.lm.state_dict().items()}
    assert ours.keys() == plain.state_dict().keys()
    for key, expected in plain.state_dict().items():
        found, n = ours[key], expected.numel()
        spread = expected.std().item() if n > 1 else 0.0
        assert found.shape == expected.shape and found.dtype == expected.dtype, key
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=6 * spread * (2 / n) ** 0.5 + 1e-7), key
        assert n == 1 or found.std().item() == pytest.approx(spread, abs=6 * spread / n**0.5 + 1e-7), key
        if key.endswith("A_log"):
            assert found.min() >= 0 and found.max() <= torch.tensor(16.0).log(), key
    for (key, expected), (_, found) in zip(plain.named_buffers(), model.lm.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)
    assert (model.lm.get_output_embeddings().weight is model.lm.get_input_embeddings().weight) == tied


@pytest.mark.slow
@needs_interpreter
def test_passes_in_the_interpreter():
    """Leaks, packing and loss on a CPU. The interpreter is chosen when Triton is imported: a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.support.fla_families", *RUNS_INTERPRETED]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split("\n")[: len(RUNS_INTERPRETED)] == [f"{name}: {len(toys.CHECKS)} checks" for name in RUNS_INTERPRETED]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gla", {"attn": {"layers": [1], "num_heads": 4}}, "need the package flash-attn"),
        ("rwkv7", {"use_l2warp": True}, "use_l2warp = true is not supported"),
        ("rwkv7", {"num_hidden_layers": 1}, "num_hidden_layers = 1 is not supported"),
    ],
)
def test_what_is_refused(monkeypatch, name, changes, expected):
    monkeypatch.setattr(fla_families, "find_spec", lambda package: None)
    assert find_unsupported_fla(build_toy(name)) == []
    (fault,) = find_unsupported_fla(build_toy(name, **changes))
    assert expected in fault and "\n" not in fault


def test_layers_without_boundaries_are_refused():
    from fla.models import SambaConfig

    assert "samba" in find_unsupported_fla(SambaConfig(attn=None))[0]


@pytest.mark.parametrize(
    ("file", "millions"),
    [
        ("gla_340M", 340),
        ("gla_1B", 1000),
        ("gated_deltanet_340M", 340),
        ("gated_deltanet_1B", 1000),
    ],
)
def test_shapes_in_configs(file, millions):
    path = REPO / "configs" / "models" / f"{file}.json"
    config = load_model_config(str(path))
    saved = json.loads(path.read_text())
    assert {key: getattr(config, key) for key in saved} == saved
    model = build_modules(JobConfig(), config, "cuda")
    count = sum(parameter.numel() for parameter in model.lm.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.05)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def quick_kernels(monkeypatch) -> None:
    monkeypatch.setattr(toys.Autotuner, "_bench", lambda *args, **options: [0.0, 0.0, 0.0])


@pytest.mark.gpu
@every_family
@pytest.mark.parametrize("check", toys.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_passes(name, check, quick_kernels):
    checked(name, check.__name__.removeprefix("check_"), lambda: check(name, CUDA))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in TOYS if name not in toys.ROUNDING])
def test_the_check_at_startup_lets_it_pass(name, quick_kernels):
    """It is for families that have no test; here both must agree, but for one whose rounding it would take for a leak."""
    model = toys.build_model(name, CUDA)
    checked(name, "startup_check", lambda: check_no_leak(model, CUDA, with_future=True))


@pytest.mark.gpu
@every_family
def test_it_trains_and_its_export_gives_its_logits(name, workspace, tmp_path, quick_kernels):
    config = build_toy(name, vocab_size=264)
    config.save_pretrained(tmp_path / "model")

    def train() -> None:
        changes = {"training__steps": 20, "checkpoint__interval": 20, "checkpoint__export_hf": True, "optimizer__lr": 3e-3}
        rows = run_here(workspace, tmp_path / "run", model__config=tmp_path / "model", **changes)
        assert rows[-1]["ce_loss"] < 0.9 * rows[0]["ce_loss"] and rows[-1]["aux_loss"] > 0

    checked(name, "20_steps", train)
    checked(name, "export", lambda: check_export(tmp_path / "run", config))


@torch.no_grad()
def check_export(run: Path, config: PretrainedConfig) -> None:
    """from_pretrained gives, to the bit, the logits of the plain constructor with the checkpoint's weights."""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {key.removeprefix("lm."): value for key, value in final_weights(run).items() if key.startswith("lm.")}
    missing, strange = plain.load_state_dict(weights, strict=False)
    assert not strange and set(missing) <= set(plain._tied_weights_keys)
    exported = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32)
    tokens = torch.arange(80, device=CUDA)[None] % 61
    found, expected = (model.to(CUDA, torch.bfloat16)(input_ids=tokens, use_cache=False).logits for model in (exported, plain))
    assert torch.equal(found, expected)
