"""Held-out losses: what they are, that they are the same everywhere, and that training does not notice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flame.data.audit import read_audit
from flame.logging.metrics import Metrics
from flame.models.aux_loss import AuxLoss
from flame.objectives.future.options import FutureOptions
from flame.objectives.step import Losses
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer
from flame.trainer.loss_metrics import record_losses
from flame.trainer.options import read_options
from flame.trainer.validation import mark_failed
from tests.support.models import random_batch
from tests.support.runs import fork_ranks, measured, options, read_metrics, run_here

HELD_OUT = {"validation__interval": 2, "validation__num_sequences": 5}


@pytest.fixture
def held_out(workspace: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a validation corpus of its own."""
    lines = (workspace / "corpus.jsonl").read_text().splitlines()[::3]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines))
    return HELD_OUT | {"validation__dataset": "json", "validation__data_files": tmp_path / "held_out.jsonl"}


def pick(rows: list[dict]) -> list[dict]:
    """Validation metrics of the rows that have them."""
    found = [{name: row[name] for name in row if name == "step" or name.startswith("validation_")} for row in rows]
    return [row for row in found if len(row) > 1]


def test_losses_are_means_over_the_tokens_of_the_set(workspace, tmp_path, held_out):
    """Against plain cross entropies over each position of each held-out sequence, without dropout."""
    run = tmp_path / "run"
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, run, **held_out, training__steps=3), 1))
    trainer.train()
    rows = pick(read_metrics(run))
    assert [row["step"] for row in rows] == [2, 3]
    ce_total = aux_total = correct = 0.0
    labels = anchors = 0
    batches = [trainer.validator._own[turn] for turn in range(trainer.validator.num_sequences)]
    assert len(batches) == 5
    model = trainer.model.eval()

    def read(_, batch):
        objective, h, future = model.objective, model.encode_past(batch), model.encode_future(batch, 0)
        return (
            h @ model.output_embedding.t(),
            objective.predictor(h),
            F.normalize(future, dim=-1),
            objective.estimator.temperature(h),
        )

    with torch.no_grad():
        for batch in batches:
            logits, predictions, summaries, temperature = model(read, batch)
            segments = batch.segment_ids[0].tolist()
            here = [t for t in range(63) if segments[t] == segments[t + 1]]
            targets = batch.input_ids[0][[t + 1 for t in here]]
            ce_total += F.cross_entropy(logits[here], targets, reduction="sum").item()
            scores = predictions[here] @ summaries[[t + 1 for t in here]].t() / temperature
            aux_total += F.cross_entropy(scores, torch.arange(len(here)), reduction="sum").item()
            correct += (scores.argmax(-1) == torch.arange(len(here))).sum().item()
            labels, anchors = labels + len(here), anchors + len(here)
    last = rows[-1]
    assert last["validation_ce_loss"] == pytest.approx(ce_total / labels, rel=1e-5)
    assert last["validation_aux_loss"] == pytest.approx(aux_total / anchors, rel=1e-5)
    assert last["validation_infonce_accuracy"] == pytest.approx(correct / anchors, rel=1e-5)
    assert last["validation_loss"] == pytest.approx(
        ce_total / labels + FutureOptions().loss_weight * aux_total / anchors, rel=1e-5
    )
    names = {"mi_lower_bound", "positive_cosine", "negative_cosine"}
    assert {f"validation_{name}" for name in names} < set(last)
    assert model.lm.training is False and trainer.model.train().training


def test_training_does_not_notice(workspace, tmp_path, plain_run, held_out):
    validated = [row for row in run_here(workspace, tmp_path / "validated", **held_out) if "loss" in row]
    assert measured(validated) == measured(read_metrics(plain_run))


@pytest.mark.slow
def test_any_number_of_ranks_measures_the_same(workspace, tmp_path, held_out):
    """Five sequences on two ranks: one of them has nothing left in the last round."""
    one = run_here(workspace, tmp_path / "one", **held_out)
    two = fork_ranks(2, workspace, tmp_path / "two", **held_out, training__gradient_accumulation_steps=1)
    assert len(pick(one)) == 3
    for found, expected in zip(pick(two), pick(one), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)


