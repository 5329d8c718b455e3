"""`training.loss_on = "answer"`: what counts, in both losses, in the counts that they are divided by, and in validation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.components.distributed import set_single_process_defaults, start_processes
from flame.components.flops import FlopCounter
from flame.config import JobConfig, Training
from flame.config_reader import read_config
from flame.data.batch import NO_LABEL, PackedBatch, build_batch
from flame.data.documents import WHOLE, TokenizedSource
from flame.data.lines import Cursor, open_line
from flame.data.loader import MOST_VAIN_SEQUENCES, PackedLoader
from flame.data.mixture import Mixture, open_held_out
from flame.data.state import DataState
from flame.data.streams import PackedSequence, Piece, Stream
from flame.errors import UserError
from flame.models.future_mask import count_anchors, find_anchors, find_room
from flame.objective import Losses, Parts, compute_losses
from flame.run_setup import open_inputs
from flame.train import Trainer
from flame.validation import Validator, judge_answers, name_by_length
from tests.helpers import build_unsharded, future_config
from tests.test_bad_input import expect_one_line
from tests.test_data_streams import ListSource, encode_numbers
from tests.test_train import (  # noqa: F401 - fixtures
    leave_no_trace,
    measured,
    options,
    read_metrics,
    run_here,
    run_ranks,
    workspace,
)

SEPARATOR = 0
SEQ_LEN, CONTEXT_LEN = 24, 9
documents_of_a_corpus = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=8)


def pack_documents(documents: list[list[int]], seq_len: int, context_len: int, sequences: int) -> list[PackedBatch]:
    source = ListSource([" ".join(map(str, document)) for document in documents])
    line = open_line(TokenizedSource(source, encode_numbers), WHOLE, 0, 1, 3)
    stream = Stream(line, "list", 0, seq_len, context_len, SEPARATOR)
    cursor, batches = stream.first_cursor, []
    for index in range(sequences):
        sequence = stream.next_sequence(cursor)
        cursor = sequence.cursor
        batches.append(build_batch(sequence, index))
    return batches


@settings(max_examples=150, deadline=None)
@given(documents=documents_of_a_corpus, shift=st.integers(0, 4), at_most=st.integers(0, 9))
def test_labels_and_anchors_are_those_behind_the_first_separator(documents, shift, at_most):
    """Token by token. A piece that does not begin its document has no part in it."""
    for batch in pack_documents(documents, SEQ_LEN, CONTEXT_LEN, 5):
        expected, anchors = [], []
        for piece in batch.documents:
            document = documents[piece.document]
            for t in range(piece.start, piece.end):
                is_answer = piece.start == 0 and SEPARATOR in document[: t + 1] and t + 1 < piece.end
                expected.append(document[t + 1] if is_answer else NO_LABEL)
                anchors.append(is_answer and t + shift < piece.end)
        assert batch.labels[0].tolist() == expected
        assert batch.num_labels == batch.piece_labels.sum() == sum(label != NO_LABEL for label in expected)
        found = find_anchors(batch.segment_ids[0], shift) & (batch.labels[0] != NO_LABEL)
        assert found.tolist() == anchors
        counted = count_anchors(batch.cu_seqlens, shift, at_most, batch.piece_labels)
        assert counted == min(sum(anchors), at_most or len(anchors))


def test_without_a_separator_all_labels_are_counted_by_piece():
    ids = np.arange(9, dtype=np.int64)
    batch = build_batch(PackedSequence(ids, np.asarray([0, 5, 6, 9], np.int32), "a", 0, Cursor(0, 0, 0, 0), [], 0), 0)
    assert batch.piece_labels.tolist() == [4, 0, 2] and batch.num_labels == 6


def test_a_corpus_without_answers_is_refused():
    training = Training(loss_on="answer", seq_len=SEQ_LEN, context_len=CONTEXT_LEN, num_streams=4, num_workers=0)
    rows = {"long prompts": [[1] * 30 + [0, 2]], "none": [[1, 2, 3]], "few": [[1, 2, 3]] * 40 + [[0, 2]]}
    for name, documents in rows.items():
        source = TokenizedSource(ListSource([" ".join(map(str, document)) for document in documents]), encode_numbers)
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
def test_rooms_hold_the_count_and_are_few(count, at_most):
    room = find_room(count, at_most)
    assert min(count, at_most) <= room <= at_most
    assert room <= max(1.25 * count, count + 64)
    assert len({find_room(other, 10**9) for other in range(5000)}) < 30


def answer_config(**changes) -> JobConfig:
    config = future_config(**changes)
    config.training = Training(loss_on="answer")
    return config


@pytest.fixture(scope="module")
def model():
    return build_unsharded(future_config()).double()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), reach=st.integers(0, 3), at_most=st.sampled_from([0, 3, 200]), shift=st.sampled_from([0, 1, 2]))
def test_both_losses_are_their_definitions(model, seed, reach, at_most, shift):
    """Against loops over labels, anchors and candidates, in float64, with gradients, from the model's own hidden states."""
    chooser = np.random.default_rng(seed)
    documents = [[*chooser.integers(1, 60, chooser.integers(4, 9)), 0, *chooser.integers(0, 60, 5)] for _ in range(6)]
    config = answer_config(exclude_neighbors=reach, max_anchors=at_most, target_shift=shift)
    (batch,) = pack_documents([[int(i) for i in document] for document in documents], 100, 16, 1)
    assert batch.num_labels < 64 < 100  # so that rows are chosen, and fill up
    found = model(compute_losses, batch, config, Parts(aux=True))
    rows = [t for t, label in enumerate(batch.labels[0].tolist()) if label != NO_LABEL]
    segment = batch.segment_ids[0].tolist()
    anchors = [t for t in rows if t + shift < 100 and segment[t + shift] == segment[t]]
    if at_most == 3:
        assert found.aux.num_anchors == 3
        return
    assert found.aux.num_anchors == len(anchors)

    hidden = model.encode_past(batch)
    with torch.no_grad():
        summaries = model.encode_future(batch, 0)
    ce = F.cross_entropy((hidden @ model.output_embedding.t())[rows], batch.labels[0][rows], reduction="sum")
    aux = torch.zeros((), dtype=torch.float64)
    guesses = model.predictor(hidden)
    for t in anchors:
        kept = [u for u in anchors if u == t or segment[u] != segment[t] or abs(u - t) > reach]
        scores = torch.stack([torch.cosine_similarity(guesses[t], summaries[u + shift], dim=0) for u in kept]) / 0.1
        aux = aux + scores.logsumexp(0) - scores[kept.index(t)]
    assert found.ce_sum.item() == pytest.approx(ce.item()) and found.aux.loss_sum.item() == pytest.approx(aux.item())
    weights = [*model.parameters()]
    expected = torch.autograd.grad(ce + 0.3 * aux, weights, allow_unused=True)
    gradients = torch.autograd.grad(found.ce_sum + 0.3 * found.aux.loss_sum, weights, allow_unused=True)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-9)


