"""Exports that are also uploaded, and initial weights that are elsewhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
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


def test_what_is_there_is_what_is_here(tmp_path: Path, address: str) -> None:
    """Also after another export was there. Files of others stay."""
    upload(LABEL, make_export(tmp_path / "first", "model.safetensors"), f"{address}/hf")
    others = {"notes.txt": b"mine", "models/other.safetensors": b"mine"}
    for name, content in others.items():
        fsspec.filesystem("memory").pipe_file(f"{address}/hf/{name}", content)
    second = make_export(tmp_path / "second", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    upload(LABEL, second, f"{address}/hf/")
    assert read_memory(f"{address}/hf") == read_folder(second) | others


def test_models_of_others_are_not_replaced(tmp_path: Path, address: str) -> None:
    """Neither whole ones nor weights alone. An export that was uploaded by an earlier release is told by its card."""
    base = make_export(tmp_path / "base")
    write_weights(base / "model.safetensors", format="pt")
    put(base, f"{address}/base")
    write_weights(tmp_path / "model.safetensors", format="pt")
    fsspec.filesystem("memory").pipe_file(f"{address}/weights/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    fsspec.filesystem("memory").pipe_file(f"{address}/other/config.json", b"{}")
    fsspec.filesystem("memory").pipe_file(f"{address}/other/pytorch_model.bin", b"weights")
    before = read_memory(address)
    export = make_export(tmp_path / "hf", "model-00001-of-00001.safetensors")
    for name in ("base", "weights", "other"):
        with pytest.raises(UserError) as refusal:
            upload(LABEL, export, f"{address}/{name}")
        expect_one_line(refusal.value, f"{LABEL}: {address}/{name} holds a model that flame did not export: name another folder")
    assert read_memory(address) == before
    fsspec.filesystem("memory").pipe_file(f"{address}/base/README.md", b"Made with torch 2.8.0, transformers 4.57.1.\n")
    upload(LABEL, export, f"{address}/base")
    assert read_memory(f"{address}/base") == read_folder(export)


def test_a_broken_upload_over_an_earlier_release_is_tried_again(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its card stays until the weights are there."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    old = make_export(tmp_path / "old", *names)
    for name in names:
        write_weights(old / name, format="pt")
    (old / "README.md").write_text("Made with torch 2.8.0, transformers 4.57.1.\n")
    put(old, f"{address}/hf")
    export = make_export(tmp_path / "hf", *names)
    with monkeypatch.context() as patched:
        refuse_files(patched, names[1])
        with pytest.raises(UserError, match="no right to write"):
            upload(LABEL, export, f"{address}/hf")
    fsspec.filesystem("memory").pipe_file(f"{address}/hf/{names[0]}", b"torn")  # not every file system puts files whole
    upload(LABEL, export, f"{address}/hf")
    assert read_memory(f"{address}/hf") == read_folder(export)


@pytest.mark.parametrize("failing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_broken_upload_does_not_load(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    folder = make_export(tmp_path / "hf", "model.safetensors")
    upload(LABEL, folder, address)
    refuse_files(monkeypatch, failing)
    with pytest.raises(UserError) as refusal:
        upload(LABEL, folder, address)
    expect_one_line(refusal.value, LABEL, "no right to write", "check")
    assert "config.json" not in read_memory(address)


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
    fsspec.filesystem("memory").pipe_file(f"{address}/base/config.json", b"{}")
    assert convert_dcp_to_hf.main(["--checkpoint", str(checkpoint), "--out", f"{address}/base"]) == 2
    expected = f'--out "{address}/base": {address}/base holds a model that flame did not export: name another folder'
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
