"""Families that no table vouches for: each gives transformers' own loss, or is rejected in one line when a run starts."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame.errors import UserError
from flame.models.causal_lm import load_model_config
from flame.models.head_check import check_head, find_head_error
from flame.models.leak_check import check_no_leak, needs_leak_check
from flame.models.output_head import DIVISOR, FACTOR, OutputHead, find_logit_rule, read_head
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from tests.support.families import OTHERS, build_other
from tests.support.models import CPU, build_unsharded, future_config, random_batch, tiny_llama


def build_wide(config: PretrainedConfig) -> TrainingModel:
    """Nothing is zero or one, and logits are of the order of one: a factor, a cap or a bias left out would show."""
    model = build_unsharded(future_config(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


RECENT = ("codegen", "gptj")
"""Families whose attention takes a mask in recent releases of transformers alone."""


@pytest.mark.parametrize("family", OTHERS)
def test_it_passes_the_checks_of_the_start_and_has_the_loss_of_transformers(family, tmp_path):
    build_other(family).save_pretrained(tmp_path)
    config = load_model_config(str(tmp_path))
    assert needs_leak_check(config)
    if family in RECENT and not AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa:
        with pytest.raises(UserError, match="does not support an attention implementation through torch"):
            build_wide(config)
        return
    model = build_wide(config)
    check_head(model, CPU)
    check_no_leak(model, CPU, with_future=True)
    own = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager").eval()
    own.load_state_dict(model.lm.state_dict())
    batch = random_batch(torch.tensor([0, 40], dtype=torch.int32))
    with torch.no_grad():
        losses = model(compute_losses, batch, Requested(aux=False))
        expected = own(input_ids=batch.input_ids, labels=batch.input_ids).loss
    assert losses.ce_sum is not None
    torch.testing.assert_close(losses.ce_sum / batch.num_labels, expected, rtol=1e-5, atol=0)


def test_each_key_that_changes_logits_is_one_that_transformers_has():
    for family in ("granite", "minicpm3", "hyperclovax"):
        assert hasattr(AutoConfig.for_model(family), DIVISOR)
    for family in ("cohere", "cohere2"):
        assert hasattr(AutoConfig.for_model(family), FACTOR)


# ---------------------------------------------------------------- what a forward may do to its logits

UNKNOWN = {
    "a factor near one": lambda logits: 1.02 * logits,
    "a cap": lambda logits: 30 * torch.tanh(logits / 30),
    "a high cap": lambda logits: 2000 * torch.tanh(logits / 2000),
    "a bias": lambda logits: logits + 0.01,
    "a softmax": lambda logits: torch.log_softmax(logits, dim=-1),
    "fewer columns": lambda logits: logits[..., :60],
    "columns that never count": lambda logits: logits.index_fill(-1, torch.tensor([60]), -torch.inf),
}


class Changed(LlamaForCausalLM):
    """Changes its logits as a family may that is not known."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.change(outputs.logits)
        return outputs


def build_changed(change: Any, **options: Any) -> TrainingModel:
    model = build_unsharded(future_config(), tiny_llama(**options))
    model.lm.__class__ = type("Changed", (Changed,), {"change": staticmethod(change)})
    return model


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_change_is_found_on_the_first_weights(name):
    check_head(build_changed(lambda logits: logits), CPU)
    with pytest.raises(UserError, match=r'^model_type "llama" is not supported: its logits .*; it cannot be trained here$'):
        check_head(build_changed(UNKNOWN[name]), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_change_is_not_mistaken_for_another(dtype):
    def run(change: Any, **keys: Any) -> str:
        lm = build_changed(change, **keys).lm.to(dtype)
        return find_head_error(lm, read_head(lm))

    assert not run(lambda logits: logits * 0.0625, logit_scale=0.0625)
    assert not run(lambda logits: logits / 8, logits_scaling=8)
    assert not run(lambda logits: torch.tanh(logits / 30.0) * 30.0, final_logit_softcapping=30.0)
    assert run(lambda logits: logits * 8, logits_scaling=8).endswith("without bias, times 0.125, without a cap")
    assert run(lambda logits: logits, final_logit_softcapping=30.0).endswith("without bias, times 1, capped at 30")
    assert run(lambda logits: torch.tanh(logits / 31.0) * 31.0, final_logit_softcapping=30.0)


def test_a_bias_that_starts_at_zero_counts(tmp_path):
    lm = build_unsharded(future_config()).lm
    lm.lm_head.bias = nn.Parameter(torch.ones(61))
    assert not find_head_error(lm, read_head(lm))
    assert find_head_error(lm, OutputHead(lm.lm_head.weight, None, find_logit_rule(lm.config)))


class Beside(LlamaForCausalLM):
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.shift = nn.Linear(config.hidden_size, config.hidden_size)


class OwnHead(LlamaForCausalLM):
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.lm_head = type("Head", (nn.Linear,), {"forward": lambda self, states: 2 * nn.Linear.forward(self, states)})(32, 61)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Beside, r"parameters beside its base model and its output head, which the loss would leave out \(shift.weight\)"),
        (OwnHead, r"its output head is not one nn\.Linear"),
    ],
)
def test_what_the_loss_would_leave_out_is_refused_before_it_runs(kind, reason, monkeypatch):
    monkeypatch.setattr(
        "flame.models.causal_lm.AutoModelForCausalLM", SimpleNamespace(__name__="", from_config=lambda config, **_: kind(config))
    )
    with pytest.raises(UserError, match=reason):
        build_unsharded(future_config())


# ---------------------------------------------------------------- what a base model may do under a mask


def test_states_that_are_not_the_models_own_are_found(monkeypatch):
    """SDPA here scales scores in another way than the model's eager attention."""
    model, own = build_wide(build_other("glm4")), ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "scaling": 0.5 * kwargs["scaling"]})

    check_no_leak(model, CPU, with_future=True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    with pytest.raises(UserError, match=r'"glm4" is not supported: in a packed sequence.* other states than its own attention'):
        check_no_leak(model, CPU, with_future=True)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_sdpa_leaves_out_is_refused(name, monkeypatch):
    model, own = build_wide(build_other("glm4")), ALL_ATTENTION_FUNCTIONS["sdpa"]

    def leave_out(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return own(*args, **{key: value for key, value in kwargs.items() if key != name})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", leave_out)  # as in releases without an error
    for layer in model.lm.base_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, name: torch.ones(4)}), with_kwargs=True
        )
    with pytest.raises(UserError, match=f"its attention asks for {name}, which SDPA leaves out"):
        check_no_leak(model, CPU, with_future=True)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is leave_out
    assert model.lm.config._attn_implementation == "sdpa"
