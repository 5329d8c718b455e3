"""From a Hugging Face folder to a checkpoint and back, without holding the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.data.tokenizer import build_bytes_tokenizer
from flame.errors import UserError
from flame.weights import export
from flame.weights.load import load_hf_weights
from flame.weights.source import WEIGHTS_FILE, SafetensorsSource, find_weights
from flame.weights.tensors import read_model_tensors
from flame.weights.to_checkpoint import convert_to_checkpoint as convert
from tests.support.models import tiny_llama
from tests.support.paths import REPO
from tests.support.weights import CONFIGS, assert_same_weights, build, save_reference


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "qwen3_moe"])
def test_a_checkpoint_of_it_has_the_same_weights(tmp_path, family, capsys):
    reference = save_reference(tmp_path / "model", family, torch.bfloat16, "9KB")
    build_bytes_tokenizer().save_pretrained(tmp_path / "model")
    step = tmp_path / "converted" / "step-0"
    convert(str(tmp_path / "model"), step)
    assert not list(step.parent.glob("*.partial"))
    progress = capsys.readouterr().err
    assert f"{len(reference.state_dict())}/{len(reference.state_dict())}" in progress
    stored = read_model_tensors(step)
    assert stored.keys() == {f"lm.{name}" for name in reference.state_dict()}
    for name, tensor in reference.state_dict().items():
        assert stored[f"lm.{name}"].dtype == torch.bfloat16 and torch.equal(stored[f"lm.{name}"].float(), tensor)

    model = build(CONFIGS[family]())
    load_hf_weights(model, find_weights(str(step)))
    assert_same_weights(model.lm, reference)

    export.convert(step, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert_same_weights(back, reference)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) == 258


def test_settings_for_generation_that_no_export_could_load_are_refused(tmp_path):
    save_reference(tmp_path / "model", "llama-untied")
    (tmp_path / "model" / "generation_config.json").write_text('{"max_new_tokens": 0}')
    with pytest.raises(UserError, match=r"^--model = .*: generation_config\.json cannot be used"):
        convert(str(tmp_path / "model"), tmp_path / "step-0")
    assert not list(tmp_path.glob("step-0*"))


def test_one_tensor_is_held_at_a_time(tmp_path, monkeypatch):
    """A tensor that was read is gone, but for the last, when the next one is asked for."""
    save_reference(tmp_path / "model", "llama-untied")
    alive: set[int] = set()
    most = []
    read = SafetensorsSource.read

    class Held:
        def __init__(self, number: int):
            self.number = number
            alive.add(number)

        def __del__(self):
            alive.discard(self.number)

    def watch(source: SafetensorsSource, key: str, start: int, stop: int) -> Tensor:
        most.append(len(alive))
        tensor = read(source, key, start, stop)
        tensor.held = Held(len(most))  # type: ignore[attr-defined]
        return tensor

    monkeypatch.setattr(SafetensorsSource, "read", watch)
    convert(str(tmp_path / "model"), tmp_path / "step-0")
    assert len(most) == 21 and max(most) <= 1


@pytest.mark.slow
def test_mixed_dtypes_and_the_command_line(tmp_path):
    """Norms in float32 among bfloat16 weights keep their dtypes. A mistake is one line."""
    reference = save_reference(tmp_path / "model", "llama-tied", torch.bfloat16)
    weights = load_file(tmp_path / "model" / WEIGHTS_FILE)
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-6
    save_file(weights, tmp_path / "model" / WEIGHTS_FILE)
    command = [sys.executable, "-m", "flame.cli.convert_hf_to_dcp", "--out", str(tmp_path / "step-0"), "--model"]
    done = subprocess.run([*command, str(tmp_path / "model")], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'step-0'}\n", done.stderr
    stored = read_model_tensors(tmp_path / "step-0")
    assert torch.equal(stored["lm.model.norm.weight"], weights["model.norm.weight"])
    assert stored["lm.model.embed_tokens.weight"].dtype == torch.bfloat16
    assert len(stored) == len(reference.state_dict())


@pytest.mark.parametrize(
    ("model", "out", "part"),
    [
        ("model", "model", "must be a new folder with the name step-N"),
        ("model", "converted", "must be a new folder with the name step-N"),
        ("nowhere/at/all", "step-0", '--model = "'),
        ("other", "step-0", "its own config.json: it lacks"),
    ],
)
def test_mistakes(tmp_path, model, out, part):
    save_reference(tmp_path / "model", "llama-tied")
    save_reference(tmp_path / "other", "llama-tied")
    settings = tiny_llama(num_hidden_layers=3).to_dict()
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=part) as caught:
        convert(str(tmp_path / model), tmp_path / out)
    assert len(caught.value.lines) == 1 and not list(tmp_path.glob("step-*"))


def test_what_fails_while_writing_is_one_line(tmp_path, monkeypatch):
    save_reference(tmp_path / "model", "llama-tied")

    def refuse(error: Exception, out: Path, part: str) -> None:
        def fail(*arguments):
            raise error

        with monkeypatch.context() as patch, pytest.raises(UserError, match=part) as caught:
            patch.setattr(SafetensorsSource, "read", fail)
            convert(str(tmp_path / "model"), out)
        assert len(caught.value.lines) == 1 and not list(tmp_path.glob("step-*"))

    refuse(OSError(28, "No space left on device"), tmp_path / "step-0", "disk is full")
    refuse(UserError("the shard is damaged"), tmp_path / "step-0", "the shard is damaged")
    refuse(AssertionError(), Path("/proc/nowhere/step-0"), "cannot be written")
