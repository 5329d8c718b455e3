"""Optimizers: what each parameter is trained by, the updates against plain loops, moments in bfloat16, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, Qwen3MoeConfig

from flame.config.schema import Experimental, JobConfig
from flame.models.wrapper import TrainingModel
from flame.objectives.base import ParameterGroup
from flame.objectives.future.options import PredictorOptions
from flame.objectives.step import get_objective
from flame.optimizers.build import Group, build_optimizer, build_schedule, read_rates, seek_schedule
from flame.optimizers.muon import MOMENTUM, Muon, orthogonalize, select_matrices
from flame.optimizers.random_rounding import round_into
from flame.optimizers.rounded_adamw import RoundedAdamW
from flame.trainer.setup import build_modules, build_run_optimizer, build_run_schedule
from tests.support import fla_families
from tests.support.models import build_unsharded, future_config, tiny_llama

SHAPES = [(32, 16), (7, 20), (5, 5), (2, 9), (20, 7), (4, 8, 6)]


def list_groups(config: JobConfig, model: TrainingModel) -> dict[str, tuple[str, float, float]]:
    """Optimizer, learning rate and weight decay of each parameter."""
    return {
        name: (type(optimizer).__name__, group["lr"], group["weight_decay"])
        for optimizer in build_run_optimizer(config, model)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


@pytest.mark.parametrize(("name", "state_dtype"), [("AdamW", "float32"), ("AdamW", "bfloat16"), ("Muon", "float32")])
def test_only_matrices_decay(name, state_dtype):
    config = future_config(PredictorOptions(lr_scale=0.5, weight_decay=0.01), learnable_temperature=True)
    config.optimizer.name, config.optimizer.state_dtype = name, state_dtype
    model = build_unsharded(config, tiny_llama(attention_bias=True, tie_word_embeddings=False))
    groups = list_groups(config, model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    base, adamw = config.optimizer, "AdamW" if state_dtype == "float32" else "RoundedAdamW"
    expected = {
        "lm.model.layers.0.self_attn.q_proj.weight": ("Muon" if name == "Muon" else adamw, base.lr, base.weight_decay),
        "lm.lm_head.weight": (adamw, base.lr, base.weight_decay),
        "lm.model.layers.0.self_attn.q_proj.bias": (adamw, base.lr, 0.0),
        "lm.model.layers.1.input_layernorm.weight": (adamw, base.lr, 0.0),
        "lm.model.norm.weight": (adamw, base.lr, 0.0),
        "lm.model.embed_tokens.weight": (adamw, base.lr, 0.0),
        "objective.predictor.out.weight": (adamw, base.lr * 0.5, 0.01),
        "objective.predictor.norm.weight": (adamw, base.lr * 0.5, 0.0),
        "objective.estimator.log_temperature": (adamw, base.lr * 0.5, 0.0),
    }
    assert {name: groups[name] for name in expected} == expected


def test_biases_of_all_experts_in_one_tensor_do_not_decay():
    """As in gpt-oss."""
    layer = nn.Module()
    layer.weight, layer.gate_up_proj_bias = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    config = JobConfig()
    optimizer = build_optimizer(config.optimizer, config.training, layer, nn.ModuleList([layer]), [Group("", 1.0, 0.5)])
    decay = {name: group["weight_decay"] for each in optimizer for group in each.param_groups for name in group["param_names"]}
    assert decay == {"weight": 0.5, "gate_up_proj_bias": 0.0}


def test_a_frozen_model_is_not_in_the_optimizer():
    config = future_config()
    config.experimental = Experimental(freeze_lm_for_infonce=True)
    model = build_unsharded(config)
    groups = list_groups(config, model)
    assert groups.keys() == {name for name, _ in model.named_parameters() if not name.startswith("lm.")}
    config.optimizer.name = "Muon"  # has no effect
    assert list_groups(config, model) == groups


def test_muon_takes_what_multiplies():
    """Whatever the family calls it: not norms, biases, embeddings or the head, but each expert's matrix."""
    gpt2 = GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50)
    experts = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=50,
    )
    expected: list[tuple[PretrainedConfig, set[str]]] = [
        (gpt2, {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}),
        (
            experts,
            {f"self_attn.{name}_proj.weight" for name in "qkvo"}
            | {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        ),
    ]
    for config, names in expected:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        chosen = {id(parameter) for parameter in select_matrices(layers)}
        assert {name.removeprefix("0.") for name, parameter in layers.named_parameters() if id(parameter) in chosen} == names
    convolution = nn.ModuleList([nn.Conv1d(6, 6, 4), nn.Conv1d(6, 6, 4, groups=6), nn.Embedding(5, 6), nn.LayerNorm(6)])
    assert not select_matrices(convolution)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_allocating_the_optimizer_state_is_not_a_step(name, state_dtype):
    config = future_config()
    config.optimizer.name, config.optimizer.state_dtype = name, state_dtype
    model = build_unsharded(config)
    before = [p.clone() for p in model.parameters()]
    optimizer = build_run_optimizer(config, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    states = [state for inner in optimizer for state in inner.state.values()]
    assert len(states) == len(before)
    for state in states:
        assert state.keys() in ({"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum_buffer"})
        assert state["step"] == 0
        moments = [value for key, value in state.items() if key != "step"]
        assert all(moment.dtype == getattr(torch, state_dtype) and not moment.any() for moment in moments)


def test_bfloat16_moments_take_half_the_memory():
    sizes = {}
    for state_dtype in ("float32", "bfloat16"):
        config = future_config()
        config.optimizer.state_dtype = state_dtype
        states = [state for inner in build_run_optimizer(config, build_unsharded(config)) for state in inner.state.values()]
        sizes[state_dtype] = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert sizes["float32"] == 2 * sizes["bfloat16"]


@given(st.integers(0, 30))
def test_seeking_the_schedule_equals_stepping_it(step):
    config = future_config()
    config.training.steps, config.lr_scheduler.warmup_steps, config.optimizer.name = 30, 5, "Muon"
    model = build_unsharded(config)
    rates = []
    for seek in (False, True):
        optimizer = build_run_optimizer(config, model)
        schedule = build_schedule(config.lr_scheduler, config.training.steps, optimizer)
        if seek:
            seek_schedule(schedule, step)
        else:
            optimizer.step()
            for _ in range(step):
                schedule.step()
        rates.append([group["lr"] for inner in optimizer for group in inner.param_groups])
    assert rates[0] == rates[1]


@pytest.mark.parametrize("start_step", [0, 1, 4])
def test_the_predictor_may_warm_up_by_itself(start_step):
    """From the first step with a future loss on, on top of the run's own warm-up; stepped and sought alike."""
    config = future_config(PredictorOptions(lr_scale=0.5, warmup_steps=5))
    config.training.steps, config.lr_scheduler.warmup_steps, config.objective.start_step = 20, 3, start_step
    model = build_unsharded(config)
    optimizer = build_run_optimizer(config, model)
    schedule = build_run_schedule(config, model, optimizer)
    plain = build_run_optimizer(config, model)
    plain_schedule = build_schedule(config.lr_scheduler, 20, plain)
    for step in range(1, 21):
        found, expected = read_rates(optimizer), read_rates(plain)
        share = min(max(step - max(start_step, 1) + 1, 0) / 5, 1.0)
        assert found["lr"] == expected["lr"]
        assert found["lr/predictor"] == pytest.approx(expected["lr/predictor"] * share)
        assert expected["lr/predictor"] == pytest.approx(expected["lr"] * 0.5)
        seek_schedule(schedule, step - 1)
        assert read_rates(optimizer) == found
        for each in (optimizer, plain, schedule, plain_schedule):
            each.step()


def test_the_first_group_that_fits_decides_the_warm_up():
    """Warm-ups never multiply, and a group without one keeps a later one away."""
    groups = [ParameterGroup("predictor.out."), ParameterGroup("predictor.", warmup_steps=4), ParameterGroup("", warmup_steps=8)]
    config = future_config(learnable_temperature=True)
    config.training.steps, config.lr_scheduler.warmup_steps = 20, 0
    model = build_unsharded(config)
    objective = get_objective(model)
    assert objective is not None
    objective.list_parameter_groups = lambda: groups
    optimizer = build_run_optimizer(config, model)
    build_run_schedule(config, model, optimizer)
    rates = {name: group["lr"] for each in optimizer for group in each.param_groups for name in group["param_names"]}
    full = rates["lm.lm_head.weight"] if "lm.lm_head.weight" in rates else rates["lm.model.norm.weight"]
    assert rates["objective.predictor.out.weight"] == full
    assert rates["objective.predictor.norm.weight"] == pytest.approx(full / 4)
    assert rates["objective.estimator.log_temperature"] == pytest.approx(full / 8)


# ---------------------------------------------------------------- rounding at random


@given(st.floats(-(2.0**90), 2.0**90, width=32).filter(lambda value: value == 0 or abs(value) > 2.0**-90))
def test_rounding_keeps_the_mean(value):
    draws = 4096
    values = torch.full((draws,), value)
    rounded = torch.empty(draws, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    round_into(rounded, values.clone(), 1, "key")
    assert torch.equal(torch.get_rng_state(), before)
    found = rounded.double()
    step = math.ldexp(1.0, math.frexp(value)[1] - 8)  # between neighbours: bfloat16 has 8 bits
    assert len(found.unique()) <= 2 and (found - value).abs().max() < step
    assert abs(found.mean().item() - value) <= 5 * step * 0.5 / math.sqrt(draws)
    if value == torch.tensor(value).bfloat16().item():
        assert (found == value).all()


def test_rounding_depends_on_its_key_alone():
    values = torch.randn(1000)

    def rounded(*key: int | str) -> Tensor:
        target = torch.empty(1000, dtype=torch.bfloat16)
        round_into(target, values.clone(), *key)
        return target

    assert torch.equal(rounded(1, "a"), rounded(1, "a"))
    assert not torch.equal(rounded(1, "a"), rounded(2, "a")) and not torch.equal(rounded(1, "a"), rounded(1, "b"))


# ---------------------------------------------------------------- AdamW


def draw_gradient(shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step * 1000 + sum(shape))
    return torch.randn(shape, generator=generator) * 0.1 + 0.02


def test_rounded_adamw_is_adamw():
    """Against a float64 loop: off by what the rounding of the moments leaves, and much nearer than a wrong rule would be."""
    lr, beta1, beta2, eps, decay = 1e-2, 0.9, 0.999, 1e-8, 0.1
    start = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(start.clone())
    settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    optimizer = RoundedAdamW([{"params": [parameter], "param_names": ["w"], **settings}], seed=1)
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step in range(1, 61):
        gradient = draw_gradient((64, 50), step)
        parameter.grad = gradient
        optimizer.step()
        g = gradient.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - lr * decay * w - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    moved, error = (w - start).norm(), (parameter.double() - w).norm()
    assert error < 5e-3 * moved
    assert optimizer.state[parameter]["step"] == 60
    found = optimizer.state[parameter]["exp_avg_sq"].double()
    assert found.mean().item() == pytest.approx(v.mean().item(), rel=2e-3)


def test_small_changes_of_a_moment_are_kept():
    """With beta2 = 0.999 and rounding to nearest the second moment of a constant gradient would stop at a third."""
    parameter = nn.Parameter(torch.zeros(2048))
    settings = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = RoundedAdamW([{"params": [parameter], "param_names": ["w"], **settings}], seed=1)
    for _ in range(1000):
        parameter.grad = torch.ones(2048)
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].double().mean().item() == pytest.approx(1 - 0.999**1000, rel=5e-3)


def test_a_step_repeats_from_a_saved_state():
    def build() -> tuple[nn.Parameter, RoundedAdamW]:
        parameter = nn.Parameter(torch.ones(500))
        settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        return parameter, RoundedAdamW([{"params": [parameter], "param_names": ["w"], **settings}], seed=1)

    (first, optimizer), (second, resumed) = build(), build()
    for step in range(1, 5):
        first.grad = draw_gradient((500,), step)
        optimizer.step()
        if step == 2:
            resumed.state[second] = {name: value.clone() for name, value in optimizer.state[first].items()}
            second.data.copy_(first.data)
        elif step > 2:
            second.grad = first.grad
            torch.randn(3)  # what else is drawn does not matter
            resumed.step()
    assert torch.equal(first, second)
    assert torch.equal(optimizer.state[first]["exp_avg_sq"], resumed.state[second]["exp_avg_sq"])


# ---------------------------------------------------------------- Muon


def orthogonalize_plainly(matrix: Tensor) -> Tensor:
    """The published iteration on one matrix, [n, m], in float64."""
    x = matrix.double()
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / max(float(x.square().sum().sqrt()), 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if transposed else x


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_orthogonalizing(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = orthogonalize(matrix.float()).double()
    torch.testing.assert_close(found, orthogonalize_plainly(matrix), rtol=1e-3, atol=1e-4)
    stacked = orthogonalize(torch.stack([matrix, -matrix, torch.zeros_like(matrix)]).float())
    torch.testing.assert_close(stacked.double(), torch.stack([found, -found, torch.zeros_like(found)]), rtol=1e-3, atol=1e-4)


def test_singular_values_become_about_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(40, 60, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3


def train_with_muon(
    parameters: list[nn.Parameter], to_gradient: Callable[[Tensor], Tensor], dtype: torch.dtype, steps: int
) -> None:
    names = [f"w{i}" for i in range(len(parameters))]
    optimizer = Muon([{"params": parameters, "param_names": names, "lr": 0.02, "weight_decay": 0.1}], state_dtype=dtype, seed=1)
    for step in range(1, steps + 1):
        for parameter in parameters:
            parameter.grad = to_gradient(draw_gradient(tuple(parameter.shape), step))
        optimizer.step()


def start_weights() -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_muon_is_the_published_algorithm(dtype, tolerance):
    parameters = [nn.Parameter(weight) for weight in start_weights()]
    train_with_muon(parameters, lambda gradient: gradient, dtype, steps=5)
    for start, parameter in zip(start_weights(), parameters, strict=True):
        stack = start.reshape(-1, *start.shape[-2:]).double()
        for index, weight in enumerate(stack):
            buffer = torch.zeros_like(weight)
            for step in range(1, 6):
                gradient = draw_gradient(tuple(start.shape), step).reshape(stack.shape)[index].double()
                buffer = MOMENTUM * buffer + gradient
                direction = orthogonalize_plainly(gradient + MOMENTUM * buffer)
                weight = weight - 0.02 * (0.1 * weight + 0.2 * math.sqrt(max(weight.shape)) * direction)
            found = parameter.reshape(stack.shape)[index].double()
            assert (found - weight).norm() < tolerance * (stack[index] - weight).norm(), (start.shape, index)


def run_rank(rank: int, mesh_shape: tuple[int, ...], dtype: torch.dtype, store: Path, result: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=math.prod(mesh_shape))
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    parameters = [nn.Parameter(distribute_tensor(weight, mesh, placements, src_data_rank=None)) for weight in start_weights()]
    train_with_muon(parameters, lambda g: distribute_tensor(g, mesh, placements, src_data_rank=None), dtype, steps=3)
    whole = [parameter.full_tensor().detach() for parameter in parameters]
    others: list[list[Tensor]] = [[]] * dist.get_world_size()
    dist.all_gather_object(others, whole)
    assert all(torch.equal(a, b) for other in others for a, b in zip(whole, other, strict=True))
    if rank == 0:
        torch.save(whole, result)
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)], ids=["2 ranks", "3 ranks", "2 x 2 ranks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_muon_is_the_same_on_any_number_of_ranks(tmp_path, mesh_shape, dtype):
    """Shards of unequal length and ranks without any; to the bit, but for the draws of a bfloat16 momentum."""
    arguments = (mesh_shape, dtype, tmp_path / "store", tmp_path / "result")
    mp.start_processes(run_rank, arguments, nprocs=math.prod(mesh_shape), start_method="fork")
    alone = [nn.Parameter(weight) for weight in start_weights()]
    train_with_muon(alone, lambda gradient: gradient, dtype, steps=3)
    for found, expected, start in zip(torch.load(arguments[-1]), alone, start_weights(), strict=True):
        if dtype == torch.float32:
            assert torch.equal(found, expected)
        else:
            assert (found - expected).norm() < 1e-2 * (expected - start).norm()


@pytest.mark.parametrize(
    ("family", "vectors"),
    [("rwkv7", {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "r_k"}), ("hgrn2", {"lower_bounds"}), ("mamba2", set())],
)
def test_only_weight_matrices_decay(family, vectors):
    """Of the recurrent families, too: their other parameters are mixing vectors, bounds, rates, biases and norms."""
    config = future_config()
    model = build_modules(config, fla_families.build_toy(family), "cuda")  # on the meta device: nothing runs
    decays = {name: decay for name, (_, _, decay) in list_groups(config, model).items()}
    of_model = {name: decay for name, decay in decays.items() if name.startswith("lm.")}
    assert {decay for name, decay in of_model.items() if name.rpartition(".")[2] in vectors} <= {0.0}
    maps = {name for name in of_model if name.endswith(("proj.weight", "conv1d.weight", "lm_head.weight"))}
    assert len(maps) > 4 and {of_model[name] for name in maps} == {config.optimizer.weight_decay}
    assert {name.rpartition(".")[2] for name, decay in of_model.items() if decay} == {"weight"}
