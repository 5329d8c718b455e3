"""Model cards: what Hugging Face reads in them, what people read, and what must not be in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli
import torch
import transformers
from huggingface_hub import ModelCard

from flame.config.schema import JobConfig, Source
from flame.objectives.future.options import FutureOptions, PredictorOptions
from flame.objectives.mtp.options import MultiTokenOptions
from flame.objectives.step import get_objective
from flame.weights.card import write_card
from flame.weights.export import name_objective_file
from tests.support.models import build_unsharded

ROWS = [
    {"step": 2, "loss": 9.5, "ce_loss": 9.0},
    {"step": 2, "validation_loss": 8.5},
    {"step": 4, "loss": 3.25, "ce_loss": 3.125},
    {"step": 4, "validation_loss": 3.5, "validation_ce_loss": 3.375},
    {"step": 6, "loss": 1.0, "ce_loss": 1.0},
]


def make_state(config: JobConfig, **counters: object) -> dict:
    """As it comes out of `trainer.json`."""
    objective = get_objective(build_unsharded(config))
    state = {
        "step": 4,
        "config": config.to_dict(),
        "objective": None
        if objective is None
        else {"name": objective.name, "description": objective.describe_training(), "modules": objective.describe_modules()},
        "counters": {"tokens_seen": 123456, "tokens_by_source": {}, **counters},
        "model_config": {"model_type": "llama"},
    }
    return json.loads(json.dumps(state))


def read_front_matter(text: str) -> dict:
    return ModelCard(text, ignore_metadata_errors=False).data.to_dict()


def write(tmp_path: Path, config: JobConfig, rows: list[dict] = ROWS, **counters: object) -> str:
    """A card of step 4, in a run folder that has been moved since."""
    run = tmp_path / "moved"
    checkpoint = run / "checkpoint" / "step-4"
    checkpoint.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    if config.objective.name:
        (tmp_path / "hf" / name_objective_file(config.objective.name)).touch()
    write_card(tmp_path / "hf" / "README.md", make_state(config, **counters), checkpoint, 1_234_567, "bfloat16")
    return (tmp_path / "hf" / "README.md").read_text()


@pytest.fixture
def config() -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = "/home/someone/secret/runs/small-llama"
    config.job.description = "A small one,\nfor a test"
    config.model.config = "~/secret/models/llama.json"
    config.model.tokenizer_path = "../secret/tokenizer/"
    config.training.steps = 10
    return config


def test_hugging_face_reads_the_front_matter(tmp_path, config):
    config.sources = {
        "web": Source(dataset="someone/web", dataset_name="en", weight=3.0),
        "own": Source(dataset="json", data_files="/secret/data/*.jsonl, /secret/more/b.jsonl", weight=1.0),
    }
    config.objective.name = "future"
    text = write(tmp_path, config, tokens_by_source={"web": 99, "own": 33})
    assert read_front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "future-objective"],
        "datasets": ["someone/web"],
    }
    assert "| web | someone/web en | train | 75.0% | 99 |" in text
    assert "| own | json *.jsonl,b.jsonl | train | 25.0% | 33 |" in text


def test_people_read_what_was_trained(tmp_path, config):
    text = write(tmp_path, config)
    assert "\n# small-llama\n\nA small one, for a test\n" in text
    assert "with 1.2M parameters (bfloat16), after step 4 of 10 and 123,456 tokens" in text
    assert "| metric | training, step 4 | validation, step 4 |" in text
    assert "| loss | 3.2500 | 3.5000 |" in text and "| ce_loss | 3.1250 | 3.3750 |" in text
    assert "Trained on next-token prediction alone." in text and "_modules" not in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and f"transformers {transformers.__version__}" in text
    assert "datasets" not in read_front_matter(text)  # the data was local


def test_the_future_loss_is_told(tmp_path, config):
    config.objective.name = "future"
    config.get(FutureOptions).loss_weight = 0.25
    config.get(PredictorOptions).head_type = "gated"
    text = write(tmp_path, config)
    assert 'infonce, gated predictor, loss_weight 0.25, target "self", target_shift 1' in text
    assert "`future_modules.safetensors` holds the modules that predicted summaries" in text


def test_what_is_left_out_of_the_loss_is_told(tmp_path, config):
    config.objective.name = "mtp"
    config.get(MultiTokenOptions).every = 4
    assert 'beside it, "mtp": loss_weight 1.0, every 4, draw_step False, keep_mean_weight False, tokens' in write(
        tmp_path, config
    )


def test_another_objective_is_told(tmp_path, config):
    config.objective.name = "mtp"
    config.get(MultiTokenOptions).tokens = 3
    text = write(tmp_path, config)
    assert 'beside it, "mtp": loss_weight 1.0, tokens 3' in text and "summary of its own future" not in text
    assert '`mtp_modules.safetensors` holds the modules of "mtp"' in text and "predictor.*" not in text


def test_a_card_without_metrics(tmp_path, config):
    assert "| metric |" not in write(tmp_path, config, rows=[])
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    write_card(tmp_path / "card.md", make_state(config), tmp_path / "moved" / "checkpoint" / "step-4", 1, "float32")
    assert "## Training" in (tmp_path / "card.md").read_text()


def test_a_checkpoint_that_has_been_copied_elsewhere(tmp_path, config):
    """Whose metrics lie there?"""
    copies = tmp_path / "elsewhere"
    copies.mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 7.5}) + "\n")
    for copied in (copies / "step-4", Path("/step-4")):
        write_card(tmp_path / "card.md", make_state(config), copied, 1, "float32")
        text = (tmp_path / "card.md").read_text()
        assert "## Training" in text and "| metric |" not in text


def test_no_path_of_the_machine_is_published(tmp_path, config):
    config.training.data_files = "/secret/a.txt,/secret/dir/b*.txt"
    config.checkpoint.initial_load_path = "/secret/weights/step-9"
    config.checkpoint.export_to = "ftp://user:secret@host/run"
    text = write(tmp_path, config)
    assert "secret" not in text and str(tmp_path) not in text
    options = tomli.loads(text.split("````toml\n")[1].split("````")[0])
    assert options["job"]["dump_folder"] == "small-llama"
    assert options["model"] == asdict(config.model) | {"config": "llama.json", "tokenizer_path": "tokenizer"}
    assert options["training"]["data_files"] == "a.txt,b*.txt"
    assert options["checkpoint"]["initial_load_path"] == "step-9"
    assert options["checkpoint"]["export_to"] == "ftp://host/run"
    assert options["optimizer"] == asdict(config.optimizer)


def test_strange_text_stays_text(tmp_path, config):
    """In a description or a source's name: it ends no table, front matter or block of options."""
    config.job.description = '---\n"quoted" ```</details> \x7f é'
    config.sources = {"a|b": Source(dataset="someone/a|b", data_files="x```y")}
    text = write(tmp_path, config)
    assert read_front_matter(text)["datasets"] == ["someone/a|b"]
    assert "| a\\|b | someone/a\\|b" in text
    options = tomli.loads(text.split("````toml\n")[1].split("````")[0])
    assert options["job"]["description"] == config.job.description
    assert options["sources"]["a|b"]["data_files"] == "x```y"


@pytest.mark.parametrize(
    ("family", "custom", "package"),
    [("llama", "", ""), ("own", "/secret/my_model/", "my_model"), ("own", "my_model.py", "my_model"), ("gla", "", "fla.models")],
)
def test_what_must_be_imported_to_load_it(tmp_path, config, family, custom, package):
    config.experimental.custom_model_path = custom
    state = make_state(config) | {"model_config": {"model_type": family}}
    write_card(tmp_path / "card.md", state, tmp_path / "step-4", 1, "float32")
    code = (tmp_path / "card.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.startswith(f"import {package}  #" if package else "from transformers import")


def test_a_converted_model_has_a_card_without_a_run(tmp_path):
    """The checkpoint of `flame.cli.convert_hf_to_dcp` knows of no options and no tokens."""
    state = {"step": 0, "config": {}, "model_config": {"model_type": "gpt2"}, "world_size": 1}
    write_card(tmp_path / "README.md", state, tmp_path / "step-0", 1_000_000, "float32")
    text = (tmp_path / "README.md").read_text()
    assert read_front_matter(text)["tags"] == ["gpt2"]
    assert "`gpt2` with 1.0M parameters (float32)." in text
    assert "## Training" not in text and "<details>" not in text
