"""Exported folders against transformers' own `save_pretrained`, and what happens when an export goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from flame.checkpoints.manager import HF_FOLDER
from flame.checkpoints.manifest import digest_file
from flame.cli.convert_dcp_to_hf import main
from flame.config.run import Checkpoint
from flame.data.tokenizer import build_bytes_tokenizer
from flame.errors import UserError
from flame.weights import export as hf_export
from flame.weights import files as hf_files
from flame.weights import replacing as hf_replacing
from flame.weights.check import ExportMismatch
from flame.weights.export import convert, name_objective_file
from flame.weights.exporter import Exporter
from flame.weights.tensors import ModelTensors
from flame.weights.to_checkpoint import convert_to_checkpoint
from tests.support.checkpoints import age, edit_state
from tests.support.exports import build_model, make_checkpoint
from tests.support.families import build_toy
from tests.support.models import tiny_llama
from tests.support.ranks import PROCESSES

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 264,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama, tied": lambda: tiny_llama(vocab_size=264),
    "llama, untied": lambda: tiny_llama(vocab_size=264, tie_word_embeddings=False, attention_bias=True),
    "gpt2": lambda: GPT2Config(vocab_size=264, n_positions=16, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "olmo2": lambda: Olmo2Config(**SMALL, num_key_value_heads=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**GROUPED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "gpt_oss": lambda: build_toy("gpt_oss", vocab_size=264),
    "deepseek_v2": lambda: build_toy("deepseek_v2", vocab_size=264),
    "deepseek_v3": lambda: build_toy("deepseek_v3", vocab_size=264),
}

OWN_ARCHITECTURE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_architecture_of_a_test"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

AutoConfig.register("own_architecture_of_a_test", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "run", build_model(tiny_llama(vocab_size=264)), weight=torch.ones(2, 3))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


WHOLE, SHARDS = 10**9, 40_000
"""Bytes of a file at most."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_what_save_pretrained_writes(tmp_path, family):
    """Names, shapes, bytes and configuration; in one file and in many, which is the same in either type."""
    whole = build_model(FAMILIES[family]())
    checkpoint = make_checkpoint(tmp_path / "run", whole)
    whole.save_pretrained(tmp_path / "whole")  # read back, since transformers keeps some tensors in float32
    cases: list[tuple[Literal["float32", "bfloat16"], int]] = [("float32", WHOLE), ("bfloat16", SHARDS)]
    for dtype, max_shard_bytes in [*cases, ("float32", SHARDS), ("bfloat16", WHOLE)] if family == "mixtral" else cases:
        expected_folder, out = tmp_path / f"expected {dtype}", tmp_path / f"{dtype} {max_shard_bytes}"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
        model.save_pretrained(expected_folder)
        expected = read_weights(expected_folder)
        convert(checkpoint, out, dtype, max_shard_bytes=max_shard_bytes)
        assert_same_weights(read_weights(out), expected)
        files = sorted(out.glob("model*.safetensors"))
        assert (len(files) == 1) == (max_shard_bytes == WHOLE)
        assert all(path.stat().st_size < max_shard_bytes + 10_000 for path in files)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        for name, file in index["weight_map"].items():
            with safe_open(out / file, "pt") as shard:
                assert name in shard.keys()  # noqa: SIM118 - it is no dictionary
                assert shard.metadata() == {"format": "pt", "producer": "flame"}
        settings, expected_settings = (json.loads((path / "config.json").read_text()) for path in (out, expected_folder))
        assert {key: settings[key] for key in expected_settings} == expected_settings
        read = type(model.config).from_pretrained(out).to_dict()  # with older names beside these, which mean the same
        meant = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
        assert {key: read[key] for key in meant} == meant
        generation = [json.loads((path / "generation_config.json").read_text()) for path in (out, expected_folder)]
        assert generation[0] == generation[1]