def test_documents_held_out_are_not_trained_on(workspace, tmp_path):
    """With holdout_every, from each source of a mixture; and the set is each of those documents once."""
    run = tmp_path / "run"
    lines = (workspace / "corpus.jsonl").read_text().splitlines()
    for name, part in (("a", lines[:25]), ("b", lines[25:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    mixture = {
        "training__dataset": None,
        "training__data_files": None,
        "sources__a__dataset": "json",
        "sources__a__data_files": tmp_path / "a.jsonl",
        "sources__b__dataset": "json",
        "sources__b__data_files": tmp_path / "b.jsonl",
        "sources__b__weight": 3.0,
        "training__audit": True,
    }
    changes = mixture | HELD_OUT | {"validation__num_sequences": 100, "validation__holdout_every": 4, "training__steps": 24}
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, run, **changes), 1))
    trainer.train()
    trained = {(line["source"], chunk[0]) for line in read_audit(run) for chunk in line["pieces"]}
    expected = {name: set(range(0, count, 4)) for name, count in (("a", 25), ("b", len(lines) - 25))}
    assert trained and not any(document in expected[name] for name, document in trained)
    chunks = [
        (batch.source, chunk.document, token)
        for batch in trainer.validator._own
        for chunk in batch.documents
        for token in range(chunk.start, chunk.end)
    ]
    assert len(chunks) == len(set(chunks)) and all(document in expected[name] for name, document, _ in chunks)
    row = pick(read_metrics(run))[-1]
    assert {"validation_ce_loss/a", "validation_ce_loss/b"} < set(row)
    assert min(row["validation_ce_loss/a"], row["validation_ce_loss/b"]) <= row["validation_ce_loss"]
    logged = [row for row in read_metrics(run) if "loss" in row][-1]
    assert logged["tokens_seen"] == logged["tokens_seen/a"] + logged["tokens_seen/b"] == 24 * 2 * 64
    assert logged["tokens_seen/b"] / logged["tokens_seen"] == pytest.approx(0.75, abs=0.08)
    assert {"ce_loss/a", "ce_loss/b"} & set(logged)


def test_a_source_that_fills_no_sequence_is_named(workspace, tmp_path, caplog):
    """Of three that are held out of; one is never drawn from and is not missed."""
    lines = (workspace / "corpus.jsonl").read_text().splitlines()
    mixture: dict[str, object] = {"training__dataset": None, "training__data_files": None}
    for name, part, weight in (
        ("whole", lines, 1.0),
        ("short", [json.dumps({"text": "short"})] * 4, 1.0),
        ("undrawn", lines, 0.0),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
        found = {"dataset": "json", "data_files": tmp_path / f"{name}.jsonl", "weight": weight}
        mixture |= {f"sources__{name}__{option}": value for option, value in found.items()}
    caplog.set_level("WARNING", "flame")
    rows = run_here(workspace, tmp_path / "run", **mixture, **HELD_OUT, validation__holdout_every=2, training__steps=2)
    assert "validation_ce_loss/whole" in pick(rows)[-1] and "validation_ce_loss/short" not in pick(rows)[-1]
    (told,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("validation: "))
    assert 'source "short"' in told and "training.seq_len = 64" in told


def test_a_source_that_is_used_up_is_told_with_how_many_sequences_are_even(workspace, tmp_path, caplog):
    """Else the mean over sources, which comparisons rest on, would count it for less in silence."""
    lines = (workspace / "corpus.jsonl").read_text().splitlines()
    mixture: dict[str, object] = {"training__dataset": None, "training__data_files": None}
    for name, part in (("large", lines), ("small", [json.dumps({"text": "alpha beta gamma " * 6})] * 4)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
        found = {"dataset": "json", "data_files": tmp_path / f"{name}.jsonl", "weight": 1.0}
        mixture |= {f"sources__{name}__{option}": value for option, value in found.items()}
    mixture |= HELD_OUT | {"validation__holdout_every": 2, "training__steps": 2}
    told = {}
    for count in (12, 7):
        caplog.clear()
        caplog.set_level("WARNING", "flame")
        run_here(workspace, tmp_path / f"run{count}", **mixture | {"validation__num_sequences": count})
        told[count] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("validation: ")]
    assert told == {
        12: [
            'validation: 3 of 12 sequences are of source "small", whose weight asks for 6: its held-out documents are used up, '
            "and the means over all sources count it for less; up to validation.num_sequences = 7 all count by their weights"
        ],
        7: [],
    }


def read_fault(workspace: Path, run: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, run, **changes)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def test_a_corpus_that_fills_no_sequence_is_refused(workspace, tmp_path, capsys):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "short"}))
    changes = HELD_OUT | {"validation__dataset": "json", "validation__data_files": tmp_path / "short.jsonl"}
    assert read_fault(workspace, tmp_path / "run", capsys, **changes) == (
        "validation: the held-out documents have fewer than training.seq_len = 64 tokens: lower training.seq_len, or give "
        "validation.dataset more documents"
    )


