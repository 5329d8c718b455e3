"""The example of docs/add_an_objective.md: against a plain loop in float64, and as a run from its file."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.train import main
from flame.trainer.options import read_options
from flame.weights.export import name_objective_file
from tests.support.answers import SEPARATOR, keep_turns, pack_documents
from tests.support.models import get_own, pack, random_batch, random_cu_seqlens
from tests.support.objectives import SKIP_TOKEN, build_objective
from tests.support.paths import REPO
from tests.support.runs import final_weights, options, read_metrics

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TOTAL = 24


@cache
def build(distance: int) -> TrainingModel:
    return build_objective("skip_token", distance=distance).double()


def list_pairs(batch: PackedBatch, distance: int) -> list[tuple[int, int]]:
    """Positions that count and what each predicts: the tokens that far ahead in a chunk, behind its separator where only answers
    count."""
    tokens, pairs = batch.input_ids[0].tolist(), []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        first = start
        if batch.answers_only:
            inside = tokens[start : end - 1]
            first = start + inside.index(SEPARATOR) if SEPARATOR in inside else end
        pairs += [(t, t + distance) for t in range(first, end - distance)]
    return pairs


def draw_batch(lengths: list[int], seed: int, answers_only: bool) -> PackedBatch:
    if not answers_only:
        return random_batch(torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        document = torch.randint(1, 61, (length,), generator=generator).tolist()
        if length % 3:
            document[length // 2] = SEPARATOR
        documents.append(document)
    (batch,) = pack_documents(documents, TOTAL, TOTAL, 1)
    # A chunk that does not begin its document counts for nothing; there is none in here but the last one, cut at its end.
    assert all(chunk.start == 0 for chunk in batch.documents)
    return batch


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    distance=st.integers(1, 4),
    answers_only=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_its_definition(lengths, distance, answers_only, seed):
    """Loss and its gradients, the count of the step, and the metric."""
    model, batch = build(distance), draw_batch(lengths, seed, answers_only)
    map_weight = get_own(model).get_parameter("map.weight")
    pairs = list_pairs(batch, distance)
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    assert get_own(model).count(batch) == aux.num_items == len(pairs) and aux.failed == 0

    states = model.encode_past(batch) @ map_weight.T
    expected, norms = 0.0 * states.sum(), 0.0
    for t, ahead in pairs:
        scores = states[t] @ model.output_embedding.T
        expected = expected + torch.log(torch.exp(scores).sum()) - scores[batch.input_ids[0, ahead]]
        norms += states[t].norm().item()
    torch.testing.assert_close(aux.loss_sum, expected, **CLOSE)
    total, items = aux.measures["skip_token_norm"]
    assert (total.item(), items.item()) == (pytest.approx(norms, rel=1e-5), len(pairs))
    weights = list(model.parameters())
    found = torch.autograd.grad(aux.loss_sum, weights)
    for ours, theirs in zip(found, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), distance=st.integers(1, 5), seed=st.integers(0, 999))
def test_between_turns_nothing_is_predicted(lengths, distance, seed):
    """Where only the assistant's turns count, the token ahead must be one of them too."""
    batch = keep_turns(draw_batch(lengths, seed, answers_only=False), seed)
    model, cu = build(distance), batch.cu_seqlens.tolist()
    counted = {t + 1 for t, label in enumerate(batch.labels[0].tolist()) if label != NO_LABEL}
    pairs = [
        (t, t + distance)
        for start, end in pairwise(cu)
        for t in range(start, end - distance)
        if t + 1 in counted and t + distance in counted
    ]
    aux = model(compute_losses, batch, Requested(aux=True)).aux
    assert get_own(model).count(batch) == batch.count_labels_ahead(distance) == aux.num_items == len(pairs)
    states = model.encode_past(batch) @ get_own(model).get_parameter("map.weight").T
    scores = torch.log_softmax(states @ model.output_embedding.T, dim=-1)
    expected = -sum((scores[t, batch.input_ids[0, ahead]] for t, ahead in pairs), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(aux.loss_sum, expected, **CLOSE)


def test_one_token_ahead_with_the_identity_is_the_cross_entropy():
    model, batch = build_objective("skip_token", distance=1).double(), random_batch(random_cu_seqlens(30, 4, seed=0))
    torch.nn.init.eye_(get_own(model).get_parameter("map.weight"))
    losses = model(compute_losses, batch, Requested(aux=True))
    torch.testing.assert_close(losses.aux.loss_sum, losses.ce_sum, **CLOSE)
    assert losses.aux.num_items == batch.num_labels


def test_a_sequence_is_the_sum_of_its_documents():
    model, batch = build(2), random_batch(torch.tensor([0, 7, 9, 20], dtype=torch.int32))
    documents = [pack(batch.input_ids[0, a:b], torch.tensor([0, b - a], dtype=torch.int32)) for a, b in ((0, 7), (7, 9), (9, 20))]
    whole, *parts = (model(compute_losses, each, Requested(aux=True)).aux for each in (batch, *documents))
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts), **CLOSE)
    assert whole.num_items == sum(part.num_items for part in parts) == 5 + 0 + 9


# ---------------------------------------------------------------- a run


def list_changes(**changes: object) -> dict[str, object]:
    return {
        "objective__name": None,
        "objective__path": SKIP_TOKEN,
        "future_encoder__learnable_temperature": None,
        "future_predictor__dropout": None,
        "training__steps": 2,
        "checkpoint__interval": 2,
        **changes,
    }


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "skip_token"
    main(options(workspace, folder, **list_changes(checkpoint__export_hf=True)))
    return folder


def test_its_metrics_are_logged(run):
    for row in read_metrics(run):
        assert row["loss"] == pytest.approx(row["ce_loss"] + row["aux_loss"], rel=1e-5)
        assert row["skip_token_norm"] > 0 and "anchors" not in row


def test_all_of_its_weights_are_written_beside_the_exported_model(run):
    exported, trained = load_file(run / "hf" / name_objective_file("skip_token")), final_weights(run)
    assert exported.keys() == {"map.weight"} == {name.removeprefix("objective.") for name in trained if "objective" in name}
    assert torch.equal(exported["map.weight"], trained["objective.map.weight"])
    assert "distance 2" in (run / "hf" / "README.md").read_text()


def test_its_distance_cannot_change_at_a_resume(run, workspace, capsys):
    with pytest.raises(SystemExit) as stop:
        main(options(workspace, run, **list_changes(skip_token__distance=3, training__steps=4)))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "skip_token.distance = 3" in error and "\n" not in error


def test_help_shows_its_section(capsys):
    with pytest.raises(SystemExit) as stop:
        read_options(["--objective.path", str(SKIP_TOKEN), "--help", "skip_token"], 1)
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(part in shown for part in ("skip_token.distance", "Tokens ahead. 1 is the next token.", "skip_token.loss_weight"))


def test_the_page_shows_the_file():
    """Each line of the page's excerpt, up to what it leaves out, is one of the file."""
    page, source = (REPO / "docs" / "add_an_objective.md").read_text(), SKIP_TOKEN.read_text().splitlines()
    excerpt = page.partition("```python\n")[2].partition("```")[0].splitlines()
    assert len(excerpt) > 15 and {line for line in excerpt if line.strip() != "..."} <= set(source)


def test_the_page_shows_the_file_as_it_is():
    page = (REPO / "docs" / "add_an_objective.md").read_text()
    assert f"```python\n{SKIP_TOKEN.read_text()}```" in page
