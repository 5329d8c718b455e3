"""Programs of other people on an exported model: generation, lm-eval, LoRA adapters by peft."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flame.weights.export import convert
from tests.support.exports import build_model, make_checkpoint
from tests.support.models import tiny_llama

CHOICES = ("red", "green", "blue")
QUESTIONS: list[dict[str, Any]] = [{"question": f"color {i}:", "choices": list(CHOICES), "answer": i % 3} for i in range(8)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    convert(make_checkpoint(folder / "run", build_model(tiny_llama(vocab_size=264))), folder / "hf")
    return folder / "hf"


def load(exported: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(exported).eval()


@torch.no_grad()
def test_generation_is_the_plain_loop(exported):
    """Greedy, with the library's cache, against the most likely token of a whole forward each time."""
    model, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("alpha beta", return_tensors="pt")
    found = model.generate(**prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    expected = prompt.input_ids
    while expected.shape[1] < prompt.input_ids.shape[1] + 12:
        token = model(expected).logits[0, -1].argmax()
        expected = torch.cat([expected, token.view(1, 1)], dim=1)
        if token == tokenizer.eos_token_id:
            break
    assert found.tolist() == expected.tolist()


@torch.no_grad()
def score(model: PreTrainedModel, prompt: bytes, answer: bytes) -> float:
    """Log-probability of an answer's bytes after a prompt's."""
    log_probabilities = model(torch.tensor([list(prompt + answer)])).logits[0].log_softmax(-1)
    return sum(log_probabilities[len(prompt) - 1 + i, byte].item() for i, byte in enumerate(answer))


def test_lm_eval_scores_it(exported, tmp_path, monkeypatch):
    """A local multiple-choice task; each log-probability, and the accuracy, against our own sums."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    (tmp_path / "colors.json").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "colors",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "colors.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "colors.yaml").write_text(yaml.safe_dump(task))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "dtype": "float32"},
        tasks=["colors"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    model = load(exported)
    correct = 0
    for question, sample in zip(QUESTIONS, results["samples"]["colors"], strict=True):
        expected = [score(model, question["question"].encode(), f" {choice}".encode()) for choice in CHOICES]
        assert [reply[0] for reply in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        correct += max(range(3), key=expected.__getitem__) == question["answer"]
    assert results["results"]["colors"]["acc,none"] == correct / len(QUESTIONS)


def test_a_lora_adapter_attaches_trains_and_returns(exported, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(load(exported), settings)
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        before = load(exported)(input_ids).logits
        assert torch.equal(model(input_ids).logits, before)  # an adapter begins as none
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(exported), tmp_path / "adapter")
    with torch.no_grad():
        trained = model.eval()(input_ids, labels=input_ids)
        assert trained.loss < loss
        assert torch.equal(again.eval()(input_ids).logits, trained.logits)
        assert not torch.equal(trained.logits, before)


@pytest.fixture(autouse=True)
def keep_logging():
    """lm-eval sets the level of the root logger."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