@pytest.fixture
def short_first(workspace, tmp_path) -> dict[str, object]:
    """Options of a corpus whose first document is shorter than a sequence."""
    lines = (workspace / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "many.jsonl").write_text("\n".join([json.dumps({"text": "of few words alone"}), *lines[1:]]))
    return HELD_OUT | {"training__data_files": tmp_path / "many.jsonl", "training__steps": 2}


def test_held_out_documents_that_fill_no_sequence_are_refused(workspace, tmp_path, capsys, short_first):
    assert read_fault(workspace, tmp_path / "run", capsys, **short_first, validation__holdout_every=40) == (
        "validation: the held-out documents have fewer than training.seq_len = 64 tokens: lower training.seq_len or "
        "validation.holdout_every, or set validation.dataset in its place"
    )


def test_no_smaller_number_than_the_smallest_is_advised(workspace, tmp_path, capsys, short_first):
    (tmp_path / "many.jsonl").write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "long " * 99}))
    assert read_fault(workspace, tmp_path / "run", capsys, **short_first, validation__holdout_every=2).endswith(
        ": lower training.seq_len, or set validation.dataset in place of validation.holdout_every"
    )


@pytest.mark.parametrize("advice", ["seq_len", "holdout_every", "dataset"])
def test_what_is_advised_helps(workspace, tmp_path, held_out, short_first, advice):
    changes = {
        "seq_len": {"training__seq_len": 16, "training__context_len": 16, "validation__holdout_every": 40},
        "holdout_every": {"validation__holdout_every": 5},
        "dataset": held_out,
    }[advice]
    assert pick(run_here(workspace, tmp_path / "run", **(short_first | changes)))


@pytest.mark.usefixtures("one_process")
def test_a_failed_loss_of_the_objective_is_no_mean_of_the_others():
    """Training leaves such a sequence out, and counts it. A validation has no such count, so it shows none."""
    batch = random_batch(torch.tensor([0, 9, 20], dtype=torch.int32))
    found = {}
    for failures in ((0.0, 0.0), (0.0, 1.0)):
        metrics = Metrics(torch.device("cpu"))
        for failed in failures:
            sums = [torch.tensor(3.0 * (1 - failed)), torch.tensor(2.0 * (1 - failed)), torch.tensor(failed)]
            losses = mark_failed(Losses(torch.tensor(5.0), AuxLoss(*sums, {})))
            record_losses(metrics, losses, batch, ["x"], "validation_")
        found[failures] = metrics.collect()
    assert found[0.0, 0.0]["validation_aux_loss"] == 1.5
    assert math.isnan(found[0.0, 1.0]["validation_aux_loss"])
    assert found[0.0, 1.0]["validation_ce_loss"] == found[0.0, 0.0]["validation_ce_loss"]
