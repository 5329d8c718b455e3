"""Options for large models: CPU offload, 8-bit training products, small or other optimizers, and what is declined by name."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.float8.float8_linear import Float8Linear
from transformers import AutoConfig

from flame.checkpoints.manager import list_checkpoints
from flame.checkpoints.resume import check_resumable, list_used_sections
from flame.checkpoints.storage import TensorReader
from flame.config.run import NEXT_TOKEN
from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.kernels import float8_training
from flame.kernels.float8_training import check_float8, convert_to_float8
from flame.models import parallelize
from flame.objectives.future import objective as future
from flame.train import main
from flame.trainer import setup
from flame.trainer.options import read_options
from flame.trainer.setup import build_modules
from tests.support.models import build_unsharded, future_config, tiny_llama
from tests.support.runs import cut_power_after, final_weights, fork_ranks, measured, options, read_metrics, run_here, run_ranks

OPTIMIZERS = [("AdamW", "bfloat16"), ("Muon", "float32"), ("Muon", "bfloat16")]


@pytest.fixture
def float8_on_cpu(monkeypatch) -> None:
    """The same roundings, with the products of the rounded factors taken in float32."""
    monkeypatch.setattr(float8_training, "check_float8", lambda recipe, device_type: None)
    load = float8_training.load_recipe
    monkeypatch.setattr(float8_training, "load_recipe", lambda recipe: dataclasses.replace(load(recipe), emulate=True))
    monkeypatch.setattr(parallelize, "check_float8_head", lambda device_type: None)
    monkeypatch.setattr(setup, "find_float8_head_conflicts", lambda *sizes: [])


# ---------------------------------------------------------------- declined


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("training.tensor_parallel_degree", "tensor parallel training is not supported, since the layers of any architecture"),
        (
            "training.context_parallel_degree",
            "context parallel training is not supported, since the anti-causal pass needs whole",
        ),
        (
            "training.pipeline_parallel_degree",
            "pipeline parallel training is not supported, since the causal and the anti-causal",
        ),
        ("parallelism.tensor_parallel_degree", "tensor parallel training is not supported"),
        ("parallelism.context_parallel_degree", "context parallel training is not supported"),
        ("parallelism.pipeline_parallel_degree", "pipeline parallel training is not supported"),
        ("parallelism.pipeline_parallel_schedule", "pipeline parallel training is not supported"),
        ("parallelism.expert_parallel_degree", "expert parallel training is not supported"),
        ("experimental.context_parallel_degree", "context parallel training is not supported"),
        ("experimental.pipeline_parallel_degree", "pipeline parallel training is not supported"),
        ("experimental.enable_async_tensor_parallel", "tensor parallel training is not supported"),
    ],
)
@pytest.mark.parametrize("value", ["1", "2"])
def test_other_parallelism_is_declined_by_name(workspace, tmp_path, capsys, key, reason, value):
    section, _, option = key.partition(".")
    (tmp_path / "run.toml").write_text(f"[{section}]\n{option} = {value}\n")
    for given in ([f"--{key}", value], [f"--{key}={value}"], ["--job.config_file", str(tmp_path / "run.toml")]):
        with pytest.raises(SystemExit) as stop:
            main([*options(workspace, tmp_path / "run"), *given])
        assert stop.value.code == 2
        line = capsys.readouterr().err.strip()
        assert "\n" not in line and f"{key} = {value} (" in line and reason in line and "leave it out, even at 1" in line
    assert not (tmp_path / "run").exists()


def test_data_parallelism_of_another_section_is_found():
    with pytest.raises(UserError) as refusal:
        read_options(["--parallelism.data_parallel_shard_degree", "2"], 2)
    assert any("did you mean training.data_parallel_shard_degree?" in line for line in refusal.value.lines)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"future_encoder__precision": "fp8"}, 'future_encoder.precision = "fp8" beside training.float8 = "rowwise"'),
        ({"training__mixed_precision_param": "float32"}, 'training.mixed_precision_param = "float32"'),
        ({"training__seq_len": 72}, "training.seq_len = 72 is not a multiple of 16"),
        ({"training__float8": True}, 'allowed is "none" or "rowwise" or "rowwise_with_gw_hp"'),
        (
            {"training__float8": "none", "training__float8_head": True, "training__mixed_precision_param": "float32"},
            'training.float8_head = true beside training.mixed_precision_param = "float32": set the one to false',
        ),
    ],
)
def test_combinations_that_cannot_be(workspace, tmp_path, changes, expected):
    with pytest.raises(UserError) as refusal:
        read_options(options(workspace, tmp_path / "run", **({"training__float8": "rowwise"} | changes)), 1)
    assert len(refusal.value.lines) == 1 and expected in refusal.value.lines[0]


# ---------------------------------------------------------------- optimizers in whole runs


@pytest.mark.parametrize(("name", "state_dtype"), OPTIMIZERS)
def test_an_interrupted_run_equals_the_uninterrupted_one(workspace, tmp_path, name, state_dtype):
    changes = {"optimizer__name": name, "optimizer__state_dtype": state_dtype}
    expected = run_here(workspace, tmp_path / "whole", **changes)
    assert expected[-1]["ce_loss"] < expected[0]["ce_loss"]
    argv = options(workspace, tmp_path / "run", **changes)
    cut_power_after(5, argv)
    main(argv)
    assert measured(read_metrics(tmp_path / "run")) == measured(expected)
    weights = final_weights(tmp_path / "whole")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in final_weights(tmp_path / "run").items())


def test_a_run_keeps_its_optimizer():
    saved, now = JobConfig().to_dict(), JobConfig()
    now.optimizer.name, now.optimizer.state_dtype = "Muon", "bfloat16"
    with pytest.raises(UserError) as refusal:
        check_resumable(saved, NEXT_TOKEN, now, NEXT_TOKEN, list_used_sections(now))
    found = [line.split(",")[0] for line in refusal.value.lines]
    assert found == [
        'optimizer.name = "Muon"',
        'optimizer.state_dtype = "bfloat16"',
    ]


def test_a_checkpoint_holds_bfloat16_moments(workspace, tmp_path):
    run = tmp_path / "run"
    run_here(workspace, run, optimizer__state_dtype="bfloat16", training__steps=1)
    entries = TensorReader(list_checkpoints(run / "checkpoint")[-1]).read_metadata().state_dict_metadata
    moments = {entry.properties.dtype for name, entry in entries.items() if ".exp_avg" in name}
    weights = {entry.properties.dtype for name, entry in entries.items() if name.startswith("model.")}
    assert (moments, weights) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.slow
def test_ranks_are_interchangeable(workspace, tmp_path):
    changes = {"optimizer__name": "Muon", "optimizer__state_dtype": "bfloat16"}
    alone = run_here(workspace, tmp_path / "alone", **changes)
    both = fork_ranks(2, workspace, tmp_path / "both", training__gradient_accumulation_steps=1, **changes)
    for found, expected in zip(measured(both), measured(alone), strict=True):  # each shard draws its own roundings
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3), (found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "Muon", "optimizer__state_dtype": "bfloat16"},
        {"training__float8": "rowwise"},
        {"training__float8": "rowwise_with_gw_hp", "training__float8_head": True},
        {"training__cpu_offload": True},
        {"objective__name": "mtp"},
        {"objective__name": "nitp"},
    ],
    ids=[
        "Muon with bfloat16 state",
        "float8",
        "float8, and of the head",
        "cpu_offload",
        "layers of another objective",
        "a layer is read",
    ],
)
def test_activation_checkpointing_and_accumulation_change_nothing(workspace, tmp_path, float8_on_cpu, changes):
    changes = changes | {"training__steps": 3, "checkpoint__enable_checkpoint": False}
    expected = run_here(workspace, tmp_path / "none", **changes)
    assert expected[-1]["ce_loss"] < expected[0]["ce_loss"]
    for mode in ("full", "selective", "pointwise"):
        recomputed = {"activation_checkpoint__mode": mode, "training__compile": True}
        with torch.compiler.set_stance("force_eager"):
            rows = run_here(workspace, tmp_path / mode, **recomputed, **changes)
        for found, row in zip(rows, expected, strict=True):
            assert found["loss"] == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.parametrize("target", ["self", "random"])
def test_groups_change_nothing(workspace, tmp_path, monkeypatch, target):
    """A small model on one device is one FSDP group, a large one has one for each layer."""
    counts, numbers, weights = [], [], []
    changes = {"future_encoder__target": target, "training__steps": 3}
    for most in (parallelize.MOST_WEIGHTS_IN_ONE_GROUP, 0):
        monkeypatch.setattr(parallelize, "MOST_WEIGHTS_IN_ONE_GROUP", most)
        run = tmp_path / str(most)
        with patch.object(parallelize, "fully_shard", wraps=parallelize.fully_shard) as shard:
            rows = run_here(workspace, run, **changes)
        counts.append(shard.call_count)
        numbers.append(measured(rows))
        weights.append(final_weights(run))
    layers = AutoConfig.from_pretrained(workspace / "model").num_hidden_layers
    assert counts == [1, 1 + layers * (1 + (target == "random"))]
    assert numbers[0] == numbers[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(("ranks", "expected"), [(1, 1), (2, 3)])
def test_on_several_devices_each_layer_is_a_group(leave_no_trace, ranks, expected):
    """Of a small model too: their communication overlaps with work."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    config = future_config()
    model = build_modules(config, tiny_llama(), "cpu")
    parallelize.parallelize(model, [], [], config.training, "none", init_device_mesh("cpu", (ranks,)))
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == expected