def test_a_pack_without_answers_counts_nothing_and_runs_backward(model):
    (batch,) = pack_documents([[1, 2, 3, 4]], SEQ_LEN, CONTEXT_LEN, 1)
    losses = model(compute_losses, batch, answer_config(), Parts(aux=True))
    assert losses.ce_sum == losses.aux.loss_sum == losses.aux.num_anchors == 0
    gradients = torch.autograd.grad(losses.ce_sum + losses.aux.loss_sum, [*model.parameters()], allow_unused=True)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


def test_flops_are_those_of_what_counts():
    counter = FlopCounter(build_unsharded(future_config()), answer_config())
    (batch,) = pack_documents([[1, 2, 0, 4, 5, 6]], SEQ_LEN, CONTEXT_LEN, 1)  # 4 documents with 3 answer tokens each
    every, counted = (counter.count(batch.cu_seqlens, True, labels) for labels in (None, batch.piece_labels))
    assert every.next_token - counted.next_token == 6 * counter.head * (24 - 12)
    in_documents, in_tails = 6 * 5 / 2, 4 * 3 / 2  # pairs; a tail is the separator and three tokens
    channels = sum(counter.channels.values())
    assert every.future == 2 * counter.body * 24 + 4 * channels * 4 * in_documents
    assert counted.future == 2 * counter.body * 16 + 4 * channels * 4 * in_tails
    assert counted.heads == 6 * counter.predictor * 12 + 4 * 12**2 * counter.width


# --- validation ---


@given(data=st.data(), documents=documents_of_a_corpus)
@settings(max_examples=50, deadline=None)
def test_answers_are_judged_by_document(data, documents):
    (batch,) = pack_documents(documents, SEQ_LEN, CONTEXT_LEN, 1)
    is_hit = data.draw(st.lists(st.booleans(), min_size=SEQ_LEN, max_size=SEQ_LEN))
    exact, second, lengths = [], [], []
    for piece, (start, end) in zip(batch.documents, zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False), strict=True):
        document = documents[piece.document]
        if (piece.start, piece.end) == (0, len(document)) and SEPARATOR in document[:-1]:
            first = int(start) + document.index(SEPARATOR)
            exact.append(all(is_hit[first : int(end) - 1]))
            second.append(is_hit[min(first + 1, int(end) - 2)])
            lengths.append(len(document))
    judged = judge_answers(torch.tensor(is_hit) & (batch.labels[0] != NO_LABEL), batch)
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
    pieces = [Piece(number, 0, 8, 0, True) for number in range(12)]
    counts = np.full(12, 4, dtype=np.int64)
    cu_seqlens = np.asarray(cuts, dtype=np.int32)
    batch = build_batch(PackedSequence(np.asarray(ids), cu_seqlens, "a", 0, Cursor(0, 0, 0, 0), pieces, 0, counts), 0)
    with torch.no_grad():
        losses = model(compute_losses, batch, answer_config(), Parts(aux=False, hits=True))
    assert judge_answers(losses.is_hit, batch).is_exact.tolist() == expected
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
    "checkpoint__export_hf": False,
}
COUNTS = ("anchors", "tokens_seen")


