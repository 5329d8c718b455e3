"""Weights of Hugging Face folders and of checkpoints, streamed into models: families, ranks, new rows, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.models import WordLevel
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
)

from flame.checkpoints.manager import Checkpointer
from flame.config.check import find_conflicts
from flame.config.schema import ActivationCheckpoint, Checkpoint, JobConfig, Model
from flame.data.tokenizer import build_bytes_tokenizer
from flame.errors import UserError
from flame.trainer.setup import build_modules
from flame.weights import source as weight_source
from flame.weights.load import (
    check_config,
    find_rows,
    load_hf_weights,
    load_initial_weights,
    resize_vocabulary,
)
from flame.weights.source import INDEX_FILE, WEIGHTS_FILE, fetch_assets, find_weights
from tests.support.models import build_unsharded, future_config, shard, tiny_llama
from tests.support.ranks import run_on_ranks
from tests.support.weights import CONFIGS, assert_same_weights, build, build_on_meta_here, save_reference, tiny_moe

# ---------------------------------------------------------------- families


@pytest.mark.parametrize(("dtype", "shard_size"), [(torch.float32, "50GB"), (torch.bfloat16, "9KB")], ids=["one", "sharded"])
@pytest.mark.parametrize("family", CONFIGS)
def test_all_weights_are_those_that_transformers_reads(tmp_path, family, dtype, shard_size):
    reference = save_reference(tmp_path, family, dtype, shard_size)
    model = build(CONFIGS[family]())
    buffers = {name: buffer.clone() for name, buffer in model.lm.named_buffers()}
    source = find_weights(str(tmp_path))
    assert (len(source.files) > 3) == (shard_size == "9KB")
    lines = load_hf_weights(model, source)
    assert_same_weights(model.lm, reference)
    assert len(lines) == 1 and f" in {str(dtype).removeprefix('torch.')}, in {len(source.files)} file" in lines[0]
    is_tied = reference.get_input_embeddings().weight is reference.get_output_embeddings().weight
    assert (model.lm.get_input_embeddings().weight is model.lm.get_output_embeddings().weight) == is_tied
    for name, buffer in reference.named_buffers():
        assert torch.equal(model.lm.get_buffer(name), buffer)
        assert torch.equal(buffers[name], buffer) != (name in reference.state_dict()), "some are saved, others computed"


def test_the_prefix_of_the_base_model_may_be_missing_and_masks_may_be_there(tmp_path):
    """GPT-2 on the Hub: `h.0...` without `transformer.`, and the causal mask of each layer."""
    reference = save_reference(tmp_path, "gpt2")
    weights = {key.removeprefix("transformer."): value for key, value in load_file(tmp_path / WEIGHTS_FILE).items()}
    assert "h.0.ln_1.weight" in weights
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(2)}
    save_file(weights | masks, tmp_path / WEIGHTS_FILE)
    model = build(CONFIGS["gpt2"]())
    load_hf_weights(model, find_weights(str(tmp_path)))
    assert_same_weights(model.lm, reference)


def test_rotary_frequencies_in_old_files_are_not_taken(tmp_path):
    reference = save_reference(tmp_path, "llama-tied")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "model.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(load_file(tmp_path / WEIGHTS_FILE) | old, tmp_path / WEIGHTS_FILE)
    model = build(tiny_llama())
    load_hf_weights(model, find_weights(str(tmp_path)))
    assert_same_weights(model.lm, reference)
    assert torch.equal(model.lm.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


def test_a_tied_head_may_be_stored_twice_but_not_differently(tmp_path):
    reference = save_reference(tmp_path, "llama-tied")
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / WEIGHTS_FILE)
    model = build(tiny_llama())
    load_hf_weights(model, find_weights(str(tmp_path)))
    assert_same_weights(model.lm, reference)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match="other values, but tie_word_embeddings = true"):
        load_hf_weights(model, find_weights(str(tmp_path)))
    del weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": torch.ones(61, 32)}, tmp_path / WEIGHTS_FILE)
    load_hf_weights(model, find_weights(str(tmp_path)))
    assert (model.lm.model.embed_tokens.weight == 1).all()


# ---------------------------------------------------------------- ranks


@given(st.integers(0, 70), st.integers(1, 9))
def test_rows_of_a_shard_are_those_of_chunk(size, shards):
    chunks = torch.arange(size).chunk(shards)
    for index in range(shards):
        expected = chunks[index].tolist() if index < len(chunks) and size else []
        assert list(range(*find_rows(size, shards, index))) == expected


class Reads:
    """Bytes that are asked for, per tensor. Stands between the loader and safetensors' reader."""

    def __init__(self) -> None:
        self.bytes_by_key: dict[str, int] = {}

    def open(self, path: Path, framework: str) -> CountingFile:
        return CountingFile(safe_open(path, framework), self)

    def count(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes_by_key[key] = self.bytes_by_key.get(key, 0) + tensor.nbytes
        return tensor


class CountingFile:
    def __init__(self, file: Any, reads: Reads):
        self.keys, self._file, self._reads = file.keys, file, reads

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._reads.count(key, self._file.get_tensor(key))

    def get_slice(self, key: str) -> CountingSlice:
        return CountingSlice(key, self._file.get_slice(key), self._reads)


class CountingSlice:
    def __init__(self, key: str, part: Any, reads: Reads):
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype
        self._key, self._part, self._reads = key, part, reads

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._reads.count(self._key, self._part[rows])


def load_on_ranks(folder: Path, family: str, shape: tuple[int, ...], vocab_size: int = 61) -> tuple[dict[str, int], list[str]]:
    """Load sharded, compare with the unsharded weights, and tell how much was read."""
    reads = Reads()
    config = CONFIGS[family]()
    config.vocab_size = vocab_size
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "fsdp")[-len(shape) :])
    job = JobConfig(activation_checkpoint=ActivationCheckpoint(mode="full"))
    model = build_on_meta_here(config)
    shard(model, job, mesh)
    weight_source.safe_open = reads.open  # type: ignore[misc]
    lines = load_hf_weights(model, find_weights(str(folder)), resize=vocab_size > 61)
    weight_source.safe_open = safe_open  # type: ignore[misc]
    full = {name: t.full_tensor() for name, t in model.lm.state_dict().items()}
    alone = build(config)
    load_hf_weights(alone, find_weights(str(folder)), resize=vocab_size > 61)
    for name, tensor in alone.lm.state_dict().items():
        assert torch.equal(full[name], tensor), name
    return reads.bytes_by_key, lines


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama-tied", (2,)), ("llama-untied", (3,)), ("qwen3_moe", (2,)), ("qwen3_moe", (3,)), ("llama-tied", (2, 2))],
)
def test_each_rank_reads_its_own_rows(tmp_path, family, shape):
    """Experts are as many as do not divide; 61 rows are shared by two and three; HSDP holds each row twice."""
    folder = tmp_path / "model"
    reference = save_reference(folder, family, torch.bfloat16, "9KB")
    alone = build(CONFIGS[family]())
    load_hf_weights(alone, find_weights(str(folder)))
    assert_same_weights(alone.lm, reference)
    entries = find_weights(str(folder)).entries
    shards = shape[-1]
    ranks = torch.Size(shape).numel()
    read = run_on_ranks(ranks, folder, load_on_ranks, family, shape)
    whole = {key: entry.nbytes for key, entry in entries.items()}
    for found, _ in read:
        for key, count in found.items():  # an expert's own tensor is read whole, by the rank that has this expert
            rows = entries[key].shape[0]
            assert count <= (whole[key] if ".experts." in key else -(-rows // shards) * whole[key] // rows), key
        assert sum(found.values()) <= 1.25 * sum(whole.values()) / shards
    assert sum(sum(found.values()) for found, _ in read) == sum(whole.values()) * ranks / shards


def test_new_rows_are_the_same_on_any_number_of_ranks(tmp_path):
    """70 rows on three ranks: the last shard begins in the old rows; 200: the last two hold none of them."""
    folder = tmp_path / "model"
    save_reference(folder, "llama-untied")
    for vocab_size in (70, 200):
        for _, lines in run_on_ranks(3, folder, load_on_ranks, "llama-untied", (3,), vocab_size):
            assert sum(f"rows 61 to {vocab_size - 1} are new" in line for line in lines) == 2


# ---------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "phi"])
def test_new_tokens_start_at_the_mean(tmp_path, family, monkeypatch):
    reference = save_reference(tmp_path, family)
    monkeypatch.setattr("flame.weights.load.BUFFER_BYTES", 10 * 8 * 32)
    config = CONFIGS[family]()
    resize_vocabulary(config, 60, is_wanted=True)
    assert config.vocab_size == 61
    resize_vocabulary(config, 64, is_wanted=False)
    assert config.vocab_size == 61
    resize_vocabulary(config, 64, is_wanted=True)
    assert config.vocab_size == 64
    model = build(config)
    lines = load_hf_weights(model, find_weights(str(tmp_path)), resize=True)
    pairs = [(model.lm.get_input_embeddings().weight, reference.get_input_embeddings().weight)]
    pairs += [(model.lm.get_output_embeddings().weight, reference.get_output_embeddings().weight)]
    if family == "phi":
        pairs.append((model.lm.lm_head.bias, reference.lm_head.bias))
    for found, old in pairs:
        assert torch.equal(found[:61], old)
        assert torch.equal(found[61:], old.double().mean(0).float().expand(3, *old.shape[1:]))
    assert sum("rows 61 to 63 are new" in line for line in lines) == {"llama-tied": 1, "llama-untied": 2, "phi": 3}[family]
    with pytest.raises(UserError, match=r"\[61, 32\] instead of \[64, 32\].*model.resize_embeddings = true"):
        load_hf_weights(build(config), find_weights(str(tmp_path)))
    with pytest.raises(UserError, match="of another shape"):  # fewer rows than in the files are never meant
        load_hf_weights(build(tiny_llama(vocab_size=60)), find_weights(str(tmp_path)), resize=True)


# ---------------------------------------------------------------- the trainer's entry


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_config(path: Path, **future: Any) -> JobConfig:
    config = future_config(**future)
    config.checkpoint = Checkpoint(initial_load_path=str(path))
    return config


def test_the_log_tells_what_is_loaded_and_what_is_fresh(tmp_path, alone):
    reference = save_reference(tmp_path / "model", "llama-tied", torch.bfloat16, "9KB")
    config = run_config(tmp_path / "model", learnable_temperature=True)
    model = build_unsharded(config, tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    fresh = {name: tensor.clone() for name, tensor in model.objective.predictor.state_dict().items()}
    tokenizer = build_bytes_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"top_k": 7}')
    lines, generation = load_initial_weights(model, config.model, config.checkpoint, tokenizer)
    assert generation == {"top_k": 7}
    assert_same_weights(model.lm, reference)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.objective.predictor.state_dict().items())
    assert re.fullmatch(r'weights from checkpoint.initial_load_path = ".*": 20 tensors, 0.00 GiB in bfloat16, .*', lines[0])
    assert lines[1:3] == ["predictor starts fresh (parameters: 2176)", "estimator starts fresh (parameters: 1)"]
    assert lines[3].startswith("other than the weights were made with: rope_parameters = ") and len(lines) == 4
    vocabulary = {"a": 0, "b": 1}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"] = json.loads(WordLevel(vocabulary, "a").__getstate__())
    backend["added_tokens"] = []
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(backend))
    lines, generation = load_initial_weights(model, config.model, config.checkpoint, tokenizer)
    assert lines[-2].startswith("warning: 2 of the 2 tokens that the weights know have another id")
    assert lines[-1].startswith("generation_config.json is left out of exports") and generation == {}


