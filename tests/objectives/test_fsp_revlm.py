"""FSP-RevLM against its definition as a plain loop in float64, and the reverse model trained, frozen and taken over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from flame.attention.backends import MaskedBackend
from flame.attention.families import find_limits
from flame.data.batch import NO_LABEL, PackedBatch
from flame.errors import UserError
from flame.models.parallelize import parallelize
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.trainer.options import read_options
from flame.trainer.setup import build_modules
from flame.weights.export import name_objective_file
from flame.weights.tensors import read_model_tensors
from tests.support.answers import build_pack, split_documents
from tests.support.models import count_flops, get_own, random_batch, random_cu_seqlens, tiny_llama
from tests.support.objectives import build_objective, choose, expect_definition
from tests.support.runs import read_metrics, run_here

FROZEN = {"train_reverse": False}


def compute_by_loop(model: TrainingModel, batch: PackedBatch, reverse_weight: float) -> Tensor:
    """One document, turned round by hand, and one position at a time. Without a weight the reverse model is only read."""
    own, total = get_own(model), torch.zeros((), dtype=torch.float64)
    backend = MaskedBackend("sdpa", find_limits(tiny_llama()))
    for document in split_documents(batch):
        states = model.lm.base_model(document.input_ids, use_cache=False).last_hidden_state[0]
        predicted = backend.encode_past(own.layers[0], document, states)
        backwards = document.input_ids.flip(1)
        read = own.reverse.base_model(backwards, use_cache=False).last_hidden_state[0]
        logits, length = own.reverse(backwards, use_cache=False).logits[0], len(read)
        for t, label in enumerate(document.labels[0].tolist()):
            if label == NO_LABEL or t + 2 >= length:
                continue
            place = length - 1 - (t + 2)
            total = total + ((predicted[t] - read[place].detach()) ** 2).sum()
            total = total - reverse_weight * torch.log_softmax(logits[place], 0)[backwards[0, place + 1]]
            assert backwards[0, place + 1] == label
    return total


@pytest.mark.parametrize("changes", [{}, {"reverse_weight": 0.3}, FROZEN], ids=str)
@pytest.mark.parametrize("kept", ["all", "answers"])
def test_it_is_its_definition(changes, kept):
    model = build_objective("fsp_revlm", **changes).double()
    batch = random_batch(random_cu_seqlens(30, 5, seed=1)) if kept == "all" else build_pack([(11, 3), (4, 0), (6, 5)])
    expect_definition(
        model,
        lambda: model(compute_losses, batch, Requested(aux=True, ce=False)).aux.loss_sum,
        lambda: compute_by_loop(model, batch, 0.0 if changes is FROZEN else changes.get("reverse_weight", 1.0)),
    )


def test_the_reverse_model_reads_no_past_and_no_other_document():
    model, batch = build_objective("fsp_revlm"), random_batch(torch.tensor([0, 3, 15, 30], dtype=torch.int32))
    changed = build_objective("fsp_revlm")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True))
    before = model.encode_reversed(get_own(model).reverse, batch)
    batch.input_ids[0, 7] = (batch.input_ids[0, 7] + 1) % 61
    moved = (model.encode_reversed(get_own(model).reverse, batch) != before).any(dim=-1).nonzero().flatten().tolist()
    assert moved == list(range(3, 8))


def test_its_own_embeddings_stay_tied():
    reverse = get_own(build_objective("fsp_revlm")).reverse
    assert reverse.get_output_embeddings().weight is reverse.get_input_embeddings().weight


def test_frozen_flops_are_a_forward():
    batch = random_batch(random_cu_seqlens(40, 6, seed=1))
    trained, frozen = (count_flops(build_objective("fsp_revlm", **changes), batch) for changes in ({}, FROZEN))
    assert trained.aux_forward == frozen.aux_forward
    assert trained.heads - frozen.heads == 2 * frozen.aux_forward + 6 * 61 * 32 * 40


@pytest.mark.parametrize("changes", [{}, FROZEN], ids=str)
def test_each_layer_of_both_networks_is_a_group(leave_no_trace, changes):
    """The auxiliary layer is gathered with the root, which has the heads."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    config = choose("fsp_revlm", **changes)
    model = build_modules(config, tiny_llama(), "cpu")
    parallelize(model, get_own(model).list_layer_stacks(), [], config.training, "full", init_device_mesh("cpu", (2,)))
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 2 + 2 + 1


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--fsp_revlm.train_reverse=false", "fsp_revlm.train_reverse = false, but nothing says"),
        ("--fsp_revlm.reverse_weight=0", "fsp_revlm.reverse_weight = 0 with train_reverse = true trains"),
    ],
)
def test_a_reverse_model_that_nothing_has_trained_is_refused(option, told):
    argv = ["--objective.name=fsp_revlm", option]
    with pytest.raises(UserError) as caught:
        read_options(["--model.config=m.json", "--model.tokenizer_path=bytes", "--training.dataset=pathstar", *argv], 1)
    assert any(line.startswith(told) for line in caught.value.lines)


def test_weights_without_a_reverse_model_are_refused(workspace, tmp_path, exported_run, capsys):
    """A frozen network of random weights would have nothing to teach."""
    changes = {"objective__name": "fsp_revlm", "future_encoder__learnable_temperature": None, "fsp_revlm__train_reverse": False}
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", checkpoint__initial_load_path=exported_run / "hf", **changes)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in line
    assert "lacks reverse of the objective fsp_revlm, which this run does not train: give the export of a run that" in line


def test_the_papers_two_stages(workspace, tmp_path):
    """A second run takes the reverse model of the first, and leaves it as it is."""
    changes = {"objective__name": "fsp_revlm", "future_encoder__learnable_temperature": None, "training__steps": 2}
    run_here(workspace, tmp_path / "first", **changes, checkpoint__export_hf=True)
    source: Path = tmp_path / "first" / "hf"
    assert (source / name_objective_file("fsp_revlm")).exists()
    second = {"fsp_revlm__train_reverse": False, "checkpoint__initial_load_path": source}
    run_here(workspace, tmp_path / "second", **changes | second)
    first, last = (read_model_tensors(max((tmp_path / run / "checkpoint").glob("step-*"))) for run in ("first", "second"))
    reverse = [name for name in first if name.startswith("objective.reverse.")]
    assert reverse and all(torch.equal(first[name], last[name]) for name in reverse)
    assert all("fsp_revlm_reverse_ce" not in row and row["fsp_revlm_distance"] > 0 for row in read_metrics(tmp_path / "second"))