# ---------------------------------------------------------------- float8


def round_rows(x: Tensor, dim: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Each row to float8 with a power-of-two scale from its largest entry, and back, in float64."""
    largest = x.double().abs().amax(dim=dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / largest)))
    return (x.double() * scale).to(torch.float32).to(dtype).double() / scale


def multiply_rounded(recipe: str, x: Tensor, weight: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The three products of a linear layer without bias."""
    products = {"output": round_rows(x, 1) @ round_rows(weight, 1).T}
    if recipe == "rowwise":
        products["input"] = round_rows(upstream, 1) @ round_rows(weight, 0)
        products["weight"] = round_rows(upstream, 0).T @ round_rows(x, 0)
    else:
        products["input"] = round_rows(upstream, 1) @ round_rows(weight, None)
        products["weight"] = upstream.double().T @ x.double()
    return products


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_float8_is_its_definition(float8_on_cpu, recipe):
    """Output and both gradients are products of rounded factors."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 48, bias=True))])
    x = torch.randn(64, 32, generator=generator, requires_grad=True)
    upstream = torch.randn(64, 48, generator=generator)
    weight, bias = layers[0][0].weight, layers[0][0].bias
    convert_to_float8(layers, recipe, "cuda")
    assert isinstance(layers[0][0], Float8Linear) and layers[0][0].weight is weight
    output = layers[0](x)
    output.backward(upstream)
    expected = multiply_rounded(recipe, x.detach(), weight.detach(), upstream)
    expected["output"] = expected["output"] + bias.double()
    found = {"output": output, "input": x.grad, "weight": weight.grad}
    for name, value in expected.items():
        assert (found[name].double() - value).norm() < 1e-4 * value.norm(), name
    assert (output.double() - nn.functional.linear(x, weight, bias)).norm() > 1e-3 * output.norm()


def test_float8_leaves_names_and_weights_alone(float8_on_cpu, caplog):
    config = future_config()
    plain, model = build_unsharded(config), build_unsharded(config)
    convert_to_float8(model.lm.model.layers, "rowwise", "cuda")
    assert "training in float8, rowwise: 14 of the 14 matrices of the decoder layers" in caplog.text
    assert type(model.lm.lm_head) is nn.Linear and type(model.objective.predictor.out) is nn.Linear
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())
    some = nn.ModuleList([nn.Linear(32, 20), nn.Linear(32, 32)])
    convert_to_float8(some, "rowwise", "cuda")
    assert "1 of the 2 matrices" in caplog.text and type(some[0]) is nn.Linear and isinstance(some[1], Float8Linear)
    with pytest.raises(UserError, match=r'training\.float8 = "rowwise": the decoder layers have no linear layer'):
        convert_to_float8(nn.ModuleList([nn.Linear(24, 20)]), "rowwise", "cuda")


@pytest.mark.parametrize(("recipe", "leaks"), [("rowwise", False), ("rowwise_with_gw_hp", False), ("tensorwise", True)])
def test_rounding_lets_no_token_see_another(float8_on_cpu, recipe, leaks):
    """A later token, or one of another document, moves no bit: of outputs, and of the gradients of others' inputs. With
    torchao's "tensorwise", which is not offered, it does."""
    layers, generator = nn.ModuleList([nn.Sequential(nn.Linear(32, 48))]), torch.Generator().manual_seed(0)
    convert_to_float8(layers, recipe, "cuda")
    found = []
    x, upstream = torch.randn(64, 32, generator=generator), torch.randn(64, 48, generator=generator)
    for factor in (1.0, 100.0):
        x[-1] *= factor
        upstream[-1] *= factor
        states = x.clone().requires_grad_()
        output = layers[0](states)
        output.backward(upstream)
        found.append((output.detach()[:-1], states.grad[:-1]))
    assert [torch.equal(one, other) for one, other in zip(*found, strict=True)] == [not leaks] * 2


def test_validation_is_not_rounded(float8_on_cpu):
    layers, x = nn.ModuleList([nn.Sequential(nn.Linear(32, 48))]), torch.randn(64, 32)
    expected = layers[0](x)
    convert_to_float8(layers, "rowwise", "cuda")
    assert not torch.equal(layers[0](x), expected) and torch.equal(layers.eval()[0](x), expected)


def test_float8_exports_as_ever(workspace, tmp_path, float8_on_cpu):
    run_here(workspace, tmp_path / "plain", training__steps=1)
    run_here(workspace, tmp_path / "float8", training__steps=1, training__float8="rowwise_with_gw_hp")
    found, expected = (final_weights(tmp_path / name) for name in ("float8", "plain"))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == torch.float32 and found[name].shape == expected[name].shape for name in expected)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_network_is_rounded_beside_float8(workspace, tmp_path, float8_on_cpu, monkeypatch):
    """Each by its own switch: the trained network in all passes, the other one in the only pass that it has."""
    monkeypatch.setattr(future, "check_fp8", lambda device_type: None)
    kinds = {}
    real = parallelize._shard

    def shard(model, *rest):
        layers = {"trained": model.lm.model.layers, "second": model.objective.teacher.model.layers}
        kinds.update({name: type(stack[0].mlp.up_proj).__name__ for name, stack in layers.items()})
        real(model, *rest)

    monkeypatch.setattr(parallelize, "_shard", shard)
    changes = {"future_encoder__target": "random", "future_encoder__precision": "fp8", "training__float8": "rowwise"}
    rows = run_here(workspace, tmp_path / "run", training__steps=3, **changes)
    assert kinds == {"trained": "TrainedInFloat8", "second": "_Fp8Linear"}
    assert rows[-1]["ce_loss"] < rows[0]["ce_loss"]


