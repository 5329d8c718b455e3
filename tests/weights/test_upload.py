"""Exports that are also uploaded, and initial weights that are elsewhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from transformers import PretrainedConfig

from flame.cli import convert_dcp_to_hf, convert_hf_to_dcp
from flame.config.schema import JobConfig
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from flame.models.causal_lm import load_model_config
from flame.trainer.options import find_conflicts
from flame.weights.source import find_weights
from flame.weights.upload import Uploader, upload
from tests.support.refusals import expect_one_line
from tests.support.remote import put, read_memory, serve
from tests.support.runs import measured, run_here

LABEL = 'checkpoint.export_to = "there"'


pytestmark = pytest.mark.usefixtures("own_remote_cache")


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def describe(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def make_export(folder: Path, *weights: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text(name)
    for name in weights:
        write_weights(folder / name)
    return folder


def write_weights(path: Path, **metadata: str) -> None:
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata or {"format": "pt", "producer": "flame"})


def count_uploads(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.message.startswith("uploaded ") for record in caplog.records)


def refuse_files(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Writing a file of this name fails."""
    put_file = MemoryFileSystem.put_file

    def refuse(self: Any, source: str, target: str, **settings: Any) -> None:
        if target.endswith(name):
            raise PermissionError("no right to write")
        put_file(self, source, target, **settings)

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)


# ---------------------------------------------------------------- uploads


DELETES = "and an export would delete it: move it away, or name another address"


def put_one(address: str, content: bytes = b"mine") -> None:
    fsspec.filesystem("memory").pipe_file(address, content)


def test_what_is_there_is_what_is_here(tmp_path: Path, address: str) -> None:
    """Also after another export was there. Files of others beside the export here stay here."""
    first = make_export(tmp_path / "first", "model.safetensors", "mtp_modules.safetensors")
    upload(LABEL, first, f"{address}/hf")
    second = make_export(tmp_path / "second", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (second / "additional_chat_templates").mkdir()
    (second / "additional_chat_templates" / "tools.jinja").write_text("tools")
    expected = read_folder(second)
    (second / "private").mkdir()
    (second / "private" / "key.txt").write_text("secret")
    (second / "notes.txt").write_text("mine")
    upload(LABEL, second, f"{address}/hf/")
    assert read_memory(f"{address}/hf") == expected


def expect_rejected(address: str, export: Path, fault: str) -> None:
    """One line, and everything stays as it was."""
    before = read_memory(address)
    with pytest.raises(UserError) as refusal:
        upload(LABEL, export, address)
    expect_one_line(refusal.value, f"{LABEL}: {address} holds {fault}, {DELETES}")
    assert read_memory(address) == before


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model-q4.gguf", "pytorch_model.bin", "notes.txt", "models/other.safetensors"]
)
@pytest.mark.parametrize("is_beside_export", [True, False])
def test_files_of_others_are_not_replaced(tmp_path: Path, address: str, name: str, is_beside_export: bool) -> None:
    export = make_export(tmp_path / "hf", "model.safetensors")
    if is_beside_export:
        upload(LABEL, export, address)
    for each in ("README.md", "tokenizer.json", name):
        put_one(f"{address}/{each}")
    expect_rejected(address, export, f'"{name}", which is no part of an export')


def test_models_of_others_are_not_replaced(tmp_path: Path, address: str) -> None:
    """Neither whole ones nor weights alone, whatever their card says, nor what git-lfs leaves in place of weights."""
    export = make_export(tmp_path / "hf", "model-00001-of-00001.safetensors")
    base = make_export(tmp_path / "base")
    write_weights(base / "model.safetensors", format="pt")
    (base / "README.md").write_text("Made with torch 2.8.0, transformers 4.57.1.\n")
    put(base, f"{address}/base")
    put_one(f"{address}/weights/model.safetensors", (base / "model.safetensors").read_bytes())
    put_one(f"{address}/pointer/model.safetensors", b"version https://git-lfs.github.com/spec/v1")
    for name in ("base", "weights", "pointer"):
        expect_rejected(f"{address}/{name}", export, '"model.safetensors", which does not say that flame exported it')
    put_one(f"{address}/cards/README.md")
    expect_rejected(f"{address}/cards", export, "something else than an exported model")


def test_an_address_that_is_taken_is_told_before_the_first_step(workspace, tmp_path, address, capsys):
    """Of what the run will write. What a failed upload has left there is no reason."""
    changes = {"checkpoint__export_hf": True, "checkpoint__export_interval": 3, "checkpoint__export_to": address}
    put_one(f"{address}/hf-step-4/notes.txt")
    put_one(f"{address}/hf-step-3/flame-upload.partial")
    put_one(f"{address}/hf-step-3/model.safetensors", b"torn")
    put_one(f"{address}/hf/adapter_config.json")
    with pytest.raises(SystemExit):
        run_here(workspace, tmp_path / "run", **changes)
    dist.destroy_process_group()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f'{address}/hf holds "adapter_config.json", which is no part of an export, {DELETES}' in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    fsspec.filesystem("memory").rm_file(f"{address}/hf/adapter_config.json")
    run_here(workspace, tmp_path / "run", **changes)
    for name in ("hf", "hf-step-3"):
        assert read_memory(f"{address}/{name}") == read_folder(tmp_path / "run" / name)


