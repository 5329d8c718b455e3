"""NextLat against its definition as a plain loop in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame.data.batch import NO_LABEL, PackedBatch
from flame.errors import UserError
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.trainer.options import read_options
from tests.support.answers import build_pack, split_documents
from tests.support.losses import chunks_of
from tests.support.models import get_own, random_batch, random_cu_seqlens
from tests.support.objectives import build_objective, expect_definition


def compute_by_loop(model: TrainingModel, batch: PackedBatch, horizon: int, kl_weight: float) -> Tensor:
    """One document, one position and one step at a time. The head is a copy, so that nothing reaches it."""
    dynamics, total = get_own(model).dynamics, torch.zeros((), dtype=torch.float64)
    head = model.output_embedding.detach().clone()
    for document in split_documents(batch):
        states = model.lm.base_model(document.input_ids, use_cache=False).last_hidden_state[0]
        tokens, labels = document.input_ids[0], document.labels[0].tolist()
        for t, label in enumerate(labels):
            state = states[t]
            for i in range(1, horizon + 1):
                if label == NO_LABEL or t + i >= len(labels):
                    break
                embedding = model.lm.get_input_embeddings().weight[tokens[t + i]]
                normed = F.layer_norm(torch.cat([state, embedding]), (64,), dynamics.norm.weight, dynamics.norm.bias)
                inner = F.gelu(dynamics.body[0](normed))
                state = state + dynamics.body[4](F.gelu(dynamics.body[2](inner)))
                if labels[t + i - 1] == NO_LABEL:
                    continue
                target = states[t + i].detach()
                gap = (state - target).abs()
                term = torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum() / 32
                p, q = torch.softmax(head @ target, 0), torch.softmax(head @ state, 0)
                total = total + (term + kl_weight * (p * (p / q).log()).sum()) / horizon
    return total


@pytest.mark.parametrize("rows_per_chunk", [3, 4096])
@pytest.mark.parametrize(("horizon", "kl_weight", "inner"), [(1, 1.0, 0), (3, 0.1, 24), (2, 0.0, 0)])
@pytest.mark.parametrize("kept", ["all", "answers"])
def test_it_is_its_definition(rows_per_chunk, horizon, kl_weight, inner, kept):
    model = build_objective("nextlat", horizon=horizon, kl_weight=kl_weight, hidden_dim=inner).double()
    batch = random_batch(random_cu_seqlens(24, 5, seed=1)) if kept == "all" else build_pack([(11, 3), (4, 0), (6, 5)])

    def compute() -> Tensor:
        with chunks_of(rows_per_chunk):
            return model(compute_losses, batch, Requested(aux=True, ce=False)).aux.loss_sum

    expect_definition(model, compute, lambda: compute_by_loop(model, batch, horizon, kl_weight))


def test_both_terms_are_logged():
    model, batch = build_objective("nextlat", kl_weight=0.5), random_batch(random_cu_seqlens(24, 5, seed=1))
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    means = {name: (mean.total / mean.items).item() for name, mean in aux.measures.items()}
    assert means.keys() == {"nextlat_smooth_l1", "nextlat_kl", "nextlat_agreement"} and 0 <= means["nextlat_agreement"] <= 1
    expected = means["nextlat_smooth_l1"] + 0.5 * means["nextlat_kl"]
    assert aux.loss_sum.item() / batch.num_labels == pytest.approx(expected, rel=1e-6)


def test_a_horizon_beyond_all_documents_is_refused():
    argv = ["--objective.name=nextlat", "--nextlat.horizon=8", "--training.context_len=8"]
    with pytest.raises(UserError) as caught:
        read_options(["--model.config=m.json", "--model.tokenizer_path=bytes", "--training.dataset=pathstar", *argv], 1)
    assert any(line.startswith("nextlat.horizon = 8") for line in caught.value.lines)
