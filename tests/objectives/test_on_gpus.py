"""The further objectives on a GPU, compiled and in bfloat16, against float64 on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from flame.config.schema import JobConfig
from flame.models.causal_lm import find_decoder_layers
from flame.objectives.future.options import ActionOptions
from flame.objectives.step import Requested, compute_losses
from flame.trainer.setup import build_modules, materialize
from tests.support.models import WIDE, build_unsharded, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.objectives import choose

pytestmark = pytest.mark.gpu


def configure(name: str) -> JobConfig:
    """With the action loss all tokens are candidates: rounding would choose others of a few."""
    if name != "action":
        return choose(name)
    return choose("future", ActionOptions(top_k=61, temperature=0.1), estimator_type="cosine", learnable_temperature=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["action", "fsp_revlm", "mtp_sequential", "nextlat", "nitp", "regret"])
def test_loss_and_gradients_are_those_of_a_cpu(name, compiled):
    """STP is left out: a GPU draws other triples."""
    config, model_config = configure(name), tiny_llama(**WIDE)
    exact = build_unsharded(config, model_config).double()
    model = build_modules(config, copy.deepcopy(model_config), "cuda")  # each writes its attention into the configuration
    materialize(model, torch.device("cuda"), seed=0)
    model.load_state_dict(exact.state_dict())
    model.to(torch.bfloat16)
    if compiled:
        for module in (*find_decoder_layers(model.lm), *get_own(model).list_compiled()):
            module.compile(dynamic=False)
    batch, found = random_batch(random_cu_seqlens(256, 6, seed=1)), []
    for each, device in ((model, "cuda"), (exact, "cpu")):
        losses = each(compute_losses, batch.to(device), Requested(aux=True))
        (losses.ce_sum + losses.aux.loss_sum).backward()
        gradients = [p.grad.flatten().cpu().double() for p in each.parameters() if p.grad is not None]
        found.append((losses.aux.loss_sum.item(), torch.cat(gradients)))
    (loss, gradient), (expected, expected_gradient) = found
    assert loss == pytest.approx(expected, rel=0.1 if name == "regret" else 0.03)
    assert (gradient - expected_gradient).norm() < 0.1 * expected_gradient.norm()