def test_an_address_that_cannot_be_read_at_the_start_is_a_warning(workspace, tmp_path, address, monkeypatch, caplog):
    """Like a failed upload: the network may be back at the end."""
    changes = {"checkpoint__export_hf": True, "checkpoint__export_to": address}
    with monkeypatch.context() as patched:

        def fail(*arguments: Any, **settings: Any) -> None:
            raise OSError("no network")

        patched.setattr(MemoryFileSystem, "find", fail)
        patched.setattr(MemoryFileSystem, "exists", lambda *arguments: True)
        run_here(workspace, tmp_path / "run", **changes)
    assert "cannot be read (no network)" in caplog.text and "done: step 6 of 6" in caplog.text


@pytest.mark.parametrize("failing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_broken_upload_does_not_load(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    folder = make_export(tmp_path / "hf", "model.safetensors")
    upload(LABEL, folder, address)
    refuse_files(monkeypatch, failing)
    with pytest.raises(UserError) as refusal:
        upload(LABEL, folder, address)
    expect_one_line(refusal.value, LABEL, "no right to write", "check")
    assert "config.json" not in read_memory(address)


@pytest.mark.parametrize("failing", ["tokenizer.json", "model-00002-of-00002.safetensors", "config.json"])
def test_a_broken_upload_is_made_up_for(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Also where a file is there in part, since not every file system puts files whole. Files of others are still told."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    export = make_export(tmp_path / "hf", *names)
    upload(LABEL, make_export(tmp_path / "old", "model.safetensors"), address)
    with monkeypatch.context() as patched:
        refuse_files(patched, failing)
        with pytest.raises(UserError, match="no right to write"):
            upload(LABEL, export, address)
    put_one(f"{address}/{names[0]}", b"torn")
    put_one(f"{address}/adapter_config.json")
    expect_rejected(address, export, '"adapter_config.json", which is no part of an export')
    fsspec.filesystem("memory").rm_file(f"{address}/adapter_config.json")
    upload(LABEL, export, address)
    assert read_memory(address) == read_folder(export)


def test_what_arrives_short_is_an_error(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Any, source: str, target: str, **settings: Any) -> None:
        self.pipe_file(target, b"")

    monkeypatch.setattr(MemoryFileSystem, "put_file", cut)
    with pytest.raises(UserError, match="0 bytes instead of"):
        upload(LABEL, make_export(tmp_path / "hf"), address)


def test_a_failed_upload_is_tried_again(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the next process. What is there already is not uploaded again, unless it is replaced here."""
    caplog.set_level(logging.INFO, "flame")
    for name in ("hf", "hf-step-3", "hf-step-6.set-aside-1", "hf-step-9.partial", "checkpoint"):
        make_export(tmp_path / name, "model.safetensors")
    with monkeypatch.context() as patched:
        refuse_files(patched, "hf-step-3/model.safetensors")
        uploader = Uploader(tmp_path, address)
        uploader.add_all()
        uploader.wait()
    assert "no right to write" in caplog.text and "the next start of this run tries again" in caplog.text
    assert count_uploads(caplog) == 1 and "config.json" not in read_memory(f"{address}/hf-step-3")
    for _ in range(2):
        uploader = Uploader(tmp_path, address)
        uploader.add_all()
        uploader.wait()
    assert count_uploads(caplog) == 2
    assert {name.partition("/")[0] for name in read_memory(address)} == {"hf", "hf-step-3"}
    make_export(tmp_path / "hf", "model.safetensors", "future_modules.safetensors")
    uploader.add("hf")
    uploader.wait()
    assert count_uploads(caplog) == 3 and read_memory(f"{address}/hf") == read_folder(tmp_path / "hf")


def test_a_run_uploads_its_exports(workspace, tmp_path, address, monkeypatch, caplog):
    """A failed upload ends no run; starting the finished run again makes up for it."""
    changes = {"checkpoint__export_hf": True, "checkpoint__export_interval": 3, "checkpoint__export_to": address}
    with monkeypatch.context() as patched:
        refuse_files(patched, "hf/model.safetensors")
        run_here(workspace, tmp_path / "run", **changes)
    assert "done: step 6 of 6" in caplog.text and "no right to write" in caplog.text
    assert read_memory(f"{address}/hf-step-3") == read_folder(tmp_path / "run" / "hf-step-3")
    run_here(workspace, tmp_path / "run", **changes)
    assert "nothing is left to do" in caplog.text
    assert read_memory(f"{address}/hf") == read_folder(tmp_path / "run" / "hf")


def test_the_converter_writes_to_an_address(exported_run, address, capsys):
    checkpoint = exported_run / "checkpoint" / "step-6"
    assert convert_dcp_to_hf.main(["--checkpoint", str(checkpoint), "--out", address]) == 0
    found = read_memory(address)
    assert found["model.safetensors"] == (exported_run / "hf" / "model.safetensors").read_bytes()
    assert found.keys() == read_folder(exported_run / "hf").keys()
    put_one(f"{address}/base/config.json", b"{}")
    assert convert_dcp_to_hf.main(["--checkpoint", str(checkpoint), "--out", f"{address}/base"]) == 2
    expected = f'--out "{address}/base": {address}/base holds something else than an exported model, {DELETES}'
    assert expected in capsys.readouterr().err
    assert convert_dcp_to_hf.main(["--checkpoint", str(checkpoint), "--out", "http://host/x"]) == 2
    assert capsys.readouterr().err.startswith('--out "http://host/x": it must be an address that can be written')


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("checkpoint", "export_to", "bucket/run", "it must be an address"),
        ("checkpoint", "export_to", "https://host/run", "it must be an address that can be written"),
        ("checkpoint", "export_to", "nonsense://x", "fsspec knows no nonsense://"),
        ("checkpoint", "initial_load_path", "nonsense://x", "fsspec knows no nonsense://"),
        ("checkpoint", "branch_from", "memory://run/step-3", "copy it"),
        ("model", "config", "nonsense://x", "fsspec knows no nonsense://"),
        ("model", "tokenizer_path", "nonsense://x", "fsspec knows no nonsense://"),
    ],
)
def test_mistakes_are_reported_at_once(section: str, key: str, value: str, says: str) -> None:
    job = JobConfig()
    job.model.config, job.model.tokenizer_path = str(Path(__file__)), "bytes"
    setattr(getattr(job, section), key, value)
    lines = [line for line in find_conflicts(job) if value in line]
    assert len(lines) == 1 and lines[0].startswith(f'{section}.{key} = "{value}"') and says in lines[0]


# ---------------------------------------------------------------- initial weights


def test_a_run_starts_from_weights_elsewhere(exported_run, workspace, tmp_path, address):
    """Weights, objective's modules, configuration and tokenizer, as from the folder here."""
    put(exported_run / "hf", address)
    changes = {"model__config": None, "model__tokenizer_path": None, "training__steps": 2}
    here = run_here(workspace, tmp_path / "here", checkpoint__initial_load_path=exported_run / "hf", **changes)
    there = run_here(workspace, tmp_path / "there", checkpoint__initial_load_path=address, **changes)
    assert measured(there) == measured(here)
    fsspec.filesystem("memory").rm(address, recursive=True)
    run_here(workspace, tmp_path / "there", checkpoint__initial_load_path=address, **changes | {"training__steps": 3})


def test_a_checkpoint_elsewhere_is_initial_weights(exported_run, address):
    checkpoint = exported_run / "checkpoint" / "step-6"
    put(checkpoint, address)
    found, expected = find_weights(address), find_weights(str(checkpoint))
    assert found.entries == expected.entries and found.is_native
    for key, entry in expected.entries.items():
        assert torch.equal(found.read(key, 0, entry.shape[0]), expected.read(key, 0, entry.shape[0]))
    assert describe(load_model_config(address)) == describe(load_model_config(str(checkpoint / "hf")))
    assert load_tokenizer(address).get_vocab() == load_tokenizer("bytes").get_vocab()


@pytest.mark.parametrize("lists", [True, False])
def test_a_web_server_has_a_model(exported_run, tmp_path, lists):
    with serve(exported_run, lists=lists) as (server, gets):
        config = load_model_config(f"{server}/hf")
        assert not any("safetensors" in path and "index" not in path for path in gets), "weights are not needed yet"
        assert describe(config) == describe(load_model_config(str(exported_run / "hf")))
        assert describe(load_model_config(f"{server}/hf/config.json")) == describe(config)
        for path in (f"{server}/hf", f"{server}/hf/tokenizer.json"):
            assert load_tokenizer(path).get_vocab() == load_tokenizer("bytes").get_vocab()
        found, expected = find_weights(f"{server}/hf"), find_weights(str(exported_run / "hf"))
    assert found.entries == expected.entries
    for key, entry in expected.entries.items():
        assert torch.equal(found.read(key, 0, entry.shape[0]), expected.read(key, 0, entry.shape[0]))


def test_a_model_elsewhere_is_converted(exported_run, tmp_path, address):
    put(exported_run / "hf", address)
    assert convert_hf_to_dcp.main(["--model", address, "--out", str(tmp_path / "step-0")]) == 0
    found, expected = find_weights(str(tmp_path / "step-0")), find_weights(str(exported_run / "checkpoint" / "step-6"))
    assert found.entries == expected.entries


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_what_is_missing_there_is_named(exported_run, address, missing):
    put(exported_run / "hf", address)
    fsspec.filesystem("memory").rm_file(f"{address}/{missing}")
    with pytest.raises(UserError) as refusal:
        load_model_config(address) if missing == "config.json" else find_weights(address)
    expect_one_line(refusal.value, address, missing)


def test_the_note_is_json(tmp_path: Path, address: str) -> None:
    make_export(tmp_path / "hf")
    uploader = Uploader(tmp_path, address)
    uploader.add_all()
    uploader.wait()
    assert json.loads((tmp_path / "uploads.json").read_text())["hf"][0] == f"{address}/hf"
