"""An exported folder means the same to transformers 4.57 as to transformers 5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from flame.data.tokenizer import build_bytes_tokenizer
from flame.weights.export import convert
from flame.weights.older_names import adapt_tokenizer
from tests.support.exports import build_model, make_checkpoint
from tests.support.families import TOYS, build_toy

OLDER = ["transformers>=4.57,<5", "huggingface_hub<1", "tokenizers>=0.22,<0.23.1"]
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.arange(300)[None] * 7 % 264
ONE_BASE = ("olmo3",)
"""Families that have one rotary base for all layers in transformers 4."""
UNSCALED = ("olmo2", "phi3")
"""Families for which transformers 4 rejects this scaling, by an error."""
READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4.57"), __version__
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a word").input_ids) == "a word" and tokenizer.eos_token == "<|endoftext|>"
    with torch.no_grad():
        found = model(torch.load(folder + "/ids.pt")).logits
    torch.testing.assert_close(found, torch.load(folder + "/logits.pt"), rtol=1e-5, atol=1e-6, msg=folder)
"""


def build_config(name: str) -> PretrainedConfig:
    """A toy whose rotary settings are not the defaults."""
    config = build_toy(name, vocab_size=264, max_position_embeddings=2048)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return config
    main = rope.get("full_attention", rope)
    main["rope_theta"] = 54321.0
    if main is not rope:
        rope["sliding_attention"]["rope_theta"] = 54321.0 if name in ONE_BASE else 1234.0
    if name not in UNSCALED:
        main.update(SCALING)
    return config


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported folder of each family, with ids and the logits of transformers 5."""
    folders = {}
    for number, name in enumerate(TOYS):
        folder = tmp_path_factory.mktemp("family") / str(number)
        model = build_model(build_config(name)).eval()
        convert(make_checkpoint(folder, model), folder / "hf")
        model.set_attn_implementation("eager")
        with torch.no_grad():
            torch.save(model(IDS).logits, folder / "hf" / "logits.pt")
        torch.save(IDS, folder / "hf" / "ids.pt")
        folders[name] = folder / "hf"
    return folders


@pytest.mark.slow
def test_transformers_4_computes_the_same(exported, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "older"), *OLDER]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4.57 cannot be installed: no package index")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "older"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, *map(str, exported.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_transformers_5_reads_the_same_settings(tmp_path):
    """The older names change nothing for it."""
    for number, name in enumerate(("llama", "gemma3", "qwen3_moe")):
        model = build_model(build_config(name))
        convert(make_checkpoint(tmp_path / str(number), model), tmp_path / str(number) / "hf", check=False)
        found = AutoConfig.from_pretrained(tmp_path / str(number) / "hf")
        assert found.rope_parameters == model.config.rope_parameters
        settings = json.loads((tmp_path / str(number) / "hf" / "config.json").read_text())
        assert settings["rope_theta"] == 54321.0 and settings["rope_scaling"] == SCALING


def test_nothing_of_this_machine_is_exported(tmp_path):
    tokenizer = build_bytes_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "is_local" in (tmp_path / "tokenizer_config.json").read_text()
    adapt_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & settings.keys()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path).encode("<|user|>") == tokenizer.encode("<|user|>") == [258]
