"""Questions, request files, and what a plain loop makes of them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flame.config.schema import JobConfig
from flame.evaluation.tasks import Answer, Question
from flame.models.wrapper import TrainingModel
from tests.support.models import build_unsharded, tiny_llama

WORDS = ["red", "green", "blue", "été", "a b", "x", "12", "zeta\nnu"]


def build_toy(seed: int = 1) -> TrainingModel:
    """A model of bytes that is not trained, and far from uniform."""
    return build_unsharded(JobConfig(), tiny_llama(vocab_size=264, initializer_range=0.3), seed).eval()


def never() -> bool:
    """No request to stop."""
    return False


def make_questions(count: int, most_answers: int, seed: int = 0, longest: int = 8) -> list[Question]:
    """Questions of different lengths; an answer begins with a space."""
    chooser = random.Random(seed)

    def draw(most: int) -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(1, most)))

    questions = []
    for _ in range(count):
        context = draw(longest) + chooser.choice([":", ": ", "\n"])
        answers = [Answer(context, f" {draw(3)}") for _ in range(chooser.randint(min(2, most_answers), most_answers))]
        questions.append(Question(tuple(answers), chooser.randrange(len(answers))))
    return questions


def write_requests(path: Path, questions: list[Question]) -> Path:
    """A request file, compressed if its name says so."""
    rows = [
        {"doc_id": number, "idx": index, "label": question.gold, "request": answer._asdict()}
        for number, question in enumerate(questions)
        for index, answer in enumerate(question.answers)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@torch.no_grad()
def score_plainly(model: PreTrainedModel, ids: list[int], num_scored: int) -> tuple[float, bool]:
    """Log-probability of the last tokens, each given those before it, and whether each is the most likely one."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, -num_scored:].double()
    targets = torch.tensor(ids[-num_scored:])
    log_probs = logits.log_softmax(-1)[torch.arange(num_scored), targets]
    return log_probs.sum().item(), bool((logits.argmax(-1) == targets).all())


def encode_plainly(tokenizer: PreTrainedTokenizerFast, answer: Answer, context_len: int) -> tuple[list[int], int]:
    """Ids of context and answer, and how many belong to the answer and the spaces before it."""
    whole = tokenizer(answer.context + answer.continuation)["input_ids"]
    context = tokenizer(answer.context.rstrip())["input_ids"] or [tokenizer.eos_token_id]
    ids = whole if answer.context else [tokenizer.eos_token_id, *whole]
    return ids[-(context_len + 1) :], len(ids) - len(context)
