"""Scores of texts that are packed together, against one text at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedTokenizerFast

from flame.config.schema import JobConfig
from flame.data.tasks.reasoning_gym import Problem
from flame.data.tokenizer import build_bytes_tokenizer
from flame.evaluation.measured import AskedTask, HeldOutSet, ProblemSet, count_first_bytes
from flame.evaluation.scoring import Scorer, Scores, build_packed, pack_by_length
from flame.evaluation.tasks import Answer, Question, Task
from flame.evaluation.texts import ScoredText, cut_windows, encode_answers, encode_texts
from flame.models.output_head import LogitRule, OutputHead
from flame.trainer.setup import build_modules
from research.bits_per_byte import cut, measure
from tests.support.evaluation import build_toy, encode_plainly, make_questions, never, score_plainly
from tests.support.models import CPU, shard, tiny_llama
from tests.support.ranks import run_on_ranks

SEQ_LEN, CONTEXT_LEN = 160, 60
TOKENIZER = build_bytes_tokenizer()
SHARES = ("accuracy", "accuracy_per_char", "accuracy_per_byte", "exact_match")


def score_here(model, texts: list[ScoredText], seq_len: int = SEQ_LEN) -> Scores:
    scores = Scorer(texts, seq_len, CONTEXT_LEN, 0, 1, CPU).score(model, never)
    assert scores is not None
    return scores


@pytest.mark.usefixtures("one_process")
def test_each_answer_has_the_score_that_it_has_alone():
    model = build_toy()
    answers = [answer for question in make_questions(25, 4, longest=24) for answer in question.answers] + [Answer("", " é")]
    encoded = encode_answers(TOKENIZER, answers, CONTEXT_LEN)
    assert sum(each.is_cut for each in encoded if each) > 3
    scores = score_here(model, [each.text for each in encoded if each])
    expected = [score_plainly(model.lm, *encode_plainly(TOKENIZER, answer, CONTEXT_LEN)) for answer in answers]
    assert scores.log_probs == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-4)
    assert scores.is_greedy.tolist() == [is_greedy for _, is_greedy in expected]


@pytest.mark.usefixtures("one_process")
def test_what_greedy_decoding_gives_is_greedy():
    model, ids = build_toy(), list(b"abc")
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 250]
    scores = score_here(model, [ScoredText(np.asarray(each), 4) for each in (ids, other)])
    assert scores.is_greedy.tolist() == [True, False]


@pytest.mark.usefixtures("one_process")
def test_metrics_of_a_task_are_those_of_a_plain_loop():
    model, questions = build_toy(2), make_questions(40, 4, seed=3)
    asked = AskedTask(Task("toy", questions), TOKENIZER, CONTEXT_LEN)
    found = asked.measure(score_here(model, asked.texts))
    right = {"accuracy": 0, "accuracy_per_char": 0, "accuracy_per_byte": 0, "exact_match": 0}
    bits = num_bytes = 0.0
    for question in questions:
        plain = [score_plainly(model.lm, *encode_plainly(TOKENIZER, each, CONTEXT_LEN)) for each in question.answers]
        log_probs = [each for each, _ in plain]
        texts = [each.continuation[1:] for each in question.answers]
        for name, scaled in (
            ("accuracy", log_probs),
            ("accuracy_per_char", [each / len(text) for each, text in zip(log_probs, texts, strict=True)]),
            ("accuracy_per_byte", [each / len(text.encode()) for each, text in zip(log_probs, texts, strict=True)]),
        ):
            right[name] += scaled.index(max(scaled)) == question.gold
        right["exact_match"] += plain[question.gold][1]
        gold = question.answers[question.gold]
        bits -= log_probs[question.gold] / math.log(2)
        num_bytes += len((gold.context + gold.continuation).encode()) - len(gold.context.rstrip().encode())
    assert len({*right.values()}) > 1
    assert found == pytest.approx(
        {name: count / len(questions) for name, count in right.items()} | {"bits_per_byte": bits / num_bytes}, rel=1e-5
    )


@pytest.mark.usefixtures("one_process")
def test_bits_per_byte_are_those_of_transformers_alone():
    """Documents that fit the context, against `research.bits_per_byte`; longer ones, window by window."""
    model, texts = build_toy(3), ["alpha beta", "é" * 20, "x", "gamma delta epsilon\n" * 2]
    found = HeldOutSet("toy", texts, TOKENIZER, CONTEXT_LEN)
    measured = found.measure(score_here(model, found.texts))
    bits, size = measure(model.lm, cut(texts, TOKENIZER)), sum(len(text.encode()) - 1 for text in texts)
    assert measured["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert measured["ce_loss"] == pytest.approx(bits * math.log(2) / size, rel=1e-5)
    long = encode_texts(TOKENIZER, ["0123456789" * 17])[0]
    expected = sum(
        score_plainly(model.lm, long[max(end - CONTEXT_LEN - 1, 0) : end].tolist(), count)[0]
        for end, count in ((61, 60), (121, 60), (170, 49))
    )
    assert score_here(model, cut_windows(long, CONTEXT_LEN)).log_probs.sum() == pytest.approx(expected, abs=1e-3)


def build_doubled(times: int, begin: bool = False) -> PreTrainedTokenizerFast:
    """Tokens of 2**times letters x, each a byte; and a token that begins each text, if that is asked."""
    symbols = [*("x" * 2**power for power in range(times + 1)), "<s>", "</s>"]
    merges = [(symbol, symbol) for symbol in symbols[:times]]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=merges))
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", times + 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_bits_per_byte_of_a_uniform_model_do_not_depend_on_the_tokenizer(times, begin):
    """Documents of 20 bytes, in tokens of 1, 2 and 4 bytes, each with 8 bits a byte. All bytes count where a token begins each
    text, since they are predicted; elsewhere the first token is not, and its bytes do not count."""
    tokenizer, texts = build_doubled(times, begin), ["x" * 20] * 3
    ids = [(each, 20) for each in encode_texts(tokenizer, texts)]
    for documents in (texts, ids):
        found = HeldOutSet("toy", documents, tokenizer, 16)
        log_probs = np.asarray([-8 * 2**times * math.log(2) * text.num_scored for text in found.texts])
        assert found.measure(Scores(log_probs, np.ones(len(log_probs), bool)))["bits_per_byte"] == pytest.approx(8)
        assert found._num_bytes == 3 * (20 if begin else 20 - 2**times)


def test_the_bytes_of_a_first_token_are_those_of_its_text():
    """Also where it ends inside a character, and where it stands for a space that the text does not have."""
    for text in ("x", "é", "漢", "\ufffd", "😀"):
        ids = encode_texts(TOKENIZER, [text])[0]
        assert [count_first_bytes(TOKENIZER, ids[place:]) for place in range(len(ids) + 1)] == [*[1] * len(ids), 0]
    pieces = ["<unk>", "</s>", "▁", "▁a", "\ufffd", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    counted = {
        piece: count_first_bytes(tokenizer, np.asarray([pieces.index(piece)])) for piece in (*pieces[1:5], "<0xC3>", "<0x61>")
    }
    assert counted == {"</s>": 0, "▁": 0, "▁a": 1, "\ufffd": 3, "<0xC3>": 1, "<0x61>": 1}
    merged = Tokenizer(models.BPE(vocab={"ð": 0, "Ł": 1, "ðŁ": 2, "</s>": 3}, merges=[("ð", "Ł")]))
    merged.decoder = decoders.ByteLevel()
    two = PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="</s>")
    assert count_first_bytes(two, np.asarray([2, 0])) == 2


@given(length=st.integers(0, 50), context_len=st.integers(1, 20))
def test_windows_score_each_token_but_the_first_once(length, context_len):
    windows = cut_windows(np.arange(length), context_len)
    assert [token for each in windows for token in each.ids[len(each.ids) - each.num_scored :]] == list(range(1, length))
    assert all(1 <= each.num_scored <= each.num_inputs <= context_len for each in windows)
    assert all(each.num_inputs == min(context_len, length - 1) for each in windows)


@given(lengths=st.lists(st.integers(1, 30), max_size=60), spare=st.integers(0, 40))
def test_packing_holds_each_text_once_and_neighbours_are_alike(lengths, spare):
    seq_len = 30 + spare
    rows = pack_by_length(lengths, seq_len)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= seq_len for row in rows)
    in_order = [lengths[index] for row in rows for index in row]
    assert in_order == sorted(lengths, reverse=True)


@given(lengths=st.lists(st.integers(1, 20), max_size=5), context_len=st.integers(20, 30))
def test_padding_fills_a_sequence_with_documents_of_its_own(lengths, context_len):
    batch = build_packed([np.arange(length) for length in lengths], 120, context_len)
    sizes = batch.cu_seqlens.diff().tolist()
    assert sum(sizes) == 120 and max(sizes) <= context_len and sizes[: len(lengths)] == lengths
    filled = sum(lengths)
    assert batch.input_ids[0, :filled].tolist() == [token for length in lengths for token in range(length)]


def test_too_long_and_empty_answers_are_left_out_and_counted():
    questions = [
        Question((Answer("a" * 100, " b"), Answer("a", " b")), 0),
        Question((Answer("a", " b"), Answer("a", "b" * (CONTEXT_LEN + 1))), 0),
        Question((Answer("a", " b"), Answer("a", "")), 0),
        Question((Answer("", "b"),), 0),
    ]
    asked = AskedTask(Task("toy", questions), TOKENIZER, CONTEXT_LEN)
    assert (asked.num_questions, asked.num_cut, asked.num_left_out) == (2, 1, 2)
    assert "1 do not fit training.context_len" in asked.describe() and "2 are left out" in asked.describe()
    assert [text.num_inputs for text in asked.texts] == [CONTEXT_LEN, 2, 1]


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_one_score_that_is_not_finite_makes_the_shares_nan(broken):
    asked = AskedTask(Task("toy", [Question((Answer("q", " a"), Answer("q", " b")), 0)] * 3), TOKENIZER, CONTEXT_LEN)
    log_probs = np.asarray([-1.0, -2.0] * 3)
    sound = asked.measure(Scores(log_probs, np.ones(6, bool)))
    assert {sound[name] for name in SHARES} == {1.0}
    log_probs[3] = broken
    found = asked.measure(Scores(log_probs, np.ones(6, bool)))
    assert all(math.isnan(found[name]) for name in SHARES), found
    assert found["bits_per_byte"] == sound["bits_per_byte"], "the right answers have scores"


class Problems:
    """Three problems, whose answers have 4, 16 and 17 bytes."""

    lengths = (4, 16, 17)

    def make(self, number: int) -> Problem:
        return Problem("question=", "a" * self.lengths[number], {})

    def verify(self, problem: Problem, answer: str) -> bool:
        return problem.answer == answer


def test_a_uniform_model_of_bytes_takes_eight_bits_per_byte_of_answers_of_any_length():
    """An answer longer than the context cannot be scored whole, so it is left out and counted."""
    problems = ProblemSet("toy", Problems(), 3, TOKENIZER, 16)
    assert [(text.num_inputs, text.num_scored) for text in problems.texts] == [(12, 4), (16, 16)]
    assert (problems.num_cut, problems.num_left_out) == (1, 1)
    assert problems.describe().endswith(
        "; 1 do not fit training.context_len, and lose the beginning of their question; 1 are left out of bits per byte, with "
        "an answer that is empty or does not fit training.context_len"
    )
    log_probs = np.asarray([-math.log(256) * text.num_scored for text in problems.texts])
    assert problems.measure(Scores(log_probs, np.ones(2, bool)))["bits_per_byte"] == pytest.approx(8)


class Doubling(Problems):
    """Of one letter, for `build_doubled`."""

    def make(self, number: int) -> Problem:
        return Problem("x" * 3, "x" * self.lengths[number], {})


@pytest.mark.parametrize("begin", [False, True])
def test_an_answer_follows_its_question_without_a_token_that_begins_texts(begin):
    problems = ProblemSet("toy", Doubling(), 3, build_doubled(0, begin), 32)
    first = [1] if begin else []
    assert [text.ids.tolist() for text in problems.texts] == [first + [0] * (3 + n) for n in Doubling.lengths]
    assert [text.num_scored for text in problems.texts] == list(Doubling.lengths)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.5, 3.0)])
def test_labels_are_scored_as_by_the_logits(rule, monkeypatch):
    """Also chunk by chunk."""
    monkeypatch.setattr("flame.models.output_head.count_chunk_rows", lambda *_: 4)
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, 8, generator=generator) for rows in (10, 30))
    head, labels = OutputHead(weight, torch.linspace(-1, 1, 30), rule), torch.arange(10) * 3
    logits = head.compute_logits(states)
    labels[2] = logits[2].argmax()
    scored = head.score_labels(states, labels)
    torch.testing.assert_close(scored.loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert scored.is_best.bool().tolist() == (logits.argmax(-1) == labels).tolist()


def test_half_precision_rounds_states_and_not_logits():
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((50, 8), (300, 8), (300,)))
    labels = (states.double() @ weight.double().t() + bias.double()).argmax(-1)
    scored = OutputHead(weight, bias).score_labels(states, labels)
    expected = OutputHead(weight.double(), bias.double()).score_labels(states.double(), labels)
    assert scored.is_best.bool().all() and scored.loss.dtype == torch.float32
    torch.testing.assert_close(scored.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)


def score_sharded(_folder, num_texts: int) -> list[float]:
    config = JobConfig()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    model = shard(build_modules(config, tiny_llama(vocab_size=264), "cpu"), config, mesh).eval()
    texts = list_texts(num_texts)
    scores = Scorer(texts, SEQ_LEN, CONTEXT_LEN, dist.get_rank(), dist.get_world_size(), CPU).score(model, never)
    assert scores is not None
    return scores.log_probs.tolist()


def list_texts(count: int) -> list[ScoredText]:
    chooser = np.random.default_rng(0)
    return [ScoredText(chooser.integers(0, 250, 2 + index % 50), 1 + index % 2) for index in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("num_texts", [1, 30])
def test_two_ranks_give_the_scores_of_one(num_texts, tmp_path, one_process):
    """Also where one of them has nothing to score."""
    first, second = run_on_ranks(2, tmp_path / "two", score_sharded, num_texts)
    assert first == second == pytest.approx(score_sharded(tmp_path, num_texts), abs=1e-4)


@pytest.mark.usefixtures("one_process")
def test_a_request_to_stop_ends_the_scoring_before_the_next_sequence():
    asked = []
    scorer = Scorer(list_texts(30), SEQ_LEN, CONTEXT_LEN, 0, 1, CPU)
    assert scorer.score(build_toy(), lambda: bool(asked.append(0)) or len(asked) == 3) is None
    assert len(asked) == 3
