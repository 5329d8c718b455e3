"""Sequential modules against their definition as a plain loop in float64, and the curricula of parallel heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flame.attention.backends import MaskedBackend
from flame.attention.families import find_limits
from flame.data.batch import NO_LABEL, PackedBatch
from flame.errors import UserError
from flame.models.wrapper import TrainingModel
from flame.objectives.mtp.objective import count_tokens
from flame.objectives.step import Requested, compute_losses
from flame.trainer.options import read_options
from tests.support.answers import build_pack, split_documents
from tests.support.models import count_flops, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.objectives import build_objective, expect_definition
from tests.support.runs import read_metrics, run_here


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-6)


def compute_by_loop(model: TrainingModel, batch: PackedBatch) -> Tensor:
    """One document and one module at a time, over the positions alone that have a token so far ahead."""
    own, table, total = get_own(model), model.lm.get_input_embeddings().weight, torch.zeros((), dtype=torch.float64)
    backend = MaskedBackend("sdpa", find_limits(tiny_llama()))
    for document in split_documents(batch):
        tokens, labels = document.input_ids[0], document.labels[0].tolist()
        states = model.lm.base_model(document.input_ids, use_cache=False).last_hidden_state[0]
        for k, (join, layer) in enumerate(zip(own.inputs, own.layers, strict=True), start=1):
            length = len(tokens) - k
            if length < 1:
                break
            embeddings = torch.stack([table[tokens[i + k]] for i in range(length)])
            parts = [norm(states[:length], join.norm_state.weight), norm(embeddings, join.norm_token.weight)]
            cut = replace(
                document,
                input_ids=document.input_ids[:, :length],
                position_ids=document.position_ids[:, :length],
                segment_ids=document.segment_ids[:, :length],
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            )
            states = backend.encode_past(layer, cut, torch.cat(parts, dim=-1) @ join.projection.weight.T)
            for i in range(length):
                if i + k < len(labels) and labels[i] != NO_LABEL and labels[i + k] != NO_LABEL:
                    logits = states[i] @ model.output_embedding.T
                    total = total - torch.log_softmax(logits, 0)[tokens[i + k + 1]] / len(own.layers)
    return total


@pytest.mark.parametrize("tokens", [2, 4])
@pytest.mark.parametrize("kept", ["all", "answers"])
def test_sequential_modules_are_their_definition(tokens, kept):
    model = build_objective("mtp_sequential", tokens=tokens).double()
    for join in get_own(model).inputs:  # far from 1, so that a norm that is left out shows
        torch.nn.init.normal_(join.norm_state.weight), torch.nn.init.normal_(join.norm_token.weight)
    batch = random_batch(random_cu_seqlens(30, 5, seed=1)) if kept == "all" else build_pack([(11, 3), (4, 0), (6, 5)])
    expect_definition(
        model,
        lambda: model(compute_losses, batch, Requested(aux=True, ce=False)).aux.loss_sum,
        lambda: compute_by_loop(model, batch),
    )


@pytest.mark.parametrize("name", ["mtp", "mtp_sequential"])
def test_the_cross_entropy_of_each_distance_is_logged(name):
    model, batch = build_objective(name, tokens=3), random_batch(random_cu_seqlens(40, 6, seed=1))
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    assert aux.measures.keys() == {f"{name}_ce_2", f"{name}_ce_3"}
    totals = [mean.total.item() for mean in aux.measures.values()]
    assert aux.loss_sum.item() == pytest.approx(sum(totals) / (2 if name == "mtp_sequential" else 1), rel=1e-6)
    assert [int(mean.items) for mean in aux.measures.values()] == [batch.count_labels_ahead(2), batch.count_labels_ahead(3)]


def test_a_sequential_module_beyond_all_documents_is_refused():
    argv = ["--objective.name=mtp_sequential", "--mtp_sequential.tokens=8", "--training.context_len=8"]
    with pytest.raises(UserError) as caught:
        read_options(["--model.config=m.json", "--model.tokenizer_path=bytes", "--training.dataset=pathstar", *argv], 1)
    assert any(line.startswith("mtp_sequential.tokens = 8") for line in caught.value.lines)


# ---------------------------------------------------------------- curricula

PHASES = {"none": [4] * 8, "forward": [1, 1, 2, 2, 3, 3, 4, 4], "reverse": [4, 4, 3, 3, 2, 2, 1, 1]}


@pytest.mark.parametrize("curriculum", PHASES)
def test_phases_are_equal_parts_of_the_run(curriculum):
    assert [count_tokens(curriculum, 4, step, 8) for step in range(1, 9)] == PHASES[curriculum]
    assert count_tokens(curriculum, 4, 9, 8) == PHASES[curriculum][-1], "a step after the last of the schedules"


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_only_active_heads_are_computed(tokens):
    """The loss is that of an objective of so few tokens; the others get no gradient, and cost nothing."""
    model, small = build_objective("mtp", tokens=3, curriculum="forward"), build_objective("mtp", tokens=max(tokens, 2))
    batch = random_batch(random_cu_seqlens(40, 6, seed=1))
    get_own(model).begin_step(tokens, 3)
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    aux.loss_sum.backward()
    has_gradient = [all(p.grad is not None for p in layer.parameters()) for layer in get_own(model).layers]
    assert has_gradient == [tokens > 1, tokens > 2]
    if tokens == 1:
        assert aux.loss_sum == 0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert count_flops(model, batch).heads == 0
    else:
        small.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(aux.loss_sum, small(compute_losses, batch, Requested(aux=True)).aux.loss_sum)
        assert count_flops(model, batch) == count_flops(small, batch)


def test_a_run_goes_through_its_phases(workspace, tmp_path):
    changes = {"objective__name": "mtp", "mtp__tokens": 3, "mtp__curriculum": "reverse", "metrics__diagnostics_interval": 3}
    run_here(workspace, tmp_path, training__steps=3, **changes, future_encoder__learnable_temperature=None)
    rows = read_metrics(tmp_path)
    assert [row["mtp_tokens"] for row in rows] == [3, 2, 1]
    assert ["mtp_ce_3" in row for row in rows] == [True, False, False] and rows[2]["aux_loss"] == 0
