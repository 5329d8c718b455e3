"""Keys of a model's configuration that its class does not have: misspelt ones are refused, others told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from transformers import AutoConfig

from flame.attention.families import FAMILIES
from flame.attention.fla_families import TESTED, register_fla_family
from flame.errors import UserError
from flame.models.causal_lm import load_model_config
from flame.models.config_keys import list_unknown_keys
from tests.support.models import tiny_llama
from tests.support.paths import REPO
from tests.support.runs import run_here

FILES = sorted((REPO / "configs" / "models").glob("*.json"))

# As the Hub has them.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.0,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
FROM_HUB = {
    "Llama-3.2": (LLAMA, []),
    "SmolLM2": (
        LLAMA | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        ["is_llama_config", "rope_interleaved", "transformers.js_config"],
    ),
    "Qwen3": (QWEN3, []),
    "Mistral": (MISTRAL, []),
    "Gemma 3": (GEMMA3, []),
    "Pythia": (GPT_NEOX, []),
    "GPT-2": (GPT2, ["n_ctx", "task_specific_params"]),
}


def write(folder: Path, settings: dict) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("name", FROM_HUB)
def test_configurations_of_the_hub_are_taken(tmp_path, name):
    settings, unknown = FROM_HUB[name]
    assert list_unknown_keys(load_model_config(write(tmp_path, settings))) == unknown


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_configurations_of_this_repository_have_no_unknown_key(file):
    assert list_unknown_keys(load_model_config(str(file))) == []


@pytest.mark.parametrize("family", [*FAMILIES, *sorted(TESTED)])
def test_all_that_a_family_writes_it_knows(tmp_path, family):
    register_fla_family(family)
    settings = AutoConfig.for_model(family).to_dict() | {"use_l2warp": False}
    dropped = {key: 0.0 for key in settings if key.endswith("_pdrop")}
    needed = {"num_experts_per_tok": 2, "n_routed_experts": 4}
    chosen = {key: number for key, number in needed.items() if settings.get(key, 0) is None}
    found = load_model_config(write(tmp_path, settings | dropped | chosen))
    assert list_unknown_keys(found) == ([] if hasattr(AutoConfig.for_model(family), "use_l2warp") else ["use_l2warp"])


@pytest.mark.parametrize(
    ("settings", "misspelt", "meant"),
    [
        (LLAMA, "num_hiden_layers", "num_hidden_layers"),
        (LLAMA, "hidden-size", "hidden_size"),
        (LLAMA, "rope_thetta", "rope_theta"),
        (LLAMA, "rms_norm_epsilon", "rms_norm_eps"),
        (LLAMA, "torch_dtyp", "torch_dtype"),
        (QWEN3, "sliding_windw", "sliding_window"),
        (GPT2, "n_layers", "n_layer"),
        ({"model_type": "gpt2", **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)}, "hiden_size", "hidden_size"),
        ({"model_type": "gla", "num_heads": 4}, "expand_kk", "expand_k"),
    ],
)
def test_a_misspelt_key_is_refused(tmp_path, settings, misspelt, meant):
    others = {key: value for key, value in settings.items() if key != meant}
    with pytest.raises(UserError) as refusal:
        load_model_config(write(tmp_path, others | {misspelt: 1}))
    (line,) = refusal.value.lines
    family = settings["model_type"]
    assert line.startswith(f'model.config = "{tmp_path}": {misspelt} = 1: model_type "{family}" ')
    assert line.endswith(f" has no such key, did you mean {meant}? Put it right, or leave it out")


def test_beside_the_key_that_it_is_like_it_is_one_of_its_own(tmp_path):
    found = load_model_config(write(tmp_path, GPT2 | {"hidden_sizes": 7, "n_layers": 7}))
    assert list_unknown_keys(found) == ["hidden_sizes", "n_ctx", "n_layers", "task_specific_params"]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({}, []),
        (
            {"num_blocks": 3, "unsloth_version": "x"},
            [
                "the model's configuration has keys that LlamaConfig lacks, and that most likely nothing reads: "
                "num_blocks, unsloth_version"
            ],
        ),
    ],
    ids=["none", "some"],
)
def test_unknown_keys_are_told_at_the_start(workspace, tmp_path, caplog, extra, told):
    model = write(tmp_path, tiny_llama(vocab_size=264).to_dict() | extra)
    with caplog.at_level(logging.INFO, "flame"):
        run_here(workspace, tmp_path / "run", model__config=model, training__steps=1)
    assert [record.getMessage() for record in caplog.records if "LlamaConfig" in record.getMessage()] == told
