"""Mixtures of experts: all ways to compute them agree, and what corrects the choice between them is no weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame.attention.families import FAMILIES
from flame.data.tokenizer import build_bytes_tokenizer
from flame.objectives.step import Requested, compute_losses
from flame.trainer.setup import build_run_optimizer
from tests.support.exports import build_model
from tests.support.families import TOYS, build_toy
from tests.support.models import build_unsharded, future_config, get_own, random_batch
from tests.support.runs import cut_power_after, final_weights, options, run_here

CU = torch.tensor([0, 14, 15, 40], dtype=torch.int32)
MIXTURES = [name for name, (family, _) in TOYS.items() if FAMILIES[family].has_experts]
CORRECTION = "mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("name", MIXTURES)
def test_all_implementations_of_experts_agree(name):
    """States and gradients. Runs take "grouped_mm"; "eager" is a loop over experts in the family's own code."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(build_toy(name, initializer_range=0.2), dtype=torch.float32)
    model, batch, found = build_unsharded(future_config(), build_toy(name)), random_batch(CU), {}
    model.lm.load_state_dict(reference.state_dict())
    assert model.lm.config._experts_implementation == "grouped_mm"
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.lm.set_experts_implementation(implementation)
        model.zero_grad()
        states = model.encode_past(batch)
        (states * torch.linspace(-1, 1, 40 * 32).view(40, 32)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.lm.parameters() if p.grad is not None])
        found[implementation] = states.detach(), gradients
    assert found["eager"][1].any()
    for implementation in ("batched_mm", "grouped_mm"):
        for ours, expected in zip(found[implementation], found["eager"], strict=True):
            assert (ours - expected).norm() < 1e-5 * expected.norm(), implementation


def test_a_correction_of_scores_is_used_and_averaged_and_never_trained():
    config = future_config(target="ema", ema_decay=0.5)
    model, batch = build_unsharded(config, build_toy("deepseek_v3")), random_batch(CU)
    (name,) = [name for name, _ in model.lm.named_buffers() if name.endswith(CORRECTION)]

    def encode() -> Tensor:
        with torch.no_grad():
            return model.encode_past(batch)

    correction, before = model.lm.get_buffer(name), encode()
    assert name in model.lm.state_dict() and not correction.any()
    correction.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))
    assert (encode() != before).any()
    get_own(model).start_new_run(model)
    averaged = get_own(model).teacher.get_buffer(name)
    assert torch.equal(averaged, correction) and averaged is not correction
    optimizer = build_run_optimizer(config, model)
    losses = model(compute_losses, batch, Requested(aux=True))
    (losses.ce_sum + losses.aux.loss_sum).backward()
    optimizer.step()
    get_own(model).after_step(model)
    assert correction.tolist() == averaged.tolist() == [0.0, 0.0, 9.0, 9.0] and correction.dtype == torch.float32


def test_a_run_keeps_the_correction_that_it_loads(workspace, tmp_path):
    """Through shards, a checkpoint, a resume and the export."""
    source, run = tmp_path / "source", tmp_path / "run"
    model = build_model(build_toy("deepseek_v3", vocab_size=264))
    expected = {name: buffer for name, buffer in model.named_buffers() if name.endswith(CORRECTION)}
    assert expected and all(buffer.any() for buffer in expected.values())
    model.save_pretrained(source)
    build_bytes_tokenizer().save_pretrained(source)
    changes = {"model__config": None, "model__tokenizer_path": None, "checkpoint__initial_load_path": source}
    changes |= {"checkpoint__export_hf": True}
    cut_power_after(4, options(workspace, run, **changes))
    run_here(workspace, run, **changes)
    trained, exported = final_weights(run), AutoModelForCausalLM.from_pretrained(run / "hf")
    for name, buffer in expected.items():
        assert torch.equal(trained[f"lm.{name}"], buffer) and torch.equal(exported.get_buffer(name), buffer)
    router = next(iter(expected)).replace("e_score_correction_bias", "weight")
    assert not torch.equal(trained[f"lm.{router}"], model.get_parameter(router))