def save_checkpoint(folder: Path, shape: tuple[int, ...], reference: Path) -> None:
    """Leave a committed step-1 of a sharded run with given weights."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "fsdp")[-len(shape) :])
    job = future_config()
    model = build_modules(job, tiny_llama(), "cpu")
    shard(model, job, mesh, seed=3)
    load_hf_weights(model, find_weights(str(reference)))

    class NoOptimizer:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"moment": torch.zeros(3)}

    write = model.lm.config.save_pretrained
    checkpointer = Checkpointer(folder, model, NoOptimizer(), 0, write, asynchronous=False)  # type: ignore[arg-type]
    checkpointer.save(1, {"step": 1, "config": {}})
    checkpointer.close()


def load_checkpoint(folder: Path, shape: tuple[int, ...], vocab_size: int, reference: Path) -> list[str]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp",))
    job = run_config(folder / "step-1")
    job.model.resize_embeddings = vocab_size > 61
    model = build_modules(job, tiny_llama(vocab_size=vocab_size), "cpu")
    shard(model, job, mesh)
    lines = load_initial_weights(model, job.model, job.checkpoint, build_bytes_tokenizer()).lines
    expected = AutoModelForCausalLM.from_pretrained(reference).state_dict()
    fresh = build_unsharded(job, tiny_llama(), seed=0)
    for name, tensor in model.lm.state_dict().items():
        full = tensor.full_tensor()
        assert torch.equal(full[: len(expected[name])], expected[name]), name
        if len(full) == vocab_size > 61:
            assert torch.equal(full[61:], expected[name].double().mean(0).float().expand(vocab_size - 61, -1))
    for name, tensor in model.objective.predictor.state_dict().items():
        assert torch.equal(tensor.full_tensor(), fresh.objective.predictor.state_dict()[name])
    return lines


@pytest.mark.parametrize(("saved", "loaded", "vocab_size"), [((2,), (3,), 61), ((2, 2), (2,), 66)])
def test_the_weights_of_a_checkpoint(tmp_path, saved, loaded, vocab_size):
    """Of another number of ranks, of HSDP, and into a larger vocabulary. Tied weights stay tied."""
    folder, reference = tmp_path / "run", tmp_path / "reference"
    save_reference(reference, "llama-tied")
    run_on_ranks(torch.Size(saved).numel(), folder, save_checkpoint, saved, reference)
    for lines in run_on_ranks(loaded[0], folder, load_checkpoint, loaded, vocab_size, reference):
        assert "float32" in lines[0] and any("predictor starts fresh" in line for line in lines)
        assert any("are new" in line for line in lines) == (vocab_size > 61)
    job = run_config(folder / "step-1")
    assert job.model_source == job.tokenizer_source == str(folder / "step-1" / "hf")
    assert run_config(tmp_path).model_source == str(tmp_path)
    job.model.config, job.model.tokenizer_path = "a", "b"
    assert (job.model_source, job.tokenizer_source) == ("a", "b")
    assert JobConfig().model_source == ""

    norm = load_file(reference / WEIGHTS_FILE)["model.norm.weight"][:4].numpy().tobytes()
    contents = {file: file.read_bytes() for file in (folder / "step-1").glob("*.distcp")}
    damaged = [file for file, content in contents.items() if norm in content]
    for file in damaged:
        file.write_bytes(contents[file].replace(norm, b"-" + norm[1:]))
    assert len(damaged) == 1
    source = find_weights(str(folder / "step-1"))
    refuse(lambda: source.verify(0, 1), "step-1", "is damaged")
    (folder / "step-1" / "trainer.json").unlink()
    refuse(lambda: find_weights(str(folder / "step-1")), "step-1", "not a complete checkpoint")


# ---------------------------------------------------------------- bad input


def refuse(action, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert len(caught.value.lines) == 1 and all(part in str(caught.value) for part in parts), str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_reference(folder, "llama-untied", torch.bfloat16, "9KB")
    return folder


@pytest.fixture
def copied(sharded, tmp_path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


LABEL = "checkpoint.initial_load_path = "


def test_folders_that_do_not_hold_the_weights(copied, tmp_path):
    files = sorted(copied.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-7])
    refuse(lambda: find_weights(str(copied)), LABEL, files[0].name, "cannot be read", "fetch it again")
    files[0].write_bytes(b"")
    refuse(lambda: find_weights(str(copied)), files[0].name, "0 bytes")
    files[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refuse(lambda: find_weights(str(copied)), files[0].name, "Git LFS pointer")
    files[0].unlink()
    refuse(lambda: find_weights(str(copied)), f"lacks 1 of the {len(files)} files", files[0].name)
    (copied / INDEX_FILE).write_text("{")
    refuse(lambda: find_weights(str(copied)), INDEX_FILE, "cannot be read")
    (copied / INDEX_FILE).write_text('{"weight_map": {}}')
    refuse(lambda: find_weights(str(copied)), INDEX_FILE, "lists no files")

    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(lambda: find_weights(str(empty)), LABEL, "holds no weights", WEIGHTS_FILE)
    (empty / "pytorch_model-00001-of-00002.bin").touch()
    refuse(lambda: find_weights(str(empty)), "pytorch_model-00001-of-00002.bin", "convert it", "save_pretrained")
    (empty / "adapter_model.safetensors").touch()
    refuse(lambda: find_weights(str(empty)), "adapter", "merge_and_unload")
    (empty / "step-4").mkdir()
    refuse(lambda: find_weights(str(empty)), "folder of checkpoints", "step-4")
    refuse(lambda: find_weights(str(copied / "config.json")), "is a file")
    refuse(lambda: find_weights(str(tmp_path / "nowhere")), "no such folder")
    refuse(lambda: find_weights("x" * 5000), "no such file or folder")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors"])
def test_an_index_cannot_name_files_elsewhere(copied, name):
    (copied / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refuse(lambda: find_weights(str(copied)), f'{INDEX_FILE} names "{name}"', "not in this folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    tensors = save_reference(tmp_path, "llama-tied").state_dict()
    stored = {name: tensor.double() for name, tensor in tensors.items() if name != "lm_head.weight"}
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(stored, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    model = build(CONFIGS["llama-tied"]())
    refuse(lambda: load_hf_weights(model, find_weights(str(tmp_path))), "model.layers.1.mlp.up_proj.weight holds 1 values", "NaN")


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_of_several_tensors_made_into_one_the_right_one_is_named(tmp_path, part):
    save_reference(tmp_path, "qwen3_moe")
    weights = load_file(tmp_path / WEIGHTS_FILE)
    key = f"model.layers.1.mlp.experts.2.{part}.weight"
    weights[key][1, 1] = float("nan")
    save_file(weights, tmp_path / WEIGHTS_FILE)
    refuse(lambda: load_hf_weights(build(tiny_moe()), find_weights(str(tmp_path))), f"{key} holds 1 values")


@pytest.mark.parametrize(("prefix", "wrapper"), [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")])
def test_a_wrapper_in_the_names_is_named(tmp_path, prefix, wrapper):
    tensors = save_reference(tmp_path, "llama-tied").state_dict()
    save_file({prefix + name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    model = build(CONFIGS["llama-tied"]())
    refuse(lambda: load_hf_weights(model, find_weights(str(tmp_path))), f'all names begin with "{prefix}"', wrapper)


def test_what_must_come_with_the_weights(tmp_path):
    save_reference(tmp_path / "hf", "llama-tied")
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "trainer.json").touch()

    def list_conflicts(path: Path, **model: str) -> list[str]:
        config = JobConfig(model=Model(**model), checkpoint=Checkpoint(initial_load_path=str(path)))
        return [line for line in find_conflicts(config) if "initial_load_path" in line]

    (line,) = list_conflicts(tmp_path / "hf")
    assert line.startswith(f'{LABEL}"{tmp_path / "hf"}" comes without a tokenizer') and "model.tokenizer_path" in line
    assert list_conflicts(tmp_path / "hf", tokenizer_path="bytes") == []
    (tmp_path / "hf" / "vocab.json").touch()
    assert list_conflicts(tmp_path / "hf") == []
    (tmp_path / "hf" / "config.json").unlink()
    (line,) = list_conflicts(tmp_path / "hf")
    assert "comes without a config.json" in line and "model.config" in line
    assert len(list_conflicts(tmp_path / "step-4")) == 2
    assert list_conflicts(tmp_path / "step-4", tokenizer_path="bytes", config="x/y") == []
    for step in (8, 16):
        (tmp_path / "run" / "checkpoint" / f"step-{step}").mkdir(parents=True)
        (tmp_path / "run" / "checkpoint" / f"step-{step}" / "trainer.json").touch()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        (line,) = list_conflicts(folder)
        assert "is a folder of checkpoints" in line and line.endswith('checkpoint/step-16"')


def test_weights_of_another_model(sharded, tmp_path):
    source = find_weights(str(sharded))
    refuse(lambda: check_config(source, CONFIGS["gpt2"]()), LABEL, 'model_type "llama" instead of "gpt2"', "model.config")
    refuse(
        lambda: check_config(source, tiny_llama(num_attention_heads=8, tie_word_embeddings=False)),
        "num_attention_heads = 4 instead of 8",
    )
    assert check_config(source, tiny_llama(tie_word_embeddings=False)) == []

    save_reference(tmp_path / "gpt2", "gpt2")
    heads = CONFIGS["gpt2"]()
    heads.num_attention_heads = 2
    refuse(lambda: check_config(find_weights(str(tmp_path / "gpt2")), heads), "n_head = 4 instead of 2")

    def load(**changes: Any) -> None:
        load_hf_weights(build(tiny_llama(tie_word_embeddings=False, **changes)), source)

    refuse(lambda: load(num_hidden_layers=3), "it lacks 9 tensors (model.layers.2.", ", ...)")
    refuse(lambda: load(num_hidden_layers=1), "does not know 9 tensors (model.layers.1.", ", ...)")
    refuse(lambda: load(intermediate_size=40), "of another shape are 6 tensors", "[48, 32] instead of [40, 32]")
    refuse(lambda: load_hf_weights(build(CONFIGS["gpt2"]()), source), "it lacks", "does not know")
    own = build(tiny_llama(tie_word_embeddings=False, num_hidden_layers=3))
    line = refuse(lambda: load_hf_weights(own, source, own_config=True), "its own config.json", "it lacks", "fetch the weights")
    assert "model.config" not in line
    moe = tmp_path / "moe"
    save_reference(moe, "qwen3_moe")
    weights = load_file(moe / WEIGHTS_FILE)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, moe / WEIGHTS_FILE)
    refuse(lambda: load_hf_weights(build(tiny_moe()), find_weights(str(moe))), "cannot be made into", "gate_up_proj")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats(tmp_path, dtype):
    save_reference(tmp_path, "llama-tied")
    weights = load_file(tmp_path / WEIGHTS_FILE)
    key = "model.layers.0.mlp.up_proj.weight"
    model = build(tiny_llama())
    before = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    save_file(weights | {key: weights[key].to(dtype)}, tmp_path / WEIGHTS_FILE)
    refuse(lambda: load_hf_weights(model, find_weights(str(tmp_path))), key, "quantised", "bfloat16")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.lm.state_dict().items())
    settings = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    refuse(lambda: check_config(find_weights(str(tmp_path)), tiny_llama()), "quantised")


def test_hub_names(sharded, tmp_path, monkeypatch):
    """What the Hub may answer, and which files are asked for. The client is replaced: there is no network in tests."""
    response = httpx.Response(403, request=httpx.Request("GET", "http://hub"))

    def answer(error: Exception):
        def raise_it(*arguments, **options):
            raise error

        return raise_it

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for error, part in (
        (GatedRepoError("gated", response=response), "hf auth login"),
        (RepositoryNotFoundError("404", response=response), "no such model on the Hub"),
        (
            LocalEntryNotFoundError("cannot find the appropriate snapshot folder for the specified revision on the local disk"),
            "no such file or folder here, and the Hub cannot be reached: check the name or the network",
        ),
        (OSError("word " * 50), "word w ...): check the name or the network"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", answer(error))
        refuse(lambda: find_weights("owner/name"), f'{LABEL}"owner/name"', part)
        refuse(lambda: fetch_assets("owner/name"), f'{LABEL}"owner/name"', part)
        fetch_assets(str(sharded))  # nothing is asked for a folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer(LocalEntryNotFoundError("offline")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(lambda: find_weights("owner/name"), "the Hub is not asked, since HF_HUB_OFFLINE is set: check the name")

    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    shutil.copytree(sharded, tmp_path / "hub")
    fetch_assets("owner/name")
    assert "config.json" in asked and not [name for name in asked if name.endswith(".safetensors")]
    find_weights("owner/name")
    assert {path.name for path in sharded.glob("*.safetensors")} <= set(asked) and INDEX_FILE in asked
    assert [pattern for pattern in asked if "*" in pattern and "safetensors" in pattern] == ["*_modules.safetensors"]
    shutil.rmtree(tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["pytorch_model.bin", "config.json"])
    refuse(lambda: find_weights("owner/name"), "pytorch_model.bin", "convert it")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", answer(OSError("offline")))
    refuse(lambda: find_weights("owner/name"), "not in the cache")
