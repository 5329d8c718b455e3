"""Predictions and summaries of exported models, against the trainer's modules taken by hand; and retrieval, against loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.cli.embed import main
from flame.errors import UserError
from flame.library.embeddings import embed, load_modules
from flame.library.retrieval import rank, retrieve, split_texts
from tests.support.runs import run_here

CPU = torch.device("cpu")
TEXTS = [torch.tensor(list(text.encode())) for text in ("alpha beta", "gamma", "delta epsilon zeta", "beta")]
CASES = {
    "defaults": {},
    "early and shallow": {"future_predictor__layer": 1, "future_encoder__layers": 1, "future_predictor__head_type": "gated"},
    "projected": {"future_encoder__projection_dim": 16, "future_predictor__head_type": "linear", "future_encoder__future_k": 2},
    "bilinear": {"future_encoder__estimator_type": "bilinear", "future_encoder__learnable_temperature": None},
}


@pytest.fixture(scope="module")
def exports(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            run_here(workspace, folder / name, training__steps=2, checkpoint__export_hf=True, **CASES[name])
        return folder / name / "hf"

    return get


def encode_ahead(lm, tokens: Tensor, window: int) -> Tensor:
    """States of one text under the anti-causal mask, by transformers alone."""
    n = len(tokens)
    distance = torch.arange(n)[None] - torch.arange(n)[:, None]
    allowed = (distance > 0) & ((distance <= window) if window else True)
    return lm.model(input_ids=tokens[None], attention_mask=allowed[None, None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_those_of_the_loss(exports, name):
    folder = exports(name)
    with torch.no_grad():
        check_vectors(folder, CASES[name])


def check_vectors(folder: Path, case: dict[str, object]) -> None:
    found = embed(load_modules(folder, CPU), AutoModelForCausalLM.from_pretrained(folder), TEXTS, 20)
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    weights = load_file(folder / "future_modules.safetensors")
    shallow = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    if case.get("future_encoder__layers"):
        del shallow.model.layers[1:]
    for index, tokens in enumerate(TEXTS):
        states = lm.model(tokens[None], output_hidden_states=True, use_cache=False)
        final = states.last_hidden_state[0, -1]
        x = states.hidden_states[1][0, -1] if case.get("future_predictor__layer") else final
        x = F.layer_norm(x, x.shape, weights["predictor.norm.weight"], weights["predictor.norm.bias"])
        linear = lambda part, x: F.linear(x, weights[f"predictor.{part}.weight"], weights[f"predictor.{part}.bias"])  # noqa: E731
        if case.get("future_predictor__head_type") == "gated":
            x = F.silu(linear("body.gate", x)) * linear("body.up", x)
        elif case.get("future_predictor__head_type") != "linear":
            x = F.gelu(linear("body.0", x))
        prediction = F.normalize(linear("out", x), dim=-1)
        summary = encode_ahead(shallow, tokens, case.get("future_encoder__future_k", 0))[0]
        if case.get("future_encoder__projection_dim"):
            summary = summary @ weights["estimator.projection"]
        if case.get("future_encoder__estimator_type"):
            prediction = F.normalize(prediction @ weights["estimator.weight"], dim=-1)
        torch.testing.assert_close(found.states[index], F.normalize(final, dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.predictions[index], prediction, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.summaries[index], F.normalize(summary, dim=-1), rtol=1e-4, atol=1e-5)


@given(st.integers(2, 7), st.integers(0, 999))
def test_ranks_are_counted(count, seed):
    scores = torch.randint(0, 4, (count, count), generator=torch.Generator().manual_seed(seed)).float()
    ranks = [1 + sum(scores[i, j] >= scores[i, i] for j in range(count) if j != i) for i in range(count)]
    accuracy, reciprocal = rank(scores)
    assert accuracy == pytest.approx(sum(each == 1 for each in ranks) / count)
    assert reciprocal == pytest.approx(sum(1 / float(each) for each in ranks) / count)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_continuation_begins_at_the_target_of_the_prefix(shift):
    prefixes, continuations = split_texts([torch.arange(9), torch.arange(3), torch.arange(4)], shift)
    assert [each.tolist() for each in prefixes] == [[0, 1, 2, 3], [0, 1]]
    assert [each[0].item() for each in continuations] == [3 + shift, 1 + shift]
    assert [each[-1].item() for each in continuations] == [8, 3]


def test_the_summary_of_a_continuation_is_that_of_the_whole_text(exports):
    """What training compares the prediction with."""
    folder = exports("defaults")
    modules, lm = load_modules(folder, CPU), AutoModelForCausalLM.from_pretrained(folder)
    _, continuations = split_texts(TEXTS[:1], modules.shift)
    alone = embed(modules, lm, continuations, 64).summaries[0]
    with torch.no_grad():
        whole = encode_ahead(lm, TEXTS[0], 0)[len(TEXTS[0]) // 2 - 1 + modules.shift]
    torch.testing.assert_close(alone, F.normalize(whole, dim=-1), rtol=1e-3, atol=1e-4)


def test_retrieval_has_its_baselines(exports):
    folder = exports("defaults")
    modules, lm = load_modules(folder, CPU), AutoModelForCausalLM.from_pretrained(folder)
    found = retrieve(modules, lm, TEXTS, 64)
    assert [each.queries for each in found] == ["prediction of the future", "hidden state", "hidden state"]
    assert all(0 <= each.accuracy <= each.reciprocal_rank <= 1 for each in found)
    with pytest.raises(UserError, match=r"^1 of 2 texts are long enough to be cut in two"):
        retrieve(modules, lm, [TEXTS[0], TEXTS[0][:2]], 64)


def test_the_states_of_continuations_are_those_before_the_end(exports, tmp_path, capsys):
    """Both halves are the same here, so that plain states find each, unless they are of the token that ends all texts."""
    folder, texts = exports("defaults"), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": 6 * letter}) + "\n" for letter in "abcdefgh"))
    capsys.readouterr()  # what the run has printed
    assert main([str(folder), "--data_files", str(texts), "--device", "cpu", "--retrieve"]) == 0
    states = capsys.readouterr().out.splitlines()[3]
    assert "hidden state of its last token" in states and states.split()[-2:] == ["100.0%", "1.000"]


def test_the_command_writes_vectors_and_retrieves(exports, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("alpha beta gamma", "delta epsilon")))
    argv = [str(exports("defaults")), "--data_files", str(texts), "--device", "cpu"]
    capsys.readouterr()  # what the run has printed
    assert main([*argv, "--out", str(tmp_path / "v.npz"), "--retrieve"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"wrote {tmp_path / 'v.npz'}: 2 texts, 32 numbers a prediction" and printed[-1] == "2 texts"
    with texts.open("a") as file:
        file.write('{"text": "a"}\n{"text": "ab"}\n')
    assert main([*argv, "--retrieve"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 texts; 2 more are too short to be cut in two"
    vectors = np.load(tmp_path / "v.npz")
    shapes = {"rows": (2,)} | dict.fromkeys(("states", "predictions", "summaries"), (2, 32))
    assert {name: vectors[name].shape for name in vectors} == shapes


def test_vectors_say_of_which_row_they_are(exports, tmp_path, capsys):
    folder, texts = exports("defaults"), tmp_path / "texts.jsonl"
    lines = ['{"text": "alpha"}', '{"text": ""}', "{broken", '{"other": "x"}', "", *['{"text": "beta"}'] * 3]
    texts.write_text("\n".join(lines) + "\n")
    argv = [str(folder), "--data_files", str(texts), "--device", "cpu", "--out"]
    capsys.readouterr()  # what the run has printed
    assert main([*argv, str(tmp_path / "all.npz")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "4 rows skipped, without a text of two tokens: 1, 2, 3, 4" and len(printed) == 2
    rows = np.load(tmp_path / "all.npz")["rows"]
    assert rows.dtype == np.int64 and rows.tolist() == [0, 5, 6, 7]
    assert main([*argv, str(tmp_path / "some.npz"), "--tokens", "11"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "stopped after 6 of 8 rows, at --tokens 11"
    assert np.load(tmp_path / "some.npz")["rows"].tolist() == [0, 5]
    texts.write_text('{"text": ""}\n' * 12 + '{"text": "alpha"}\n')
    assert main([*argv, str(tmp_path / "some.npz")]) == 0
    expected = "12 rows skipped, without a text of two tokens: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."
    assert capsys.readouterr().out.splitlines()[0] == expected


def test_predictions_are_made_before_the_token_that_ends_a_text(exports, tmp_path):
    """Of a text that is cut, they are made at its last token. A summary is of the whole text, with its end."""
    folder, written = exports("defaults"), ("alpha beta gamma", "delta epsilon")
    texts, out = tmp_path / "texts.jsonl", tmp_path / "v.npz"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    assert main([str(folder), "--data_files", str(texts), "--device", "cpu", "--longest", "14", "--out", str(out)]) == 0
    vectors, lm, modules = np.load(out), AutoModelForCausalLM.from_pretrained(folder), load_modules(folder, CPU)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    read = [list(text.encode())[:14] for text in written]
    without_end = embed(modules, lm, [torch.tensor(tokens) for tokens in read], 64)
    whole = embed(modules, lm, [torch.tensor([*tokens, end][:14]) for tokens in read], 64)
    assert len(read[0]) == 14 and len(read[1]) == 13
    for name, expected in (("states", without_end), ("predictions", without_end), ("summaries", whole)):
        torch.testing.assert_close(torch.from_numpy(vectors[name]), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole.predictions[1], without_end.predictions[1], atol=1e-3)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "nothing to do: give --out FILE.npz, --retrieve, or both"),
        (["--out", "x.txt"], "--out x.txt: vectors are written to an .npz file"),
    ],
)
def test_mistakes_are_one_line(exports, capsys, argv, expected):
    assert main([str(exports("defaults")), *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "\n" not in error and error.startswith(expected)


def test_a_path_that_is_nothing_is_told_from_a_name_of_the_hub(capsys):
    assert main([__file__, "--data_files", __file__, "--retrieve"]) == 2
    error = f'MODEL = "{__file__}" is a file: give the folder of an exported model, or a Hub name'
    assert capsys.readouterr().err.splitlines() == [error]
    assert main(["./nosuch", "--data_files", __file__, "--retrieve"]) == 2
    error = 'MODEL = "./nosuch": no such file or folder here: give the folder of an exported model, or a Hub name'
    assert capsys.readouterr().err.splitlines() == [error]


def test_what_has_no_summaries_is_told(workspace, tmp_path):
    with pytest.raises(UserError, match=r"future_modules.safetensors: no such file: give the export"):
        load_modules(tmp_path, CPU)
    run_here(workspace, tmp_path / "run", training__steps=1, checkpoint__export_hf=True, future_encoder__target="random")
    with pytest.raises(UserError, match=r'future_encoder.target = "random": its summaries come from what is not exported'):
        load_modules(tmp_path / "run" / "hf", CPU)