def validated(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "validation_loss" in row]


def test_ranks_and_accumulation_divide_by_the_same_counts(workspace, tmp_path):  # noqa: F811
    one = run_here(workspace, tmp_path / "one", **GRAPHS)
    two = run_ranks(2, workspace, tmp_path / "two", **GRAPHS, training__gradient_accumulation_steps=2)
    assert {"validation_exact_match", "validation_first_branch"} <= set(validated(one)[0])
    assert [row["step"] for row in validated(one)] == [3, 6]
    for a, b in zip(one, two, strict=True):
        assert [a.get(name) for name in COUNTS] == [b.get(name) for name in COUNTS]
        for name in ("loss", "ce_loss", "aux_loss", "validation_loss", "validation_exact_match", "validation_first_branch"):
            assert (name in a) == (name in b)
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=2e-4), name
    assert 0 < one[0]["anchors"] < 4 * 200 / 3


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_exact_match_of_each_size_of_graphs(rank, world_size, workspace, tmp_path):  # noqa: F811
    """By a loop over a rank's documents; their edges tell the size. Of three sequences the second of two ranks has one, and runs
    another that does not count."""
    set_single_process_defaults()
    config = read_config(options(workspace, tmp_path / "run", **GRAPHS), 1)
    tokenizer, _, mixture = open_inputs(config)
    device, _ = start_processes(config)
    validator = Validator(config, open_held_out(config, tokenizer, mixture), rank, world_size, device)
    assert validator.num_sequences == 3
    generator = torch.Generator().manual_seed(0)
    right: dict[int, list[bool]] = {4: [], 6: []}

    class Guesser:
        def __call__(self, _step, batch, *_args) -> Losses:
            is_hit = torch.rand(batch.input_ids.shape[1], generator=generator) < 0.85
            for start, end in itertools.pairwise(batch.cu_seqlens.tolist() if batch.sequence_index % world_size == rank else []):
                ids = batch.input_ids[0, start:end].tolist()
                if ids[-1] == 12 and batch.documents[_index(batch, start)].start == 0:
                    right[ids.count(9) + 1].append(all(is_hit[start + ids.index(11) : end - 1]))
            return Losses(torch.zeros(()), None, is_hit & (batch.labels[0] != NO_LABEL))

        def eval(self) -> None: ...
        def train(self) -> None: ...

    values = validator.run(Guesser(), False, lambda: False)
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
    config = JobConfig()
    config.validation.dataset, config.validation.dataset_name = "pathstar", sizes
    assert name_by_length(config) == names


def test_losses_of_a_run_are_means_over_its_answers(workspace, tmp_path):  # noqa: F811
    """The first step against plain cross entropy over the answers of its four packs."""
    run = tmp_path / "run"
    set_single_process_defaults()
    changes = GRAPHS | {"training__steps": 1, "future_predictor__dropout": 0.0, "checkpoint__enable_checkpoint": False}
    trainer = Trainer(read_config(options(workspace, run, **changes), 1))
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
    assert list(sums) == [0, 1, 2, 3]
    assert row["ce_loss"] == pytest.approx(math.fsum(s for s, _ in sums.values()) / sum(n for _, n in sums.values()), rel=1e-5)
    assert row["anchors"] == sum(n for _, n in sums.values())


def _index(batch: PackedBatch, start: int) -> int:
    return batch.cu_seqlens.tolist().index(start)


def test_a_stopped_run_goes_on_exactly(workspace, tmp_path: Path):  # noqa: F811
    whole = run_here(workspace, tmp_path / "whole", **GRAPHS)
    run = tmp_path / "run"
    set_single_process_defaults()
    trainer = Trainer(read_config(options(workspace, run, **GRAPHS), 1))
    trainer.is_stop_requested = lambda: trainer.step >= 4
    assert not trainer.train()
    rows = run_here(workspace, run, **GRAPHS)
    assert measured(rows) == measured(whole)
    assert [{k: v for k, v in row.items() if k.startswith("validation_")} for row in validated(rows)] == [
        {k: v for k, v in row.items() if k.startswith("validation_")} for row in validated(whole)
    ]