def test_the_output_head_trains_in_float8_and_is_validated_without(workspace, tmp_path, float8_on_cpu):
    """The rounded loss is close, and not the exact one; validation at the same weights is the exact one."""
    changes = {"training__steps": 1, "validation__interval": 1, "validation__holdout_every": 3}
    found, expected = (
        dict(ChainMap(*run_here(workspace, tmp_path / str(on), training__float8_head=on, optimizer__lr=1e-12, **changes)))
        for on in (True, False)
    )
    assert found["ce_loss"] != expected["ce_loss"] and found["ce_loss"] == pytest.approx(expected["ce_loss"], rel=1e-2)
    assert found["validation_ce_loss"] == pytest.approx(expected["validation_ce_loss"], rel=1e-6)


def test_a_device_without_float8_is_refused():
    with pytest.raises(UserError, match=r'training\.float8 = "rowwise" needs a GPU of compute capability 8\.9'):
        check_float8("rowwise", "cpu")


# ---------------------------------------------------------------- on GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_offloading_changes_no_loss(workspace, tmp_path, name, state_dtype):
    changes = {"optimizer__name": name, "optimizer__state_dtype": state_dtype}
    expected = run_ranks(1, workspace, tmp_path / "plain", **changes)
    found = run_ranks(1, workspace, tmp_path / "offloaded", training__cpu_offload=True, **changes)
    for row, other in zip(measured(found), measured(expected), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-2), (row, other)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2), (row, other)


