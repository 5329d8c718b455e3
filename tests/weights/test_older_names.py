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
from flame.weights.older_names import adapt_tokenizer, write_config
from tests.support.exports import build_model, make_checkpoint
from tests.support.families import TOYS, build_toy
from tests.support.weights import list_saved_buffers

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
UNSCALED = ("olmo", "olmo2")
"""Families for which transformers 4 rejects this scaling, by an error."""
UNSCALED_ATTENTION = ("deepseek_v2, lite",)
"""Families for which transformers 4 leaves out that yarn scales attention."""
HEAD_DIM = 32
"""Several rotary frequencies, even of a part of the head: a wrong base would show."""
PART = 0.5
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
    torch.testing.assert_close(found, torch.load(folder + "/logits.pt"), rtol=1e-5, atol=1e-5, msg=folder)
"""


def build_config(name: str, scaling: dict | None = None) -> PretrainedConfig:
    """A toy whose rotary settings are not the defaults; with Llama 3's scaling, or longrope for Phi-3, unless given."""
    config = build_toy(name, vocab_size=264, max_position_embeddings=2048, hidden_size=4 * HEAD_DIM, head_dim=HEAD_DIM)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return config
    main = rope.get("full_attention", rope)
    main["rope_theta"] = 54321.0
    if "partial_rotary_factor" in main:
        main["partial_rotary_factor"] = PART
    if main is not rope:
        rope["sliding_attention"]["rope_theta"] = 54321.0 if name in ONE_BASE else 1234.0
    if scaling is None and config.model_type == "phi3":
        config.original_max_position_embeddings = 64
        scaling = build_longrope(main)
    if name in UNSCALED_ATTENTION:
        del main["mscale_all_dim"]
    if main.get("rope_type", "default") == "default":
        main.update(({} if name in UNSCALED else SCALING) if scaling is None else scaling)
    return config


def build_longrope(rope: dict) -> dict:
    frequencies = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    factors = [1.0 + number / 8 for number in range(frequencies)]
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors[::-1],
        "original_max_position_embeddings": 64,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported folder of each family, with ids and the logits of transformers 5."""
    folders = {}
    for number, name in enumerate(TOYS):
        folder = tmp_path_factory.mktemp("family") / str(number)
        model = build_model(build_config(name)).eval()
        for correction in list_saved_buffers(model):
            correction.abs_()  # to a negative score, transformers 4 prefers an expert outside of the chosen groups
        convert(make_checkpoint(folder, model), folder / "hf")
        model.set_attn_implementation("eager")
        with torch.no_grad():
            torch.save(model(IDS).logits, folder / "hf" / "logits.pt")
        torch.save(IDS, folder / "hf" / "ids.pt")
        folders[name] = folder / "hf"
    return folders


@pytest.mark.long
def test_transformers_4_computes_the_same(exported, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "older"), *OLDER]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4.57 cannot be installed: no package index")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "older"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, *map(str, exported.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("scaling", [None, {}], ids=["scaled", "plain"])
@pytest.mark.parametrize("name", TOYS)
def test_transformers_5_reads_the_same_settings(tmp_path, name, scaling):
    """The older names change nothing for it."""
    config = build_config(name, scaling)
    assert write_config(config, tmp_path) == []
    found = AutoConfig.from_pretrained(tmp_path)
    expected = getattr(config, "rope_parameters", None)
    if name == "phi3" and scaling is None:
        expected = {"type": "longrope", **expected}  # another name of rope_type, which transformers 4 needs there
    assert getattr(found, "rope_parameters", None) == expected
    if expected:
        settings = json.loads((tmp_path / "config.json").read_text())
        assert settings["rotary_emb_base" if name == "gpt_neox" else "rope_theta"] == 54321.0
        assert settings["rope_scaling"] is not None or scaling == {} or name in UNSCALED


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("olmo2", {"rope_type": "linear", "factor": 2.0}, 'its olmo2 refuses rope_type "linear"'),
        ("phi3", {"attention_factor": 1.5}, "its phi3 refuses scaling beside the factors of longrope"),
        ("olmo3", {"rope_theta": 99.0}, "its sliding layers take rope_theta = 99.0 instead of 54321.0"),
        ("deepseek_v2, lite", {"mscale_all_dim": 0.7}, "its deepseek_v2 does not scale attention by mscale_all_dim = 0.7"),
        ("llama", {"rope_type": "longrope", "factor": 3.0}, "its longrope takes the factor 32 instead of 3.0"),
    ],
)
def test_what_transformers_4_cannot_express_is_said(tmp_path, caplog, name, changes, expected):
    config = build_config(name)
    rope = config.rope_parameters
    main = rope.get("full_attention", rope)
    if changes.get("rope_type") == "longrope":
        rope.clear()
        rope.update(build_longrope({}) | {"rope_theta": 54321.0})
    main.update(changes)
    convert(make_checkpoint(tmp_path, build_model(config)), tmp_path / "hf", check=False)
    (line,) = [message for message in caplog.messages if "transformers 4" in message]
    assert line == f"export {tmp_path}/hf: transformers 4 does not compute the same: {expected}; load it with transformers 5"
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters == rope


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
