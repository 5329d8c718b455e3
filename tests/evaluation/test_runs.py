"""Evaluation inside a run: its numbers, where they go, and that training does not notice."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM

from flame.config.evaluation import HeldOut
from flame.data.sources.registry import build_kind
from flame.data.tokenizer import build_bytes_tokenizer
from flame.evaluation.evaluator import Evaluator
from flame.evaluation.held_out import read_held_out
from flame.evaluation.measured import HeldOutSet
from flame.evaluation.tasks import Question
from flame.runtime.distributed import set_single_process_defaults
from flame.train import Trainer, main
from flame.trainer.options import read_options
from research.bits_per_byte import cut, measure
from tests.support.evaluation import make_questions, write_requests
from tests.support.runs import cut_power_after, final_weights, fork_ranks, measured, options, read_metrics, run_here

CONTEXT_LEN = 48  # of the toy runs
LONG_TEXT = "alpha beta gamma delta " * 9


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict[str, object]:
    """Options of two tasks and two held-out sets."""
    folder = tmp_path_factory.mktemp("asked")
    for name, most, seed in (("choices", 4, 0), ("answers", 1, 1)):
        write_requests(folder / f"{name}.jsonl.gz", make_questions(20, most, seed))
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("alpha beta", "été", "", "x")))
    (folder / "long.txt").write_text(LONG_TEXT)
    return {
        "evaluation__interval": 2,
        "evaluation__tasks": f"{folder}/choices.jsonl.gz,{folder}/answers.jsonl.gz",
        "evaluation__num_questions": 15,
        "held_out__short__dataset": "json",
        "held_out__short__data_files": folder / "short.jsonl",
        "held_out__long__dataset": "text",
        "held_out__long__data_files": folder / "long.txt",
    }


def pick(rows: list[dict]) -> list[dict]:
    """The rows of evaluations."""
    return [row for row in rows if any(name.startswith("evaluation/") for name in row)]


def leave(rows: list[dict]) -> list[dict]:
    return measured([row for row in rows if "loss" in row])


@pytest.fixture(scope="module")
def evaluated_run(workspace, asked, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "evaluated"
    run_here(workspace, run, **asked, checkpoint__export_hf=True)
    return run


def test_the_names_of_the_metrics(evaluated_run):
    rows = pick(read_metrics(evaluated_run))
    assert [row["step"] for row in rows] == [2, 4, 6]
    shares = {"accuracy", "accuracy_per_char", "accuracy_per_byte"}
    names = {
        *(f"evaluation/choices/{name}" for name in (*shares, "exact_match", "bits_per_byte")),
        *(f"evaluation/answers/{name}" for name in ("exact_match", "bits_per_byte")),
        *(f"evaluation/{name}/{metric}" for name in ("short", "long") for metric in ("ce_loss", "bits_per_byte")),
    }
    assert all(set(row) == {"step", *names} for row in rows)


def test_training_does_not_notice(plain_run, evaluated_run):
    """To the bit, with dropout in the predictor."""
    assert leave(read_metrics(evaluated_run)) == leave(read_metrics(plain_run))
    found, expected = final_weights(evaluated_run), final_weights(plain_run)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and set(found) == set(expected)


def test_a_resumed_run_neither_notices_nor_evaluates_twice(workspace, asked, tmp_path, plain_run, evaluated_run):
    """After a power cut right after an evaluation that no checkpoint knows of."""
    run = tmp_path / "run"
    cut_power_after(5, options(workspace, run, **asked))
    rows = run_here(workspace, run, **asked)
    assert pick(rows) == pick(read_metrics(evaluated_run))
    assert leave(rows) == leave(read_metrics(plain_run))
    found, expected = final_weights(run), final_weights(plain_run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stop_while_evaluating_leaves_the_evaluation_to_the_resumed_run(
    workspace, asked, tmp_path, monkeypatch, evaluated_run, plain_run
):
    """Which is killed after it and before its next checkpoint, so the next one makes it again. It is logged once."""
    run, real, calls = tmp_path / "run", Evaluator.run, []

    def interrupted(self, *args):
        calls.append(0)
        return real(self, *args)

    monkeypatch.setattr(Evaluator, "run", interrupted)
    set_single_process_defaults()
    changes = asked | {"checkpoint__interval": 100}
    assert not Trainer(read_options(options(workspace, run, **changes), 1), lambda: len(calls) == 2).train()
    assert [row["step"] for row in pick(read_metrics(run))] == [2]
    monkeypatch.undo()
    cut_power_after(5, options(workspace, run, **changes))
    rows = run_here(workspace, run, **changes)
    assert pick(rows) == pick(read_metrics(evaluated_run)) and leave(rows) == leave(read_metrics(plain_run))


def test_a_dry_run_evaluates_one_question_of_each_task(workspace, asked, tmp_path, caplog):
    main([*options(workspace, tmp_path / "run", **asked, training__steps=50), "--dry-run"])
    lines = [line.strip() for line in caplog.messages]
    assert any(line.startswith("choices: 1 questions") for line in lines)
    assert any(line.startswith("short: 1 held-out documents") for line in lines)
    assert sum("step 4/4 · answers" in line for line in lines) == 1


def test_an_evaluation_that_is_asked_for_later_is_made_up_for(workspace, asked, tmp_path, plain_run, evaluated_run):
    run = shutil.copytree(plain_run, tmp_path / "run")
    assert pick(run_here(workspace, run, **asked)) == pick(read_metrics(evaluated_run))[-1:]


def test_held_out_sets_have_the_bits_per_byte_of_the_exported_model(evaluated_run):
    """By transformers alone. The long text is one of several windows, of which research.bits_per_byte knows none."""
    model = AutoModelForCausalLM.from_pretrained(evaluated_run / "hf", dtype=torch.float32).eval()
    row = pick(read_metrics(evaluated_run))[-1]
    tokenizer, texts = build_bytes_tokenizer(), ["alpha beta", "été", "x"]
    bits, size = measure(model, cut(texts, tokenizer)), sum(len(text.encode()) - 1 for text in texts)
    assert row["evaluation/short/bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert row["evaluation/short/ce_loss"] == pytest.approx(bits * math.log(2) / size, rel=1e-5)
    assert row["evaluation/long/ce_loss"] / math.log(2) == pytest.approx(row["evaluation/long/bits_per_byte"], rel=1e-6)


@pytest.mark.long
def test_two_ranks_measure_as_one(workspace, asked, tmp_path, evaluated_run):
    """Under FSDP. The weights agree to rounding, so the losses do; shares of few questions may differ by one of them."""
    two = pick(fork_ranks(2, workspace, tmp_path / "two", **asked, training__gradient_accumulation_steps=1))
    for found, expected in zip(two, pick(read_metrics(evaluated_run)), strict=True):
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3 if name.endswith(("byte", "loss", "step")) else 0, abs=1 / 15)


# --- lm-eval on the exported model ---

TASKS: dict[str, list[Question]] = {
    "choices": make_questions(30, 4, seed=5),
    "long": make_questions(30, 4, seed=6, longest=30),  # whose contexts are cut
    "words": make_questions(30, 1, seed=7),
}


def write_lm_eval_task(folder: Path, name: str, questions: list[Question]) -> None:
    rows = [
        {
            "context": question.answers[0].context,
            "choices": [answer.continuation[1:] for answer in question.answers],
            "gold": question.gold,
        }
        for question in questions
    ]
    (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    has_choices = len(questions[0].answers) > 1
    metrics = ["acc", "acc_norm", "acc_bytes"] if has_choices else ["acc"]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice" if has_choices else "loglikelihood",
        "doc_to_text": "{{context}}",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "gold"} if has_choices else {"doc_to_target": " {{choices[0]}}"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.slow
def test_scores_are_those_of_lm_eval_on_the_exported_model(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    level, run = logging.getLogger().level, tmp_path / "run"
    files = [write_requests(tmp_path / f"{name}.jsonl", questions) for name, questions in TASKS.items()]
    tasks = ",".join(map(str, files))
    changes = {"evaluation__interval": 6, "evaluation__tasks": tasks, "optimizer__lr": 0.05, "checkpoint__export_hf": True}
    row = pick(run_here(workspace, run, **changes))[-1]
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, questions in TASKS.items():
        write_lm_eval_task(tmp_path, name, questions)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(run / "hf"), "dtype": "float32", "max_length": CONTEXT_LEN},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    logging.getLogger().setLevel(level)
    ours = {"acc": "accuracy", "acc_norm": "accuracy_per_char", "acc_bytes": "accuracy_per_byte"}
    for name, questions in TASKS.items():
        scores = {key.partition(",")[0]: value for key, value in results["results"][name].items()}
        if name == "words":
            assert row[f"evaluation/{name}/exact_match"] == pytest.approx(scores["acc"], abs=1e-3)
        else:
            for theirs, metric in ours.items():
                assert row[f"evaluation/{name}/{metric}"] == pytest.approx(scores[theirs], abs=1e-3), (name, metric)
        nats = num_bytes = 0.0
        for question, sample in zip(questions, results["samples"][name], strict=True):
            gold = question.answers[question.gold]
            nats -= sample["filtered_resps"][question.gold if len(question.answers) > 1 else 0][0]
            num_bytes += len((gold.context + gold.continuation).encode()) - len(gold.context.rstrip().encode())
        assert row[f"evaluation/{name}/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-3)


# --- completions ---

LOGGER = """
import json
from flame.logging.writers.base import MetricWriter

