"""What a run is said to need, before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks.training_step import read_step_options
from flame.config.training import Training
from flame.launch import main as launch
from flame.models.memory_estimate import count_layer_kept, count_layer_saved, estimate_memory
from flame.models.wrapper import TrainingModel
from flame.trainer.estimate import estimate_rank, estimate_run, show_flops, show_time
from flame.trainer.options import read_options
from flame.trainer.setup import build_modules
from tests.support.families import build_toy
from tests.support.paths import REPO
from tests.support.runs import options, run_here

GIB = 2**30
LLAMA_1B = AutoConfig.from_pretrained(REPO / "configs/models/llama_1B.json")
LLAMA_340M = AutoConfig.from_pretrained(REPO / "configs/models/llama_340M.json")
LLAMA_8B = AutoConfig.from_pretrained(
    REPO / "configs/models/llama_1B.json",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    head_dim=128,
    tie_word_embeddings=False,
)

MEASURED = [  # GiB on H200s, docs/performance.md
    (LLAMA_1B, 65_536, 1, 1, False, 94.5),
    (LLAMA_1B, 65_536, 1, 1, True, 97.0),
    (LLAMA_1B, 16_384, 2, 1, False, 29.7),
    (LLAMA_1B, 16_384, 2, 1, True, 29.9),
    (LLAMA_340M, 32_768, 1, 2, False, 31.1),
    (LLAMA_340M, 32_768, 1, 2, True, 32.0),
    (LLAMA_340M, 32_768, 2, 1, True, 28.6),
    (LLAMA_8B, 16_384, 4, 1, True, 98.5),
]

OBJECTIVES = {  # GiB at 1B on one H200, 16,384 and 32,768 tokens: next token's and what docs/objectives.md says comes on top
    "stp": (38.3, 57.0),
    "future": (38.4, 57.7),
    "nextlat": (39.1, 58.8),
    "regret": (39.0, 57.9),
    "nitp": (38.9, 57.7),
    "top": (43.7, 62.5),
    "mtp_sequential": (41.4, 61.8),
    "fsp_bow": (43.2, 63.4),
    "fsp_revlm": (76.0, 115.2),
    "mtp": (46.2, 69.1),
}


def build(config: PretrainedConfig) -> TrainingModel:
    with torch.device("meta"):
        return TrainingModel(AutoModelForCausalLM.from_config(config), None)  # type: ignore[arg-type]  # nothing runs


@pytest.mark.parametrize(("config", "tokens", "shards", "micro_steps", "has_future", "measured"), MEASURED)
def test_peaks_are_those_of_measured_runs(
    config: PretrainedConfig, tokens: int, shards: int, micro_steps: int, has_future: bool, measured: float
):
    future = 20.0 * tokens * config.hidden_size if has_future else 0.0
    memory = estimate_memory(build(config), [], Training(seq_len=tokens, compile=True), "none", shards, 8, future)
    assert memory.find_peak(keeps_gradients=micro_steps > 1) / GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("config", "mode", "tokens", "compiled", "measured"),
    [
        (LLAMA_340M, "selective", 32_768, True, 17.3),
        (LLAMA_340M, "full", 32_768, True, 8.6),
        (LLAMA_340M, "none", 16_384, False, 23.4),
        (LLAMA_1B, "selective", 32_768, True, 34.5),
        (LLAMA_1B, "full", 32_768, True, 22.7),
        (LLAMA_1B, "none", 16_384, False, 46.5),
    ],
)
def test_peaks_with_recomputation_and_uncompiled_are_those_of_measured_runs(
    config: PretrainedConfig, mode: str, tokens: int, compiled: bool, measured: float
):
    training = Training(seq_len=tokens, compile=compiled)
    memory = estimate_memory(build(config), [], training, mode, 1, 8, 0.0)
    assert memory.find_peak(keeps_gradients=False) / GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("name", "measured"), OBJECTIVES.items())
def test_peaks_of_objectives_are_those_of_measured_steps(name: str, measured: tuple[float, float]):
    for tokens, peak in zip((16_384, 32_768), measured, strict=True):
        config = read_step_options(REPO / "configs/models/llama_1B.json", tokens, ["--objective.name", name])
        memory = estimate_rank(config, build_modules(config, LLAMA_1B, "cpu"))
        assert memory.find_peak(keeps_gradients=False) / GIB == pytest.approx(peak, rel=0.05)


def test_one_layer_is_there_whole_where_the_rest_is_not_kept():
    training = Training(seq_len=4096, compile=True)
    plain, full = (estimate_memory(build(LLAMA_340M), [], training, mode, 1, 8, 0.0) for mode in ("none", "full"))
    width = 2 * 4096 * 1024
    assert plain.recomputed == 0 and full.recomputed == (plain.activations - 2 * width) / 24 - width
    assert full.at_layer - full.at_loss == full.recomputed - full.logits


@pytest.mark.parametrize(("moment_bytes", "measured"), [(8, 72.8), (4, 68.2)])
def test_peaks_with_pointwise_recomputation_are_those_of_measured_runs(moment_bytes: int, measured: float):
    training, future = Training(seq_len=65_536, compile=True), 20.0 * 65_536 * LLAMA_1B.hidden_size
    memory = estimate_memory(build(LLAMA_1B), [], training, "pointwise", 1, moment_bytes, future)
    assert memory.find_peak(keeps_gradients=False) / GIB == pytest.approx(measured, rel=0.05)


def test_what_a_llama_layer_keeps():
    layer = build(LLAMA_1B).lm.model.layers[0]
    stream_and_norms, queries_keys_values, attended, feed_forward = 4 * 2048, 2048 + 2 * 512, 2048, 3 * 8192
    assert count_layer_kept(layer, LLAMA_1B) == stream_and_norms + queries_keys_values + attended + feed_forward


def test_what_layers_of_experts_and_of_convolutions_keep():
    config = build_toy("mixtral")
    layer = build(config).lm.model.layers[0]
    attention = 32 + 2 * 16 + 32
    assert count_layer_kept(layer, config) == 2 * 32 + attention + 2 * (2 * 48 + 32 + 48 + 32)
    assert count_layer_saved(layer, config, "pointwise") == 2 * 32 + attention + 2 * (2 * 48 + 32)
    convolutional = nn.Sequential(nn.Conv1d(8, 8, 4, groups=8), nn.Linear(8, 2048, bias=False))
    assert count_layer_kept(convolutional, LLAMA_1B) == 2 * 2048 + 8


def test_weights_are_spread_and_activations_are_not():
    model, training = build(LLAMA_340M), Training(seq_len=4096, compile=True)
    one, four = (estimate_memory(model, [], training, "none", shards, 8, 0.0) for shards in (1, 4))
    count = sum(weight.numel() for weight in model.parameters())
    assert (one.weights, one.gradients, one.moments) == (4 * count, 4 * count, 8 * count)
    assert (four.weights, four.gradients, four.moments) == (count, count, 2 * count)
    assert four.activations == one.activations
    assert estimate_memory(model, [], training, "full", 1, 8, 0.0).activations < one.activations / 4


CURRICULUM = {"objective__name": "mtp", "mtp__tokens": 4, "mtp__curriculum": "reverse", "mtp__loss_weight": 1.0}


@pytest.mark.parametrize("changes", [{"objective__start_step": 3}, CURRICULUM], ids=["a start", "a curriculum"])
@pytest.mark.parametrize("by_flops", [False, True])
def test_the_run_is_counted_as_it_is_logged(workspace: Path, tmp_path: Path, changes: dict[str, object], by_flops: bool):
    rows = run_here(workspace, tmp_path / "run", **changes, training__steps=5)
    logged = sum(row["step_tflops"] for row in rows) * 1e12
    length: dict[str, object] = (
        {"training__steps": None, "training__flops": 0.95 * logged} if by_flops else {"training__steps": 5}
    )
    estimate = estimate_run(read_options(options(workspace, tmp_path / "other", **changes, **length), 1))
    assert estimate.steps == 5
    assert estimate.run_flops == pytest.approx(logged, rel=0.05)  # its first packed sequences stand for all
    assert not (tmp_path / "other").exists()


def test_the_command(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--nproc-per-node=1", "-m", "flame.train", *options(workspace, tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        launch([*argv, "--estimate", "4"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "a step on 4 GPUs: 512 tokens" in out and "activations" in out and "H200" in out
    for wrong in ("none", "0", "9" * 5000):
        assert launch([*argv, "--estimate", wrong]) == 2
        assert capsys.readouterr().err == f"--estimate {wrong}: allowed is a number of GPUs above 0\n"


def test_units():
    assert [show_flops(value) for value in (2e9, 3e12, 4e15, 5e18)] == ["2.0 GFLOP", "3.0 TFLOP", "4.0 PFLOP", "5.0 EFLOP"]
    assert [show_time(value) for value in (3.0, 600.0, 36_000.0)] == ["3.0 s", "10 min", "10.0 h"]