def test_logits_are_those_that_were_trained(tmp_path, checkpoint):
    """An independent look at what the export has checked itself."""
    model = build_model(tiny_llama(vocab_size=264)).eval()
    input_ids = torch.arange(40)[None] * 5 % 264
    names: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    for name in names:
        dtype, out = getattr(torch, name), tmp_path / name
        convert(checkpoint, out, name)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert loaded.dtype == dtype
        with torch.no_grad():
            difference = (loaded(input_ids).logits - model(input_ids).logits).abs().max()
        assert difference == 0 if dtype == torch.float32 else 0 < difference < 0.3
    assert torch.equal(load_file(tmp_path / "float32" / name_objective_file("future"))["predictor.weight"], torch.ones(2, 3))


def test_the_exported_tokenizer_needs_none_of_our_code(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "hf")
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(t('é')['input_ids'], t.decode(t(' a\\n b')['input_ids']) == ' a\\n b', 'flame' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("[195, 169] True False")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id, int)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_export_does_not_appear(tmp_path, checkpoint, monkeypatch, dtype):
    """One weight is changed on its way to the disk; the old export stays."""
    out = tmp_path / "hf"
    convert(checkpoint, out)
    before = read_weights(out)
    honest = hf_files.stream_weights

    def lie(*arguments):
        for tensors in honest(*arguments):
            yield {name: tensor * 1.01 if name.endswith("1.mlp.up_proj.weight") else tensor for name, tensor in tensors.items()}

    monkeypatch.setattr(hf_export, "stream_weights", lie)
    with pytest.raises(ExportMismatch, match="gives other logits than the checkpoint"):
        convert(checkpoint, out, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    assert_same_weights(read_weights(out), before)
    convert(checkpoint, out, dtype, check=False)
    assert not torch.equal(
        read_weights(out)["model.layers.1.mlp.up_proj.weight"].float(), before["model.layers.1.mlp.up_proj.weight"]
    )


def test_a_weight_that_the_model_lacks_is_no_success(tmp_path, checkpoint, monkeypatch):
    real = hf_export.write_weights

    def leave_out(folder, layout, weights, max_shard_bytes):
        name = "model.layers.0.mlp.up_proj.weight"
        layout.on_disk.pop(name)
        real(folder, layout, ({n: t for n, t in part.items() if n != name} for part in weights), max_shard_bytes)

    monkeypatch.setattr(hf_export, "write_weights", leave_out)
    with pytest.raises(ExportMismatch, match=r"missing keys: \['model.layers.0.mlp.up_proj.weight'\]"):
        convert(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def export_and_die(checkpoint: Path, out: Path) -> None:
    honest = hf_export.stream_weights

    def stream(*args):
        for number, part in enumerate(honest(*args)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

    hf_export.stream_weights = stream
    convert(checkpoint, out, "bfloat16")


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path, checkpoint):
    """Killed in the middle of the weights, over an older export: that is still there, and the next export cleans up."""
    out = tmp_path / "hf"
    convert(checkpoint, out)
    process = PROCESSES.Process(target=export_and_die, args=(checkpoint, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf.flame-export.partial", "run"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    (out / "vocab.txt").write_text("of the old export")
    convert(checkpoint, out, "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (out / "vocab.txt").exists()


DELETES = "and an export would delete it: move it away, or name another folder"


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_rejected(checkpoint: Path, out: Path, fault: str) -> None:
    """One line, and everything stays as it was."""
    before = read_all(out)
    with pytest.raises(UserError) as refusal:
        convert(checkpoint, out)
    assert str(refusal.value) == f'"{out}" holds {fault}, {DELETES}'
    assert read_all(out) == before and not list(out.parent.glob("*.flame-export.*"))


def set_aside_mark(folder: Path) -> None:
    """Weights as others write them, and as exports were before they said who wrote them."""
    for path in folder.glob("model*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})


def test_a_folder_of_something_else_is_not_replaced(tmp_path, checkpoint):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    expect_rejected(checkpoint, tmp_path / "notes", '"thesis.tex", which is no part of an export')
    expect_rejected(checkpoint, checkpoint, '".metadata", which is no part of an export')
    expect_rejected(checkpoint, tmp_path / "run", '"checkpoint", which is no part of an export')
    expect_rejected(checkpoint, checkpoint / HF_FOLDER, "something else than an exported model")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_models_of_others_are_not_replaced(tmp_path, checkpoint, is_sharded):
    """Neither a pretrained model, nor one trained further in the folder of an export, whatever the card says, nor a pointer."""
    base, tuned, damaged = tmp_path / "base", tmp_path / "tuned", tmp_path / "damaged"
    build_model(tiny_llama(vocab_size=264)).save_pretrained(base, max_shard_size=SHARDS if is_sharded else WHOLE)
    (base / "README.md").write_text("# A model\n\nMade with care.\n")
    convert(checkpoint, tuned)
    set_aside_mark(tuned)
    (tuned / "README.md").write_text("# run\n\nMade with torch 2.8.0, transformers 4.57.1.\n\n<details>\n")
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    (damaged / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for out in (base, tuned, damaged):
        first = min(path.name for path in out.glob("model*.safetensors"))
        expect_rejected(checkpoint, out, f'"{first}", which does not say that flame exported it')


@pytest.mark.parametrize(
    "name",
    [
        "NOTES.txt",
        "results/scores.json",
        "tokens/data.bin",
        "token_study.csv",
        "vocabulary_notes.md",
        "adapter_config.json",
        "additional_chat_templates/notes.txt",
        "vocab.json/data.bin",
        "model-best.safetensors",
    ],
)
def test_what_is_no_part_of_an_export_is_named(tmp_path, checkpoint, name):
    out = tmp_path / "hf"
    convert(checkpoint, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    found = name if name.startswith("additional") else name.partition("/")[0]
    expect_rejected(checkpoint, out, f'"{found}", which is no part of an export')


def test_links_and_modules_of_others_are_not_deleted(tmp_path, checkpoint):
    out = tmp_path / "hf"
    convert(checkpoint, out)
    (out / "vocab.txt").symlink_to("nowhere")
    expect_rejected(checkpoint, out, '"vocab.txt", which is no part of an export')
    (out / "vocab.txt").unlink()
    save_file({"weight": torch.ones(2)}, out / "my_modules.safetensors")
    expect_rejected(checkpoint, out, '"my_modules.safetensors", which does not say that flame exported it')


def test_parts_of_an_earlier_export_go(tmp_path, checkpoint):
    """Loaders would take them for the new model's."""
    out = tmp_path / "hf"
    convert(checkpoint, out, max_shard_bytes=SHARDS)
    (out / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer.model"):
        (out / name).write_text("of the old model")
    (out / "future_modules.safetensors").rename(out / "mtp_modules.safetensors")
    convert(checkpoint, out)
    convert(checkpoint, tmp_path / "fresh")
    assert read_all(out).keys() == read_all(tmp_path / "fresh").keys()


def write_while_exporting(monkeypatch: pytest.MonkeyPatch, write: Callable[[], object]) -> None:
    check = hf_export.check_export

    def check_and_write(*arguments: Any) -> str:
        write()
        return check(*arguments)

    monkeypatch.setattr(hf_export, "check_export", check_and_write)


@pytest.mark.parametrize("is_model", [True, False])
def test_what_is_written_into_the_folder_meanwhile_stays(tmp_path, checkpoint, monkeypatch, is_model):
    """Checked again when the export is written, minutes after the start."""
    out = tmp_path / "hf"
    convert(checkpoint, out)
    write: Callable[[], object] = lambda: (out / "NOTES.txt").write_text("mine")  # noqa: E731
    if is_model:
        write = lambda: set_aside_mark(out)  # noqa: E731
    write_while_exporting(monkeypatch, write)
    with pytest.raises(UserError, match=DELETES):
        convert(checkpoint, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    if is_model:
        with safe_open(out / "model.safetensors", "pt") as weights:
            assert weights.metadata() == {"format": "pt"}
    else:
        assert (out / "NOTES.txt").read_text() == "mine"


def fail_second_rename(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = hf_replacing.replace

    def rename(source: Path, target: Path) -> None:
        if source.name == "hf.flame-export.partial":
            raise error
        real(source, target)

    monkeypatch.setattr(hf_replacing, "replace", rename)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_rename_leaves_the_earlier_export(tmp_path, checkpoint, monkeypatch, error):
    out = tmp_path / "hf"
    convert(checkpoint, out)
    before = read_all(out)
    fail_second_rename(monkeypatch, error)
    with pytest.raises(type(error)):
        convert(checkpoint, out, "bfloat16")
    assert read_all(out) == before and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_an_export_killed_between_the_renames_is_put_back(tmp_path, checkpoint, monkeypatch):
    """Before anything else: what the next export cannot replace, or cannot finish, is there again."""
    out, old = tmp_path / "hf", tmp_path / "hf.flame-export.old.partial"
    convert(checkpoint, out)
    (out / "NOTES.txt").write_text("mine")  # written just before the renames
    before = read_all(out)
    out.rename(old)
    with pytest.raises(UserError, match=r"NOTES\.txt"):
        convert(checkpoint, out)
    assert read_all(out) == before and not old.exists()
    (out / "NOTES.txt").unlink()
    out.rename(old)
    out.mkdir()  # by a start that makes folders
    convert(checkpoint, out, "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_leftovers_of_others_are_not_deleted(tmp_path, checkpoint):
    """A folder that an interrupted export had renamed, when another model was saved in its place. Remains of exports go."""
    out, old = tmp_path / "hf", tmp_path / "hf.flame-export.old.partial"
    convert(checkpoint, out)
    old.mkdir()
    (old / "config.json").write_text("{}")
    convert(checkpoint, out)
    assert not old.exists()
    old.mkdir()
    (old / "NOTES.txt").write_text("mine")
    with pytest.raises(UserError) as refusal:
        convert(checkpoint, out)
    assert str(refusal.value) == f'"{old}" holds "NOTES.txt", which is no part of an export, {DELETES}'
    assert (old / "NOTES.txt").read_text() == "mine"


def test_a_folder_that_is_named_like_an_unfinished_export_stays(tmp_path, checkpoint):
    for name in ("hf.partial", "hf.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_text("of a download")
    convert(checkpoint, tmp_path / "hf")
    convert(checkpoint, tmp_path / "hf")
    assert (tmp_path / "hf.partial" / "shard").exists() and (tmp_path / "hf.old.partial" / "shard").exists()


def test_places_of_the_result(tmp_path, checkpoint):
    """A link keeps leading to the folder, and a folder that cannot be made is one line."""
    (tmp_path / "big disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "big disk")
    for _ in range(2):
        convert(checkpoint, tmp_path / "hf", check=False)
        assert (tmp_path / "hf").is_symlink() and (tmp_path / "big disk" / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"hf", "big disk"} and not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match=r"cannot be made .*: name another folder"):
        convert(checkpoint, Path("/proc/nowhere/hf"))


def test_a_configuration_of_another_model_is_one_line(tmp_path, checkpoint):
    file = checkpoint / HF_FOLDER / "config.json"
    content = file.read_text().replace('"intermediate_size": 48', '"intermediate_size": 49')  # of the same length
    file.write_text(content)
    digest = digest_file(file)
    edit_state(checkpoint, lambda state: state["digests"].update({f"{HF_FOLDER}/config.json": digest}), signed=True)
    expected = r"is of another model than the weights: lm.model.layers.0.mlp.down_proj.weight is \[32, 48\] in the checkpoint"
    with pytest.raises(UserError, match=expected):
        convert(checkpoint, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("is_older", "expected"),
    [
        (False, r"distcp has other bytes than were written \(digest\)"),
        (True, "the bytes of model.lm.model.norm.weight are damaged"),
    ],
)
def test_a_flipped_bit_in_a_weight_is_damage(tmp_path, checkpoint, is_older, expected):
    if is_older:
        age(checkpoint)
    tensors = ModelTensors(checkpoint)
    needle = tensors.load(["lm.model.norm.weight"])["lm.model.norm.weight"].numpy().tobytes()
    shard = next(path for path in checkpoint.glob("*.distcp") if needle in path.read_bytes())
    content = bytearray(shard.read_bytes())
    content[content.index(needle) + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged: .*{expected}"):
        convert(checkpoint, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_full_disk_is_one_line(tmp_path, checkpoint, monkeypatch):
    def fill(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "write_weights", fill)
    with pytest.raises(UserError, match="is full: free space and export again"):
        convert(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("hf.*"))


def test_recurrent_families_are_compared_by_their_weights(tmp_path, monkeypatch, caplog):
    from fla.models import GLAConfig

    model = build_model(GLAConfig(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=264, intermediate_size=48))
    checkpoint = make_checkpoint(tmp_path / "run", model)
    with caplog.at_level("INFO", "flame"):
        convert(checkpoint, tmp_path / "hf")
    assert "weights equal the checkpoint's; logits not compared" in caplog.text
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same_weights(dict(found.state_dict()), dict(model.state_dict()))
    honest = hf_files.stream_weights
    monkeypatch.setattr(
        hf_export, "stream_weights", lambda *a: ({name: tensor * 1.01 for name, tensor in part.items()} for part in honest(*a))
    )
    with pytest.raises(ExportMismatch, match="has another"):
        convert(checkpoint, tmp_path / "wrong")


def test_no_more_than_a_layer_is_read_at_once(tmp_path):
    model = build_model(tiny_llama(vocab_size=264, num_hidden_layers=12, intermediate_size=80))
    tensors = ModelTensors(make_checkpoint(tmp_path / "run", model))
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    asked = []

    def load(names):
        loaded = hf_export._load(tensors, names)
        asked.append(sum(tensor.numel() for tensor in loaded.values()))
        return loaded

    for _ in hf_files.stream_weights(meta, hf_files.plan_layout(meta, torch.float32), load, torch.float32):
        pass
    assert max(asked) == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert sum(asked) == model.num_parameters()


def run_command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_dcp_to_hf", *map(str, arguments)])
    if code := main():
        sys.exit(code)


def test_the_command_line(tmp_path, checkpoint, monkeypatch, capsys, caplog):
    with caplog.at_level("INFO", "flame"):
        run_command(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path / "hf", "--dtype", "bfloat16")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"wrote {tmp_path / 'hf'}"  # a log line may come before
    assert (
        "re-loaded, its logits of 32 tokens equal the checkpoint's, with its weights rounded likewise, to the bit" in caplog.text
    )
    assert "writing weights" not in printed.err  # no progress bar where there is no terminal
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    caplog.clear()
    run_command(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path / "hf", "--skip_check")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert "logits" not in caplog.text
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, "--checkpoint", tmp_path, "--out", tmp_path / "other")
    assert stop.value.code == 2
    assert "is not a complete checkpoint folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--checkpoint", checkpoint.parent, "--out", tmp_path / "other")
    newest = max(checkpoint.parent.glob("step-*"))
    error = f'checkpoint "{checkpoint.parent}" is a folder of checkpoints: name one of them, such as "{newest}"'
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_an_architecture_of_the_users_own(tmp_path, monkeypatch, caplog):
    """Refused with advice without its code, exported with it."""
    package = tmp_path / "own_architecture_of_a_test.py"
    package.write_text(OWN_ARCHITECTURE)

    class Config(LlamaConfig):
        model_type = "own_architecture_of_a_test"

    checkpoint = make_checkpoint(tmp_path / "run", LlamaForCausalLM(Config(**SMALL)), custom_model_path=str(package))
    with pytest.raises(UserError, match=r"comes from experimental.custom_model_path = .*: give --custom_model_path"):
        convert(checkpoint, tmp_path / "hf")
    with caplog.at_level("INFO", "flame"):
        run_command(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path / "hf", "--custom_model_path", package)
    assert "equal the checkpoint's to the bit" in caplog.text
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(found).__module__ == "own_architecture_of_a_test"


def test_some_weights_stay_in_float32(tmp_path):
    """Those that the library itself keeps so, in a model of lower precision."""
    sizes: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts: dict[str, Any] = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    model = build_model(DeepseekV3Config(**SMALL, **sizes, **experts, first_k_dense_replace=1))
    checkpoint = make_checkpoint(tmp_path / "run", model)
    convert(checkpoint, tmp_path / "hf", "bfloat16")
    weights = read_weights(tmp_path / "hf")
    kept = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
    gate = "model.layers.1.mlp.gate."  # later versions of transformers keep the whole of it
    assert {f"{gate}e_score_correction_bias"} <= kept <= {f"{gate}e_score_correction_bias", f"{gate}weight"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    again.save_pretrained(tmp_path / "again")
    assert_same_weights(weights, read_weights(tmp_path / "again"))


def test_a_converted_model_comes_back(tmp_path):
    """In through `convert_hf_to_dcp`, out again: the same weights, and its own settings for generation."""
    model = build_model(FAMILIES["qwen3_moe"]())
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "in")
    build_bytes_tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "token_study.csv").write_text("of somebody")
    convert_to_checkpoint(str(tmp_path / "in"), tmp_path / "step-0")
    for _ in range(2):  # it has no card, and replaces itself
        convert(tmp_path / "step-0", tmp_path / "out")
    assert_same_weights(read_weights(tmp_path / "out"), read_weights(tmp_path / "in"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 7


class Checkpoints:
    """Of a `Checkpointer`, what an `Exporter` asks for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1


def test_a_run_exports_on_its_way(tmp_path, checkpoint, one_process):
    """Every third step but the last; after a resume only what is missing; a failure is the run's."""
    options = Checkpoint(export_interval=3, export_dtype="bfloat16")
    checkpoints = Checkpoints(checkpoint.parent)
    exporter = Exporter(options, tmp_path / "run", 12, checkpoints)  # type: ignore[arg-type]
    assert [step for step in range(13) if exporter.is_due(step)] == [3, 6, 9]
    exporter.export_when_due(2)
    assert checkpoints.waited == 0
    out = tmp_path / "run" / "hf-step-3"
    exporter.export_when_due(3, again=False)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16" and checkpoints.waited == 1
    (out / "vocab.txt").touch()
    exporter.export_when_due(3, again=False)
    assert (out / "vocab.txt").exists()
    exporter.export_when_due(3)
    assert not (out / "vocab.txt").exists()
    with pytest.raises(UserError, match="is not a complete checkpoint folder"):
        exporter.export_when_due(6)
    options.export_interval = 0
    assert not any(exporter.is_due(step) for step in range(13))


@pytest.mark.parametrize(("family", "is_misread"), [("qwen2", True), ("llama", False)])
def test_a_tokenizer_that_transformers_misreads_is_a_warning(tmp_path, caplog, family, is_misread):
    checkpoint = make_checkpoint(tmp_path / "run", build_model(build_toy(family, vocab_size=264)))
    convert(checkpoint, tmp_path / "hf", check=False)
    warning = (
        "transformers reads it as Qwen2Tokenizer" in caplog.text and "PreTrainedTokenizerFast.from_pretrained" in caplog.text
    )
    assert warning == is_misread and ("tokenizer" in caplog.text) == is_misread
