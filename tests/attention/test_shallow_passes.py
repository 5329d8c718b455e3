"""The anti-causal pass of the first layers alone: it is the whole pass of a model that has no others."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from flame.attention.backends import Attention, choose_attention
from flame.models.causal_lm import find_decoder_layers
from flame.models.first_layers import keep_first_layers, run_first_layers
from flame.models.flops import ModelFlops, measure_lengths
from flame.models.wrapper import TrainingModel
from flame.objectives.future.options import FutureOptions
from flame.objectives.future.summaries import find_horizon
from flame.objectives.future.teacher import move_average
from flame.trainer import setup
from tests.support.families import TOYS, build_toy, list_paths
from tests.support.models import build_unsharded, future_config, get_own, random_batch, tiny_llama
from tests.support.runs import run_here

CU = torch.tensor([0, 1, 25, 26, 50, 60], dtype=torch.int32)
LISTS_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
every_path = pytest.mark.parametrize(("name", "attention"), [(name, path) for name in TOYS for path in list_paths(name)])


def shorten(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of a model that ends after some layers."""
    values = config.to_dict() | {"num_hidden_layers": layers}
    values |= {key: values[key][:layers] for key in LISTS_BY_LAYER if values.get(key)}
    return type(config)(**values)


def build(config: PretrainedConfig, attention: Attention | None, **changes: object) -> TrainingModel:
    def choose(*args) -> Attention:
        return choose_attention(*args) if attention is None else attention

    with patch.object(setup, "choose_attention", choose):
        return build_unsharded(future_config(**changes), copy.deepcopy(config)).eval()


@every_path
@torch.no_grad()
def test_it_is_the_pass_of_a_shorter_model(name, attention):
    whole, short = build(build_toy(name), attention), build(shorten(build_toy(name), 1), attention)
    reference = AutoModelForCausalLM.from_config(build_toy(name), dtype=torch.float32)
    weights = reference.state_dict()
    whole.lm.load_state_dict(weights)
    missing = short.lm.load_state_dict(weights, strict=False).missing_keys
    assert not missing
    batch = random_batch(CU)
    flops, lengths = [ModelFlops(model.lm) for model in (whole, short)], measure_lengths(batch)
    for window_k in (0, 3):
        expected = short.encode_future(batch, window_k)
        torch.testing.assert_close(whole.encode_future(batch, window_k, layers=1), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(whole.encode_future(batch, window_k), expected, rtol=1e-2)
        counted = flops[0].count_future_forward(lengths, window_k, 1), flops[1].count_future_forward(lengths, window_k)
        assert counted[0] == pytest.approx(counted[1])
        horizons = [
            find_horizon(FutureOptions(future_k=window_k, layers=layers), config)
            for layers, config in ((1, whole.lm.config), (0, short.lm.config))
        ]
        assert horizons[0] == horizons[1]


@torch.no_grad()
def test_the_list_of_layers_is_whole_again_after_a_failure():
    model = build_unsharded(future_config())
    layers = find_decoder_layers(model.lm)
    with pytest.raises(ZeroDivisionError), run_first_layers(model.lm, 1):
        assert len(model.lm.model.layers) == 1 and model.lm.model.layers[0] is layers[0]
        raise ZeroDivisionError
    assert model.lm.model.layers is layers and find_decoder_layers(model.lm) is layers


@pytest.mark.parametrize("target", ["random", "ema"])
def test_a_teacher_has_no_further_layers(target):
    """Its pass is that of a whole network with the same first layers."""
    model = build_unsharded(future_config(target=target, layers=1), tiny_llama(num_hidden_layers=3))
    objective = get_own(model)
    assert len(find_decoder_layers(objective.teacher)) == 1 and len(find_decoder_layers(model.lm)) == 3
    assert model.lm.config.num_hidden_layers == 3
    objective.start_new_run(model)
    batch = random_batch(CU)
    if target == "ema":
        torch.testing.assert_close(objective.summarize(model, batch), model.encode_future(batch, layers=1).detach())
    with torch.no_grad():
        model.lm.model.layers[0].mlp.down_proj.weight.add_(1.0)
        model.lm.model.layers[2].mlp.down_proj.weight.add_(1.0)
    before = objective.teacher.model.layers[0].mlp.down_proj.weight.clone()
    objective.options.ema_decay = 0.75
    objective.after_step(model)
    moved = objective.teacher.model.layers[0].mlp.down_proj.weight - before
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25 if target == "ema" else 0.0))


def test_a_running_average_copies_what_has_no_mean():
    model = build_unsharded(future_config(target="ema"))
    teacher = get_own(model).teacher
    for network, count in ((model.lm, 7), (teacher, 2)):
        network.model.register_buffer("count", torch.tensor(count))
    move_average(teacher, model.lm, 0.5)
    assert teacher.model.count.item() == 7


def test_too_many_layers_are_told(workspace, tmp_path, capsys):
    for layers in (2, 5):
        with pytest.raises(SystemExit) as stop:
            run_here(workspace, tmp_path / "run", future_encoder__layers=layers)
        line = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "\n" not in line
        assert line.startswith(f"future_encoder.layers = {layers} is no less than the model's num_hidden_layers = 2: set it to 0")


def test_keeping_all_changes_nothing():
    model = build_unsharded(future_config())
    keep_first_layers(model.lm, 0)
    assert len(find_decoder_layers(model.lm)) == 2
