"""Problems of reasoning-gym: by number, held out by construction, verified by the package. A stand-in of the package has one
small task; the last tests ask the package itself, where it is installed."""

from __future__ import annotations

import pickle
import random
import sys
from types import ModuleType

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from flame.config.data import Corpus
from flame.config.schema import JobConfig
from flame.data.batch import build_batch
from flame.data.document_streams import open_document_stream
from flame.data.documents import WHOLE, open_documents
from flame.data.packing import Packer
from flame.data.sources.registry import build_kind, is_from_hub
from flame.data.tasks import reasoning_gym
from flame.data.tasks.generated import HELD_OUT_EVERY
from flame.data.tasks.reasoning_gym import ReasoningGymOptions, is_held_out
from flame.data.tokenizer import build_bytes_tokenizer
from flame.errors import UserError
from flame.evaluation.measured import ProblemSet
from tests.support.options import MODEL, read_mistakes
from tests.support.runs import run_here

TOKENIZER = build_bytes_tokenizer()
PLANNING = ("countdown", "mini_sudoku", "maze", "knights_knaves", "tower_of_hanoi", "shortest_path")


class Sums:
    """Sums of two numbers below `below`. As in the package, a problem depends on seed + index, and partly right answers get a
    part of the score."""

    def __init__(self, seed: int, size: int, below: int = 1000):
        assert below > 1, "below must be above 1"
        self.seed, self.below = seed, below

    def __getitem__(self, index: int) -> dict:
        chooser = random.Random(self.seed + index)
        numbers = [chooser.randrange(self.below) for _ in range(2)]
        return {"question": f"{numbers[0]} + {numbers[1]} = ?", "answer": str(sum(numbers)), "metadata": {"sum": sum(numbers)}}

    def score_answer(self, answer: str, entry: dict) -> float:
        return 1.0 if int(answer) == entry["metadata"]["sum"] else 0.01


class Unanswered(Sums):
    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(index) | {"answer": None}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"sums": Sums, "unanswered": Unanswered}
    stand_in.create_dataset = lambda name, **settings: factory.DATASETS[name](**settings)
    monkeypatch.setitem(sys.modules, "reasoning_gym", stand_in)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda name: name)


def build(task: str = "sums", section: str = "training", settings: str = "", **options):
    job = JobConfig(extensions={"reasoning_gym": ReasoningGymOptions(**options)})
    return build_kind(Corpus(dataset=f"reasoning_gym:{task}", dataset_name=settings), section, job.get)


@pytest.mark.usefixtures("package")
def test_a_problem_is_a_function_of_seed_and_number():
    problems = build().open()
    texts = [problems.read(number) for number in range(50)]
    again = pickle.loads(pickle.dumps(problems))
    assert [again.read(number) for number in reversed(range(50))] == texts[::-1]
    assert build(seed=1).open().read(0) != texts[0] and len(set(texts)) > 45
    question, answer = texts[0].split(" = ?\nAnswer: ")
    assert sum(map(int, question.split(" + "))) == int(answer)


@pytest.mark.usefixtures("package")
def test_held_out_questions_are_never_trained_on():
    """Though there are few of them."""
    trained, validated, evaluated = (
        {source.make(number).prompt for number in range(400)}
        for source in (build(section=name, settings="below = 12").open() for name in ("training", "validation", "held_out.x"))
    )
    assert len(trained | validated) > 135 and not trained & validated and evaluated <= validated
    share = np.mean([is_held_out(f"question {number}") for number in range(4000)])
    assert share == pytest.approx(1 / HELD_OUT_EVERY, abs=0.02)


@pytest.mark.usefixtures("package")
def test_the_verifier_judges():
    problems = build(section="held_out.x").open()
    problem, other = problems.make(7), problems.make(8)
    assert problems.verify(problem, problem.answer) and problems.verify(problem, f" 0{problem.answer.strip()} ")
    assert not any(problems.verify(problem, wrong) for wrong in (problem.answer + "1", "", other.answer))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("loss_on", "problems"), [("answer", 0), ("all", 0), ("answer", 30)])