@pytest.mark.multi_gpu
def test_offloading_and_muon_on_two_gpus(workspace, tmp_path):
    changes = {"optimizer__name": "Muon"}
    expected = run_ranks(1, workspace, tmp_path / "alone", training__gradient_accumulation_steps=4, **changes)
    for offload in (False, True):
        halves = {"training__gradient_accumulation_steps": 2, "training__cpu_offload": offload}
        found = run_ranks(2, workspace, tmp_path / f"two-{offload}", **halves, **changes)
        for row, other in zip(measured(found), measured(expected), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-2), (row, other)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("option", "compiled"),
    [
        ({"training__float8": "rowwise"}, False),
        ({"training__float8": "rowwise"}, True),
        ({"training__float8": "rowwise_with_gw_hp"}, True),
        ({"training__float8_head": True}, True),
    ],
    ids=str,
)
def test_it_trains_in_float8(workspace, tmp_path, option, compiled):
    tiny_llama(vocab_size=272).save_pretrained(tmp_path / "model")  # a multiple of 16, for the head
    changes = {"training__steps": 12, "training__compile": compiled, "model__config": tmp_path / "model"}
    expected = run_ranks(1, workspace, tmp_path / "plain", **changes)
    found = run_ranks(1, workspace, tmp_path / "float8", **option, **changes)
    assert measured(found) != measured(expected)
    assert found[-1]["ce_loss"] < found[0]["ce_loss"]
    for row, other in zip(found, expected, strict=True):
        assert row["ce_loss"] == pytest.approx(other["ce_loss"], rel=5e-2)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("float8", ["rowwise", "rowwise_with_gw_hp"])
def test_float8_on_two_gpus(workspace, tmp_path, float8):
    """Weights are gathered before they are rounded, so ranks share their scales."""
    tiny_llama(vocab_size=272).save_pretrained(tmp_path / "model")  # a multiple of 16
    changes = {"training__float8": float8, "training__float8_head": True, "model__config": tmp_path / "model"}
    expected = run_ranks(1, workspace, tmp_path / "alone", training__gradient_accumulation_steps=4, **changes)
    found = run_ranks(2, workspace, tmp_path / "two", **changes)
    for row, other in zip(measured(found), measured(expected), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-2), (row, other)
