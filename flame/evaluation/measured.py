"""What is measured: a task's questions and a held-out set, as texts to score and as numbers of their scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.data.encoding import encode_continuations
from flame.data.sources.base import VerifiedProblems
from flame.evaluation.scoring import Scores
from flame.evaluation.tasks import Question, Task
from flame.evaluation.texts import EncodedAnswer, ScoredText, cut_windows, encode_answers, encode_texts


class Measured(Protocol):
    """One named set of texts."""

    name: str
    texts: list[ScoredText]

    def describe(self) -> str:
        """The set in a line of the log at the start."""
        ...

    def measure(self, scores: Scores) -> dict[str, float]:
        """Numbers by name, from the scores of `texts`."""
        ...


class AskedTask:
    """The questions of a task.

    Attributes:
        num_cut: questions of which a context is cut.
        num_left_out: questions that are not asked, since one of their answers is empty or longer than `context_len`.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerFast, context_len: int):
        self.name = task.name
        answers = encode_answers(tokenizer, [answer for each in task.questions for answer in each.answers], context_len)
        ends = list(itertools.accumulate(len(each.answers) for each in task.questions))
        groups = [answers[end - len(each.answers) : end] for end, each in zip(ends, task.questions, strict=True)]
        self._asked: list[tuple[Question, list[EncodedAnswer]]] = []
        for question, group in zip(task.questions, groups, strict=True):
            complete = [answer for answer in group if answer is not None]
            if len(complete) == len(group):
                self._asked.append((question, complete))
        self.texts = [answer.text for _, group in self._asked for answer in group]
        self.num_cut = sum(any(answer.is_cut for answer in group) for _, group in self._asked)
        self.num_left_out = len(task.questions) - len(self._asked)

    @property
    def num_questions(self) -> int:
        """Questions that are asked."""
        return len(self._asked)

    def describe(self) -> str:
        line = f"{self.name}: {len(self._asked)} questions, {sum(text.num_inputs for text in self.texts)} tokens"
        if self.num_cut:
            line += f"; {self.num_cut} do not fit training.context_len, and lose the beginning of their context"
        if self.num_left_out:
            line += f"; {self.num_left_out} are left out, with an answer that is empty or does not fit training.context_len"
        return line

    def measure(self, scores: Scores) -> dict[str, float]:
        """Shares of the questions, and bits per byte over the right answers of all questions together.

        The answer with the highest score is chosen, of equal ones the first. The length of an answer is that of its text without
        the one space before it, as in lm-eval's `acc_norm` and `acc_bytes`. A score that is not finite makes the shares NaN.
        """
        chosen: dict[str, list[float]] = {"accuracy": [], "accuracy_per_char": [], "accuracy_per_byte": []}
        exact: list[float] = []
        nats = num_bytes = 0.0
        start = 0
        for question, group in self._asked:
            end = start + len(group)
            log_probs, gold = scores.log_probs[start:end], question.gold
            # An argmax of scores that are not finite would be an answer, and the metric a number that looks right.
            broken = not np.isfinite(log_probs).all()
            exact.append(math.nan if broken else float(scores.is_greedy[start + gold]))
            nats, num_bytes = nats - float(log_probs[gold]), num_bytes + group[gold].num_bytes
            if len(group) > 1:
                texts = [answer.continuation.removeprefix(" ") for answer in question.answers]
                for name, lengths in (
                    ("accuracy", [1] * len(texts)),
                    ("accuracy_per_char", [len(text) for text in texts]),
                    ("accuracy_per_byte", [len(text.encode()) for text in texts]),
                ):
                    is_right = int(np.argmax(log_probs / np.maximum(lengths, 1))) == gold
                    chosen[name].append(math.nan if broken else float(is_right))
            start = end
        found = {name: float(np.mean(right)) for name, right in {**chosen, "exact_match": exact}.items() if right}
        return found | ({"bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {})


class HeldOutSet:
    """Documents that are never trained on.

    Args:
        documents: texts, or token ids with the bytes of their text.
    """

    def __init__(
        self, name: str, documents: Iterable[str | tuple[np.ndarray, int]], tokenizer: PreTrainedTokenizerFast, context_len: int
    ):
        self.name = name
        self.num_documents = self._num_bytes = 0
        self.texts: list[ScoredText] = []
        for ids, num_bytes in _encode(documents, tokenizer):
            self.num_documents += 1
            self._num_bytes += num_bytes - count_first_bytes(tokenizer, ids)
            self.texts += cut_windows(ids, context_len)
        self._num_scored = sum(text.num_scored for text in self.texts)

    def describe(self) -> str:
        return f"{self.name}: {self.num_documents} held-out documents, {self._num_scored + self.num_documents} tokens"

    def measure(self, scores: Scores) -> dict[str, float]:
        """Cross entropy in nats per token, and bits per byte. The first token of a document is not predicted, as in training, so
        neither the token nor its bytes count."""
        nats = -float(scores.log_probs.sum())
        found = {"ce_loss": nats / self._num_scored}
        return found | ({"bits_per_byte": nats / math.log(2) / self._num_bytes} if self._num_bytes else {})


class ProblemSet:
    """Held-out problems whose answers are verified.

    Attributes:
        prompts: token ids of the questions.
        needed: tokens of each answer that the source gives, with the end of text, or `context_len` if they are more.
        num_cut: problems of which a question is cut before the source's answer.
        num_left_out: problems that are not in bits per byte, since the source's answer is empty or longer than `context_len`.
    """

    def __init__(self, name: str, problems: VerifiedProblems, count: int, tokenizer: PreTrainedTokenizerFast, context_len: int):
        self.name, self._problems, self._tokenizer = name, problems, tokenizer
        self._made = [problems.make(number) for number in range(count)]
        self.prompts = encode_texts(tokenizer, [problem.prompt for problem in self._made])
        answers = encode_continuations(tokenizer, [problem.answer for problem in self._made])
        self.needed = [min(len(answer) + 1, context_len) for answer in answers]
        scored = [0 < len(answer) <= context_len for answer in answers]
        self.num_left_out = len(scored) - sum(scored)
        self._num_bytes = sum(len(problem.answer.encode()) for problem in itertools.compress(self._made, scored))
        pairs = list(itertools.compress(zip(self.prompts, answers, strict=True), scored))
        self.num_cut = sum(len(prompt) + len(answer) > context_len for prompt, answer in pairs)
        self.texts = [ScoredText(np.concatenate([prompt, answer])[-(context_len + 1) :], len(answer)) for prompt, answer in pairs]

    def describe(self) -> str:
        line = f"{self.name}: {len(self.prompts)} problems, answers of at most {max(self.needed)} tokens"
        if self.num_cut:
            line += f"; {self.num_cut} do not fit training.context_len, and lose the beginning of their question"
        if self.num_left_out:
            line += (
                f"; {self.num_left_out} are left out of bits per byte, with an answer that is empty or does not fit "
                "training.context_len"
            )
        return line

    def measure(self, scores: Scores) -> dict[str, float]:
        """Bits per byte of the source's own answers, those that are scored."""
        return {"bits_per_byte": -float(scores.log_probs.sum()) / math.log(2) / self._num_bytes}

    def judge(self, completions: Sequence[Sequence[int]]) -> dict[str, float]:
        """Share of the problems that the model's own answers solve, by the source's verifier."""
        texts = [decode(self._tokenizer, ids) for ids in completions]
        right = [self._problems.verify(problem, text) for problem, text in zip(self._made, texts, strict=True)]
        return {"exact_match": float(np.mean(right))}


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens."""
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)


def count_first_bytes(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> int:
    """UTF-8 bytes of a document, integer [n], that its first token stands for: 0 if that is one that begins each text."""
    if len(ids) == 0:
        return 0
    text, token = decode(tokenizer, ids[:1].tolist()), tokenizer.backend_tokenizer.id_to_token(int(ids[0])) or ""
    if "\ufffd" not in text or "\ufffd" in token:
        return len(text.encode())
    # The token ends inside a character. It is written as one byte, "<0xC3>", or with one symbol for each byte.
    return 1 if token.startswith("<0x") else len(token)


def _encode(
    documents: Iterable[str | tuple[np.ndarray, int]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, int]]:
    whole = list(documents)
    encoded = iter(encode_texts(tokenizer, [document for document in whole if isinstance(document, str)]))
    for document in whole:
        yield (next(encoded), len(document.encode())) if isinstance(document, str) else document
