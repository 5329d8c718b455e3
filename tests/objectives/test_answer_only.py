"""`training.loss_on = "answer"`: what counts, in both losses, in the counts that they are divided by, and in validation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.attention.masks import find_anchors
from flame.config.schema import Corpus, Training
from flame.data.batch import NO_LABEL, PackedBatch, build_batch
from flame.data.buckets import round_up_to_bucket
from flame.data.document_streams import Cursor
from flame.data.loader import MOST_VAIN_SEQUENCES, PackedLoader
from flame.data.mixture import Mixture, open_held_out
from flame.data.packing import Chunk, PackedSequence
from flame.data.state import DataState
from flame.errors import UserError
from flame.models.flops import ModelFlops, count_matrix_weights
from flame.objectives.future.anchors import count_anchors
from flame.objectives.step import Losses, Requested, compute_losses
from flame.runtime.distributed import set_single_process_defaults, start_processes
from flame.train import Trainer
from flame.trainer.options import read_options
from flame.trainer.setup import open_inputs
from flame.trainer.validation import Validator, judge_answers
from tests.support.answers import SEPARATOR, pack_documents
from tests.support.documents import ListSource, encode_numbers, tokenize_rows
from tests.support.models import build_unsharded, count_flops, future_config
from tests.support.refusals import expect_one_line
from tests.support.runs import fork_ranks, measured, options, read_metrics, run_here
from tests.support.sources import choose_kind

SEQ_LEN, CONTEXT_LEN = 24, 9
documents_of_a_corpus = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(documents=documents_of_a_corpus, shift=st.integers(0, 4), at_most=st.integers(0, 9))
def test_labels_and_anchors_are_those_behind_the_first_separator(documents, shift, at_most):
    """Token by token. A chunk that does not begin its document has no part in it."""
    for batch in pack_documents(documents, SEQ_LEN, CONTEXT_LEN, 5):
        expected, anchors = [], []
        for chunk in batch.documents:
            document = documents[chunk.document]
            for t in range(chunk.start, chunk.end):
                is_answer = chunk.start == 0 and SEPARATOR in document[: t + 1] and t + 1 < chunk.end
                expected.append(document[t + 1] if is_answer else NO_LABEL)
                anchors.append(is_answer and t + shift < chunk.end)
        assert batch.labels[0].tolist() == expected
        assert batch.num_labels == batch.chunk_labels.sum() == sum(label != NO_LABEL for label in expected)
        found = find_anchors(batch.segment_ids[0], shift) & (batch.labels[0] != NO_LABEL)
        assert found.tolist() == anchors
        counted = count_anchors(batch, shift, at_most)
        assert counted == min(sum(anchors), at_most or len(anchors))


def test_without_a_separator_all_labels_are_counted_by_chunk():
    ids = np.arange(9, dtype=np.int64)
    batch = build_batch(PackedSequence(ids, np.asarray([0, 5, 6, 9], np.int32), "a", 0, Cursor(0, 0, 0, 0), [], 0), 0)
    assert batch.chunk_labels.tolist() == [4, 0, 2] and batch.num_labels == 6


def test_a_corpus_without_answers_is_refused():
    training = Training(loss_on="answer", seq_len=SEQ_LEN, context_len=CONTEXT_LEN, num_streams=4, num_workers=0)
    rows = {"long prompts": [[1] * 30 + [0, 2]], "none": [[1, 2, 3]], "few": [[1, 2, 3]] * 40 + [[0, 2]]}
    for name, documents in rows.items():
        source = tokenize_rows(ListSource([" ".join(map(str, document)) for document in documents]), encode_numbers)
        mixture = Mixture((source,), (1.0,), separator=SEPARATOR)
        loader = PackedLoader(training, mixture, 0, 1, DataState(4, training.seed))
        if name == "few":
            assert any(next(loader).num_labels for _ in range(50))
            continue
        with pytest.raises(UserError) as caught:
            for _ in range(MOST_VAIN_SEQUENCES):
                next(loader)
        expect_one_line(caught.value, 'training.answer_separator = "="', "training.context_len = 9")


@given(count=st.integers(0, 5000), at_most=st.integers(1, 6000))
def test_bucket_sizes_hold_the_count_and_are_few(count, at_most):
    bucket = round_up_to_bucket(count, at_most)
    assert min(count, at_most) <= bucket <= at_most
    assert bucket <= max(1.25 * count, count + 64)
    assert len({round_up_to_bucket(other, 10**9) for other in range(5000)}) < 30


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000), horizon=st.integers(0, 3), at_most=st.sampled_from([0, 3, 200]), shift=st.sampled_from([0, 1, 2])
)
def test_both_losses_are_their_definitions(seed, horizon, at_most, shift):
    """Against loops over labels, anchors and candidates, in float64, with gradients, from the model's own hidden states."""
    chooser = np.random.default_rng(seed)
    documents = [[*chooser.integers(1, 60, chooser.integers(4, 9)), 0, *chooser.integers(0, 60, 5)] for _ in range(6)]
    model = build_unsharded(future_config(exclude_neighbors=horizon, max_anchors=at_most, target_shift=shift)).double()
    (batch,) = pack_documents([[int(i) for i in document] for document in documents], 100, 16, 1)
    assert batch.num_labels < 64 < 100  # so that rows are chosen, and fill up
    found = model(compute_losses, batch, Requested(aux=True))
    rows = [t for t, label in enumerate(batch.labels[0].tolist()) if label != NO_LABEL]
    segment = batch.segment_ids[0].tolist()
    anchors = [t for t in rows if t + shift < 100 and segment[t + shift] == segment[t]]
    if at_most == 3:
        assert found.aux.num_items == 3
        return
    assert found.aux.num_items == len(anchors)

    hidden = model.encode_past(batch)
    with torch.no_grad():
        summaries = model.encode_future(batch, 0)
    ce = F.cross_entropy((hidden @ model.output_embedding.t())[rows], batch.labels[0][rows], reduction="sum")
    aux = torch.zeros((), dtype=torch.float64)
    predictions = model.objective.predictor(hidden)
    for t in anchors:
        kept = [u for u in anchors if u == t or segment[u] != segment[t] or abs(u - t) > horizon]
        scores = torch.stack([torch.cosine_similarity(predictions[t], summaries[u + shift], dim=0) for u in kept]) / 0.1
        aux = aux + scores.logsumexp(0) - scores[kept.index(t)]
    assert found.ce_sum.item() == pytest.approx(ce.item()) and found.aux.loss_sum.item() == pytest.approx(aux.item())
    weights = [*model.parameters()]
    expected = torch.autograd.grad(ce + 0.3 * aux, weights, allow_unused=True)
    gradients = torch.autograd.grad(found.ce_sum + 0.3 * found.aux.loss_sum, weights, allow_unused=True)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def model():
    return build_unsharded(future_config()).double()


