"""Evaluation on a GPU, whose kernels are others and round to half precision."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from flame.data.tokenizer import build_bytes_tokenizer
from flame.evaluation.evaluator import Evaluator
from tests.support.evaluation import encode_plainly, make_questions, score_plainly, write_requests
from tests.support.paths import REPO
from tests.support.runs import run_here

pytestmark = pytest.mark.gpu


def test_bits_per_byte_are_those_of_the_exported_model_on_the_cpu(workspace, tmp_path):
    questions = make_questions(60, 1)
    changes = {
        "evaluation__interval": 6,
        "evaluation__tasks": write_requests(tmp_path / "toy.jsonl", questions),
        "evaluation__prompts": tmp_path / "prompts.txt",
        "evaluation__completion_tokens": 5,
        "checkpoint__export_hf": True,
    }
    (tmp_path / "prompts.txt").write_text("alpha\nbeta")
    row = run_here(workspace, tmp_path / "run", **changes)[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", dtype=torch.float32).eval()
    nats, size, tokenizer = 0.0, 0, build_bytes_tokenizer()
    for question in questions:
        ids, num_scored = encode_plainly(tokenizer, question.answers[0], 48)
        nats, size = nats - score_plainly(model, ids, num_scored)[0], size + num_scored
    assert row["evaluation/toy/bits_per_byte"] == pytest.approx(nats / size / 0.6931471805599453, rel=0.01)


def test_a_thousand_questions_at_340M_take_less_than_half_a_minute(tmp_path, monkeypatch):
    """On one H200. Up to four answers each, of some 200 tokens with their context. The second time nothing is compiled."""
    seconds, real = [], Evaluator.run

    def run(self, *args):
        torch.cuda.synchronize()
        start = time.monotonic()
        evaluated = real(self, *args)
        seconds.append(time.monotonic() - start)
        return evaluated

    monkeypatch.setattr(Evaluator, "run", run)
    (tmp_path / "text.txt").write_text("alpha beta " * 20000)
    changes = {
        "model__config": REPO / "configs/models/llama_340M.json",
        "training__dataset": "text",
        "training__data_files": tmp_path / "text.txt",
        "training__num_streams": 1,
        "training__seq_len": 32768,
        "training__context_len": 2048,
        "training__gradient_accumulation_steps": 1,
        "training__steps": 2,
        "objective__name": "next_token",
        "evaluation__interval": 1,
        "evaluation__tasks": write_requests(tmp_path / "toy.jsonl", make_questions(1000, 4, longest=120)),
        "checkpoint__enable_checkpoint": False,
    }
    run_here(tmp_path, tmp_path / "run", **changes)
    assert len(seconds) == 2 and seconds[1] < 30
