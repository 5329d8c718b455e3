"""NITP against its definition as a plain loop in float64, with the library's own list of all layers' states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.registry import BUILT_IN
from flame.objectives.step import Requested, compute_losses
from tests.support.answers import build_pack, split_documents
from tests.support.models import build_unsharded, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.objectives import build_objective, choose, expect_definition


def compute_by_loop(model: TrainingModel, batch: PackedBatch, layer: int) -> Tensor:
    """The sum of 1 - cos(P(h_t), z_{t+1}), one document and one position at a time."""
    projector, total = get_own(model).projector, torch.zeros((), dtype=torch.float64)
    for document in split_documents(batch):
        states = model.lm.base_model(document.input_ids, output_hidden_states=True, use_cache=False).hidden_states
        final, shallow = states[-1][0], states[layer][0].detach()
        for t, label in enumerate(document.labels[0].tolist()):
            if label == NO_LABEL:
                continue
            gate, up = projector.gate.weight @ final[t], projector.up.weight @ final[t]
            predicted = projector.down.weight @ (gate * torch.sigmoid(gate) * up)
            total = total + 1 - predicted @ shallow[t + 1] / predicted.norm() / shallow[t + 1].norm()
    return total


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("kept", ["all", "answers"])
def test_it_is_its_definition(layer, kept):
    model = build_unsharded(choose("nitp", layer=layer), tiny_llama(num_hidden_layers=3)).double()
    batch = random_batch(random_cu_seqlens(40, 6, seed=1)) if kept == "all" else build_pack([(17, 3), (4, 0), (9, 5)])
    expect_definition(
        model,
        lambda: model(compute_losses, batch, Requested(aux=True, ce=False)).aux.loss_sum,
        lambda: compute_by_loop(model, batch, layer),
    )


def test_the_default_layer_is_a_fifth_of_the_depth():
    model = build_unsharded(choose("nitp"), tiny_llama(num_hidden_layers=10))
    assert get_own(model).find_layer_read() == 2


def test_the_mean_cosine_is_logged():
    model, batch = build_objective("nitp"), random_batch(random_cu_seqlens(40, 6, seed=1))
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    total, items = aux.measures["nitp_cosine"]
    assert (items - total).item() == pytest.approx(aux.loss_sum.item(), rel=1e-6) and items == batch.num_labels


def test_a_layer_that_the_model_lacks_is_refused():
    kind = BUILT_IN["nitp"]
    (line,) = kind.load().find_model_conflicts(kind.options(layer=3), tiny_llama())
    assert line.startswith("nitp.layer = 3") and "2 decoder layers" in line