def test_a_pack_without_answers_counts_nothing_and_runs_backward(model):
    (batch,) = pack_documents([[1, 2, 3, 4]], SEQ_LEN, CONTEXT_LEN, 1)
    losses = model(compute_losses, batch, Requested(aux=True))
    assert losses.ce_sum == losses.aux.loss_sum == losses.aux.num_items == 0
    gradients = torch.autograd.grad(losses.ce_sum + losses.aux.loss_sum, [*model.parameters()], allow_unused=True)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


def test_flops_are_those_of_what_counts():
    model = build_unsharded(future_config())
    counter, predictor = ModelFlops(model.lm), count_matrix_weights(model.objective.predictor)
    (batch,) = pack_documents([[1, 2, 0, 4, 5, 6]], SEQ_LEN, CONTEXT_LEN, 1)  # 4 documents with 3 answer tokens each
    every, counted = (count_flops(model, replace(batch, answers_only=only)) for only in (False, True))
    assert every.next_token - counted.next_token == 6 * counter.head * (24 - 12)
    in_documents, in_suffixes = 6 * 5 / 2, 4 * 3 / 2  # pairs; a suffix is the separator and three tokens
    channels = sum(counter.channels.values())
    assert every.aux_forward == 2 * counter.body * 24 + 4 * channels * 4 * in_documents
    assert counted.aux_forward == 2 * counter.body * 16 + 4 * channels * 4 * in_suffixes
    assert counted.heads == 6 * predictor * 12 + 4 * 12**2 * 32


# --- validation ---