def test_answers_count_alone_if_that_is_asked(loss_on, problems):
    kind = build(problems=problems)
    documents = open_documents(kind, TOKENIZER, loss_on)
    assert len(documents) == problems or documents.name == "sums"
    stream = open_document_stream(documents, WHOLE, 0, 2, 3)
    separator = TOKENIZER.encode("=")[0] if loss_on == "answer" else None  # which questions have, too
    packer = Packer(stream, "sums", 0, 200, 100, separator)
    batch = build_batch(packer.next_sequence(packer.first_cursor), 0)
    counted = batch.labels[0][batch.labels[0] >= 0]
    if loss_on == "all":
        assert batch.num_labels == 200 - len(batch.documents)
        return
    texts = [kind.open().read(chunk.document) for chunk in batch.documents if chunk.is_last]
    expected = "".join(text.partition("Answer:")[2] + "|" for text in texts)
    assert bytes(ord("|") if token == TOKENIZER.eos_token_id else token for token in counted.tolist()).startswith(
        expected.encode()
    )


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("sum", "", "is no task of reasoning-gym: did you mean sums?"),
        ("sums", "below = 1", "the task refuses its settings (below must be above 1"),
        ("sums", "above = 1", "the task refuses its settings"),
        ("unanswered", "", "has problems without an answer to learn from"),
    ],
)
def test_mistakes_in_a_task_are_one_line(task, settings, said):
    with pytest.raises(UserError) as error:
        build(task, settings=settings).open()
    (line,) = error.value.lines
    assert said in line and line.startswith(f'training.dataset = "reasoning_gym:{task}"')


def test_mistakes_in_options_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda name: None)
    argv = [*MODEL, "--training.dataset", "reasoning_gym:maze", "--training.dataset_name", "size 3"]
    missing, settings, held_out = sorted(read_mistakes([*argv, "--validation.holdout_every=4"]), key=len)
    assert missing == 'training.dataset = "reasoning_gym:maze" needs the package reasoning-gym: pip install reasoning-gym'
    assert settings.startswith('training.dataset_name = "size 3": ') and "give settings of the task as in TOML" in settings
    assert "validation.holdout_every = 4 beside" in held_out
    (line,) = read_mistakes([*MODEL, "--training.dataset", "reasoning_gym"])
    assert line.startswith('training.dataset = "reasoning_gym" names no task: write training.dataset = "reasoning_gym:countdown"')
    assert not is_from_hub("reasoning_gym:maze")


@pytest.mark.usefixtures("package")
def test_a_run_trains_on_problems_and_lets_the_model_answer_held_out_ones(workspace, tmp_path):
    changes = {
        "training__dataset": "reasoning_gym:sums",
        "training__dataset_name": "below = 30",
        "training__data_files": None,
        "training__loss_on": "answer",
        "training__steps": 2,
        "evaluation__interval": 2,
        "held_out__sums__dataset": "reasoning_gym:sums",
        "held_out__sums__dataset_name": "below = 30",
        "held_out__sums__num_documents": 12,
        "objective__name": "next_token",
    }
    rows = run_here(workspace, tmp_path / "run", **changes)
    assert set(rows[-1]) == {"step", "evaluation/sums/bits_per_byte", "evaluation/sums/exact_match"}
    assert rows[-1]["evaluation/sums/bits_per_byte"] > 1


@pytest.mark.parametrize("task", PLANNING)
def test_the_planning_tasks_of_the_package_itself(task):
    pytest.importorskip("reasoning_gym")
    trained, held_out = build(task).open(), build(task, section="held_out.x").open()
    problems = [held_out.make(number) for number in range(5)]
    assert problems == [build(task, section="held_out.x").open().make(number) for number in range(5)]
    assert all(held_out.verify(problem, problem.answer) for problem in problems)
    assert not any(held_out.verify(problem, "nothing") for problem in problems)
    assert not {problem.prompt for problem in problems} & {trained.make(number).prompt for number in range(20)}


@pytest.mark.usefixtures("package")
def test_answers_of_the_model_are_judged_by_the_verifier():
    """Also another way of writing the sum; and the texts to score are the answers after their questions."""
    problems = build(section="held_out.x").open()
    solved = ProblemSet("x", problems, 4, TOKENIZER, 100)
    answers = [problems.make(number).answer for number in range(4)]
    given = [list(text.encode()) for text in (answers[0], " 0" + answers[1].strip(), answers[2] + "1", "")]
    assert solved.judge(given) == {"exact_match": 0.5}
    assert [bytes(text.ids[-text.num_scored :].tolist()).decode() for text in solved.texts] == answers
    assert [bytes(text.ids.tolist()).decode() for text in solved.texts] == [problems.read(number) for number in range(4)]
    assert ProblemSet("x", problems, 4, TOKENIZER, 12).num_cut == 4 and solved.num_cut == 0


@pytest.mark.usefixtures("package")
def test_training_reads_the_tokens_that_are_scored():
    """Also with a tokenizer that begins each text with a token, which belongs to the question alone."""
    tokenizer = build_bytes_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", 257)])
    kind = build(section="held_out.x")
    scored = ProblemSet("x", kind.open(), 20, tokenizer, 100).texts
    documents = open_documents(kind, tokenizer, "answer")
    for number, text in enumerate(scored):
        tokens, spans = documents.read(number)
        assert tokens.tolist() == [*text.ids.tolist(), tokenizer.eos_token_id]
        assert spans.tolist() == [[len(text.ids) - text.num_scored, len(tokens)]]
        assert tokens[0] == 257 and 257 not in tokens[1:]
