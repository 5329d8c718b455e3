"""flame-leak-check, on models that leak and on such that do not."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM

from flame.cli.leak_check import main
from tests.support.families import build_toy

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "tiny_transformer"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def write(folder: Path, config) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    return str(path)


def rows(printed: str) -> dict[tuple[str, str], str]:
    """Of the table: what was found, by pass and question."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in printed.splitlines()]
    return {(line[0], line[1]): line[2] for line in lines if len(line) == 4 and line[0] != "pass"}


@pytest.mark.parametrize("attention", [[], ["--attn", "eager"]])
def test_a_model_without_leak_ends_with_0(tmp_path, capsys, attention):
    assert main([write(tmp_path, build_toy("llama")), "--device", "cpu", *attention]) == 0
    printed = capsys.readouterr().out
    found = rows(printed)
    assert len(found) == 10 and set(found.values()) == {"no"}
    assert printed.splitlines()[-1].startswith("no leak under document masks, in either direction; none in its plain forward")


@pytest.mark.parametrize("flags, code", [([], 0), (["--plain"], 1)])
def test_a_plain_forward_that_leaks_is_said(tmp_path, capsys, flags, code):
    """OPT takes positions and no boundaries from position_ids."""
    config = AutoConfig.for_model("opt", **SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=128)
    assert main([write(tmp_path, config), "--device", "cpu", *flags]) == code
    printed = capsys.readouterr().out
    found = rows(printed)
    assert {question: answer for (name, question), answer in found.items() if name.startswith("plain")} == {
        "tokens change states of other documents": "YES",
        "tokens change states on the wrong side of them": "no",
        "a document's states depend on its place": "YES",
    }
    assert {answer for (name, _), answer in found.items() if not name.startswith("plain")} == {"no"}
    assert printed.splitlines()[-1].endswith("its plain forward with position_ids alone LEAKS")


def test_a_model_that_takes_no_mask_ends_with_1(tmp_path, capsys, monkeypatch):
    """The same family, deaf: its attention drops the mask."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    assert main([write(tmp_path, build_toy("llama")), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    found = rows(printed)
    assert found["causal, documents masked", "tokens change states of other documents"] == "YES"
    assert found["anti-causal, documents masked", "tokens change states on the wrong side of them"] == "YES"
    assert printed.splitlines()[-1].startswith("LEAK under document masks")


def test_states_that_are_not_the_models_own_end_with_1(tmp_path, capsys, monkeypatch):
    """The same family, but with other states under a mask. The library rejects it too."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def louder(self, *args, attention_mask=None, **kwargs):
        output, weights = forward(self, *args, attention_mask=attention_mask, **kwargs)
        return (output if attention_mask is None else 2 * output), weights

    monkeypatch.setattr(LlamaAttention, "forward", louder)
    assert main([write(tmp_path, build_toy("llama")), "--device", "cpu"]) == 1
    assert "no leak under document masks, but the states are not the model's own" in capsys.readouterr().out


def test_a_model_that_cannot_be_masked_ends_with_1(tmp_path, capsys):
    assert main([write(tmp_path, AutoConfig.for_model("bloom", **SMALL, n_layer=2)), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "note: the passes of flame are refused for it" in printed
    assert printed.splitlines()[-1].startswith("LEAK not excluded, since it cannot be run under a document mask")


def test_folders_with_weights_windows_and_custom_code(tmp_path, capsys):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build_toy("gemma3")).save_pretrained(tmp_path / "gemma")
    assert main([str(tmp_path / "gemma"), "--window_k", "2", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert "Gemma3ForCausalLM" in capsys.readouterr().out
    assert main([str(EXAMPLE), "--custom_model_path", str(EXAMPLE), "--device", "cpu"]) == 0
    assert "TinyTransformerForCausalLM" in capsys.readouterr().out


MISTAKES = {
    "no such place": (["nowhere/at/all"], "no such file or folder here"),
    "a negative window": (["config.json", "--window_k", "-5"], "--window_k = -5"),
    "unknown attention": (["config.json", "--attn", "psychic"], "cannot be loaded"),
    "unknown device": (["config.json", "--device", "abacus"], "cannot be loaded"),
    "no such code": (["config.json", "--custom_model_path", "nowhere"], "does not exist"),
    "unknown family": (["unknown.json"], "neither transformers nor flash-linear-attention has this model_type"),
    "recurrent on a CPU": (["gla.json"], "cannot be run on this machine"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_ends_with_2(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, build_toy("llama"))
    (tmp_path / "unknown.json").write_text('{"model_type": "unheard_of"}')
    (tmp_path / "gla.json").write_text(json.dumps({"model_type": "gla", **SMALL, "num_heads": 2}))
    arguments, message = MISTAKES[case]
    assert main([*arguments] if "--device" in arguments else [*arguments, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize("name", ["nosuch.json", "/nosuch.json", "~/nosuch/model", "s3://bucket/model"])
def test_a_path_that_is_nothing_is_not_asked_of_the_hub(name, capsys, monkeypatch):
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda *_, **__: pytest.fail("asked"))
    assert main([name, "--device", "cpu"]) == 2
    error = f'MODEL = "{name}": no such file or folder here: give a folder, a JSON configuration or a Hub name'
    assert capsys.readouterr().err.splitlines() == [error]


def test_a_name_that_is_nothing_is_one_line_without_retries(capsys, monkeypatch):
    """transformers asks the Hub for half a minute, and speaks of its connection alone."""

    def refuse(name: str, allow_patterns: list[str]) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
        raise RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda *_, **__: pytest.fail("asked"))
    for more in ([], ["--trust_remote_code"], ["--random_weights"]):
        assert main(["nothere", "--device", "cpu", *more]) == 2
        error = 'MODEL = "nothere": no such file or folder here, and no such model on the Hub: check the name, or log in'
        assert capsys.readouterr().err.splitlines() == [error]