class Texts(MetricWriter):
    name = "texts"
    def __init__(self, run):
        self.path = run.folder / "texts.jsonl"
    def log(self, step, values):
        pass
    def log_texts(self, step, name, rows):
        with self.path.open("a") as file:
            file.write(json.dumps([step, name, rows]) + "\\n")
"""


def test_completions_are_logged_and_given_to_loggers(workspace, tmp_path, caplog):
    """They are those of the exported model. A run with prompts alone writes no row of metrics for them."""
    (tmp_path / "own_logger_texts.py").write_text(LOGGER)
    (tmp_path / "prompts.txt").write_text('alpha\n\nsaid "é"\n')
    run = tmp_path / "run"
    rows = run_here(
        workspace,
        run,
        evaluation__interval=2,
        evaluation__prompts=tmp_path / "prompts.txt",
        evaluation__completion_tokens=5,
        metrics__logger_path=tmp_path / "own_logger_texts.py",
        objective__name="next_token",
        training__steps=2,
        checkpoint__export_hf=True,
    )
    assert [row["step"] for row in rows] == [1, 2]
    (line,) = (run / "texts.jsonl").read_text().splitlines()
    step, name, texts = json.loads(line)
    assert (step, name) == (2, "completions") and [row["prompt"] for row in texts] == ["alpha", 'said "é"']
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32).eval(), build_bytes_tokenizer()
    for row in texts:
        ids = torch.tensor([list(row["prompt"].encode())])
        whole = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))[0]
        assert row["completion"] == tokenizer.backend_tokenizer.decode(whole[ids.shape[1] :].tolist())
        shown = [json.dumps(text, ensure_ascii=False) for text in (row["prompt"], row["completion"])]
        assert f"completion of {shown[0]}: {shown[1]}" in caplog.messages


@pytest.mark.parametrize(("content", "said"), [(b"\n \n", "has no prompt: write one a line"), (b"\xff\xfe\n", "cannot be read")])
def test_a_file_without_prompts_is_refused(workspace, tmp_path, capsys, content, said):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        changes = {"evaluation__prompts": tmp_path / "prompts.txt", "evaluation__completion_tokens": 4}
        run_here(workspace, tmp_path / "run", evaluation__interval=2, **changes)
    assert stop.value.code == 2 and capsys.readouterr().err.count(said) == 1


def test_completions_longer_than_the_context_are_refused(workspace, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("alpha")
    changes = {"evaluation__interval": 2, "evaluation__prompts": tmp_path / "prompts.txt", "evaluation__completion_tokens": 49}
    with pytest.raises(SystemExit):
        run_here(workspace, tmp_path / "run", **changes)
    expected = "evaluation.completion_tokens = 49 is above training.context_len = 48: lower it"
    assert capsys.readouterr().err.splitlines() == [expected]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": ""}\n', "has no usable text"),
        ('{"text": "x"}\n', "nothing of web can be scored: web: 1 held-out documents, 1 tokens"),
        ('{"text": [{"role": "user", "content": "x"}]}\n', "holds chats"),
    ],
)
def test_a_held_out_set_without_anything_to_score_is_refused(workspace, tmp_path, capsys, content, said):
    (tmp_path / "web.jsonl").write_text(content)
    changes = {"held_out__web__dataset": "json", "held_out__web__data_files": tmp_path / "web.jsonl"}
    with pytest.raises(SystemExit) as stop:
        run_here(workspace, tmp_path / "run", **changes, evaluation__interval=2)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and len(err.splitlines()) == 1


def test_a_held_out_set_of_token_ids_is_that_of_its_text(tmp_path):
    tokenizer, texts = build_bytes_tokenizer(), ["alpha été", "beta"]
    sets = []
    for name, values in (("texts", texts), ("ids", [[*text.encode(), tokenizer.eos_token_id] for text in texts])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
        corpus = HeldOut(dataset="json", data_files=str(tmp_path / f"{name}.jsonl"))
        kind = build_kind(corpus, f"held_out.{name}", lambda kind: kind())
        sets.append(HeldOutSet(kind.short_name, read_held_out(kind, corpus, tokenizer), tokenizer, 48))
    assert [each.name for each in sets] == ["texts", "ids"] and sets[0]._num_bytes == sets[1]._num_bytes == 13
    assert [[text.ids.tolist() for text in each.texts] for each in sets] == [[list(text.encode()) for text in texts]] * 2