@given(data=st.data(), documents=documents_of_a_corpus)
@settings(max_examples=50, deadline=None)
def test_answers_are_judged_by_document(data, documents):
    (batch,) = pack_documents(documents, SEQ_LEN, CONTEXT_LEN, 1)
    is_correct = data.draw(st.lists(st.booleans(), min_size=SEQ_LEN, max_size=SEQ_LEN))
    exact, second, lengths = [], [], []
    for chunk, (start, end) in zip(batch.documents, zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False), strict=True):
        document = documents[chunk.document]
        if (chunk.start, chunk.end) == (0, len(document)) and SEPARATOR in document[:-1]:
            first = int(start) + document.index(SEPARATOR)
            exact.append(all(is_correct[first : int(end) - 1]))
            second.append(is_correct[min(first + 1, int(end) - 2)])
            lengths.append(len(document))
    judged = judge_answers(torch.tensor(is_correct) & (batch.labels[0] != NO_LABEL), batch)
    assert (judged.is_exact.tolist(), judged.has_second_token.tolist(), judged.lengths.tolist()) == (exact, second, lengths)


def test_an_exact_match_is_what_greedy_decoding_gives(model):
    """Answers that the model itself gives, some of them changed in one place."""
    ids, cuts, expected = [], [0], []
    with torch.no_grad():
        for number in range(12):
            document = [1 + number, 7, 5, SEPARATOR]
            for _ in range(4):
                document.append(int(model.lm(torch.tensor([document])).logits[0, -1].argmax()))
            if number % 3:
                document[4 + number % 4] = 60 - document[4 + number % 4]
            greedy = document[:4]
            while len(greedy) < len(document):
                greedy.append(int(model.lm(torch.tensor([greedy])).logits[0, -1].argmax()))
            expected.append(greedy == document)
            ids += document
            cuts.append(len(ids))
    chunks = [Chunk(number, 0, 8, 0, True) for number in range(12)]
    counts = np.asarray([[end - 4, end] for end in cuts[1:]])
    cu_seqlens = np.asarray(cuts, dtype=np.int32)
    batch = build_batch(PackedSequence(np.asarray(ids), cu_seqlens, "a", 0, Cursor(0, 0, 0, 0), chunks, 0, counts), 0)
    with torch.no_grad():
        losses = model(compute_losses, batch, Requested(aux=False, correct=True))
    assert judge_answers(losses.is_correct, batch).is_exact.tolist() == expected
    assert 2 <= sum(expected) <= 10


# --- whole runs ---

GRAPHS = {
    "model__tokenizer_path": "pathstar",
    "training__dataset": "pathstar",
    "training__dataset_name": "2x3,3x3",
    "training__data_files": None,
    "training__loss_on": "answer",
    "training__seq_len": 200,
    "training__context_len": 64,
    "pathstar__labels": 9,
    "validation__dataset": "pathstar",
    "validation__dataset_name": "2x3,3x3",
    "validation__interval": 3,
    "validation__num_sequences": 3,
}
COUNTS = ("anchors", "tokens_seen")


def validated(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "validation_loss" in row]


@pytest.mark.slow
def test_ranks_and_accumulation_divide_by_the_same_counts(workspace, tmp_path):
    one = run_here(workspace, tmp_path / "one", **GRAPHS)
    two = fork_ranks(2, workspace, tmp_path / "two", **GRAPHS, training__gradient_accumulation_steps=1)
    assert {"validation_exact_match", "validation_first_branch"} <= set(validated(one)[0])
    assert [row["step"] for row in validated(one)] == [3, 6]
    for a, b in zip(one, two, strict=True):
        assert [a.get(name) for name in COUNTS] == [b.get(name) for name in COUNTS]
        for name in ("loss", "ce_loss", "aux_loss", "validation_loss", "validation_exact_match", "validation_first_branch"):
            assert (name in a) == (name in b)
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=2e-4), name
    assert 0 < one[0]["anchors"] < 2 * 200 / 3


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_exact_match_of_each_size_of_graphs(rank, world_size, workspace, tmp_path):
    """By a loop over a rank's documents; their edges tell the size. Of three sequences the second of two ranks has one, and runs
    another that does not count."""
    set_single_process_defaults()
    config = read_options(options(workspace, tmp_path / "run", **GRAPHS), 1)
    tokenizer, _, mixture = open_inputs(config)
    device, _ = start_processes(config.training, config.comm.timeout_seconds)
    validator = Validator(config, open_held_out(config, tokenizer, mixture), 0.0, rank, world_size, device)
    assert validator.num_sequences == 3
    generator = torch.Generator().manual_seed(0)
    right: dict[int, list[bool]] = {4: [], 6: []}

    class Predictor:
        def __call__(self, _step, batch, *_args) -> Losses:
            is_correct = torch.rand(batch.input_ids.shape[1], generator=generator) < 0.85
            for start, end in itertools.pairwise(batch.cu_seqlens.tolist() if batch.sequence_index % world_size == rank else []):
                ids = batch.input_ids[0, start:end].tolist()
                if ids[-1] == 12 and batch.documents[_index(batch, start)].start == 0:
                    right[ids.count(9) + 1].append(all(is_correct[start + ids.index(11) : end - 1]))
            return Losses(torch.zeros(()), None, is_correct & (batch.labels[0] != NO_LABEL))

        def eval(self) -> None: ...
        def train(self) -> None: ...

    values = validator.run(Predictor(), False, lambda: False)
    found = {name: value for name, value in values.items() if name.startswith("validation_exact_match")}
    shares = {size: np.mean(right[edges]) for size, edges in (("2x3", 4), ("3x3", 6))}
    assert 0 < sum(shares.values()) < 2
    assert found == pytest.approx(
        {f"validation_exact_match/{size}": share for size, share in shares.items()}
        | {"validation_exact_match": np.mean([*right[4], *right[6]])}
    )


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ("5x5", {}),
        ("5x5,5x5", {}),
        ("7x7,10x10", {137: "7x7", 284: "10x10"}),
        ("9x2,2x5", {}),
        ("9x2,2x5,2x3", {33: "9x2,2x5", 19: "2x3"}),
    ],
)
def test_sizes_are_told_apart_by_the_lengths_of_their_documents(sizes, names):
    assert choose_kind(Corpus(dataset="pathstar", dataset_name=sizes), "validation").name_answers() == names


def test_losses_of_a_run_are_means_over_its_answers(workspace, tmp_path):
    """The first step against plain cross entropy over the answers of its packs."""
    run = tmp_path / "run"
    set_single_process_defaults()
    changes = GRAPHS | {"training__steps": 1, "future_predictor__dropout": 0.0, "checkpoint__enable_checkpoint": False}
    trainer = Trainer(read_options(options(workspace, run, **changes), 1))
    sums = {}  # of the packs; one that is looked at more closely is run several times
    original = trainer.model.forward

    def keep(step, batch, *args):
        with torch.no_grad():
            logits = trainer.model.encode_past(batch) @ trainer.model.output_embedding.t()
        rows = [
            t
            for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False)
            for t in range(start, end - 1)
            if 11 in batch.input_ids[0, start : t + 1].tolist() and batch.documents[_index(batch, start)].start == 0
        ]
        if trainer.model.training:
            total = F.cross_entropy(logits[rows], batch.input_ids[0][[t + 1 for t in rows]], reduction="sum").item()
            sums[batch.sequence_index] = total, len(rows)
        return original(step, batch, *args)

    trainer.model.forward = keep
    trainer.train()
    row = next(row for row in read_metrics(run) if "ce_loss" in row)
    assert list(sums) == [0, 1]
    assert row["ce_loss"] == pytest.approx(math.fsum(s for s, _ in sums.values()) / sum(n for _, n in sums.values()), rel=1e-5)
    assert row["anchors"] == sum(n for _, n in sums.values())


def _index(batch: PackedBatch, start: int) -> int:
    return batch.cu_seqlens.tolist().index(start)


def test_a_stopped_run_goes_on_exactly(workspace, tmp_path: Path):
    whole = run_here(workspace, tmp_path / "whole", **GRAPHS)
    run = tmp_path / "run"
    set_single_process_defaults()
    trainer = Trainer(read_options(options(workspace, run, **GRAPHS), 1))
    trainer.is_stop_requested = lambda: trainer.step >= 4
    assert not trainer.train()
    rows = run_here(workspace, run, **GRAPHS)
    assert measured(rows) == measured(whole)
    assert [{k: v for k, v in row.items() if k.startswith("validation_")} for row in validated(rows)] == [
        {k: v for k, v in row.items() if k.startswith("validation_")} for row in validated(whole)
    ]
