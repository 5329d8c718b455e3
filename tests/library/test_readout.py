"""The linear read-out of later tokens, on states that hold them and on states that do not."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flame.cli.embed import main as embed
from flame.cli.readout import main
from flame.library.readout import fit, measure, pair_ahead
from flame.library.texts import pack
from tests.support.library import VOCAB, build

CPU = torch.device("cpu")


def draw_documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_pairs_stay_in_their_document(lengths, horizon):
    documents = draw_documents(lengths)
    states = [torch.arange(len(each)).float()[:, None] + 100 * index for index, each in enumerate(documents)]
    found = pair_ahead(states, documents, horizon)
    expected = [
        (states[number][t].item(), tokens[t + horizon].item())
        for number, tokens in enumerate(documents)
        for t in range(len(tokens))
        if t + horizon < len(tokens)
    ]
    assert list(zip(found[0][:, 0].tolist(), found[1].tolist(), strict=True)) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 20))
def test_packs_hold_whole_documents_in_order(lengths, most):
    documents = draw_documents(lengths)
    found = []
    for tokens, cu_seqlens in pack(documents, most):
        assert len(tokens) <= most or len(cu_seqlens) == 2
        found += tokens.split(cu_seqlens.diff().tolist())
    assert [each.tolist() for each in found] == [each.tolist() for each in documents]


def draw_pairs(count: int, seed: int, strength: float) -> tuple[Tensor, Tensor]:
    """States that hold their token by so much, beside noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 8, (count,), generator=generator) ** 2 % 8
    noise = torch.randn(count, 16, generator=generator)
    return strength * torch.nn.functional.one_hot(tokens, 16).float() + noise, tokens


def test_what_a_state_holds_is_read():
    """Against the best that can be read: the posterior of a one-hot code under unit noise."""
    seen, asked = draw_pairs(6000, 0, 4.0), draw_pairs(3000, 1, 4.0)
    found = fit(seen, asked, 16, 1, CPU, seed=0)
    frequencies = torch.bincount(seen[1], minlength=16).double() / len(seen[1])
    best = torch.log_softmax(4.0 * asked[0].double() + frequencies.log(), dim=-1)
    expected = -best[torch.arange(3000), asked[1]].mean().item()
    assert expected <= found.loss + 0.01 and found.loss < expected + 0.05
    assert found.accuracy == pytest.approx((best.argmax(-1) == asked[1]).double().mean().item(), abs=0.02)
    assert found.pairs == 3000 and found.known == found.unigram - found.loss


def test_noise_tells_nothing():
    seen, asked = draw_pairs(6000, 0, 0.0), draw_pairs(3000, 1, 0.0)
    found = fit(seen, asked, 16, 1, CPU, seed=0)
    counts = torch.bincount(seen[1][:5400], minlength=16).double() + 0.5
    assert found.unigram == pytest.approx(-(counts / counts.sum()).log()[asked[1]].mean().item(), rel=1e-5)
    assert -0.01 < found.known < 0.01


def test_the_next_token_of_a_pattern_is_in_the_states():
    """Documents count up: the state of a random network knows the current token, and so the one k later."""
    lm = build()
    train, test = ([(torch.arange(20) + start) % VOCAB for start in range(first, first + 40)] for first in (0, 7))
    found = list(measure(lm, train, test, [1, 3, 19, 20], 64))
    assert [each.horizon for each in found] == [1, 3, 19] and [each.pairs for each in found] == [40 * 19, 40 * 17, 40]
    assert all(each.known > 1.0 for each in found[:2])


def test_too_few_pairs_are_no_measurement():
    """None would be left that chooses the epoch, and the read-out would stay untrained."""
    lm, test = build(), draw_documents([9], seed=1)
    found = list(measure(lm, draw_documents([6, 6]), test, [1, 3, 4, 5], 64))
    assert [each.horizon for each in found] == [1, 3]
    assert [each.horizon for each in measure(lm, draw_documents([6]), test, [1, 2], 64)] == [1]


def test_the_command_reads_an_export(workspace, exported_run, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"alpha beta gamma {number}"}) + "\n" for number in range(10)))
    argv = [str(exported_run / "hf"), "--data_files", str(texts), "--device", "cpu", "--horizons", "1", "4"]
    assert main([*argv, "--out", str(tmp_path / "out.csv")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("8 documents to learn from, 2 held out") and len(printed) == 4
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["horizon"] for row in rows] == ["1", "4"] and all(float(row["loss_nats"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["/nosuch"], 'MODEL = "/nosuch": no such file or folder here: give the folder of an exported model, or a Hub name'),
        (["--horizons", "0"], "--horizons 0: allowed are integers > 0"),
        (["--horizons", "99"], "--horizons 99: no held-out document is longer"),
        (["--tokens", "20"], "--data_files "),
        (["--dataset", "siblings"], '--dataset = "siblings" has options of its own, [siblings]'),
        (["--dataset", "tokens"], '--dataset = "tokens" is tokens already: give text'),
        (["--data_files", "nothing.jsonl"], '--data_files: "nothing.jsonl" matches no file'),
    ],
)
def test_mistakes_are_one_line(exported_run, tmp_path, capsys, changes, expected):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "alpha beta gamma"}) + "\n" for _ in range(10)))
    assert main(["--data_files", str(texts), "--device", "cpu", str(exported_run / "hf"), *changes]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith(expected), error


def test_a_runs_folder_is_told_from_its_export(exported_run, tmp_path, capsys):
    """Also before a model is loaded that stands before it; and a tokenizer is said to be the model's."""
    checkpoint = max((exported_run / "checkpoint").glob("step-*"))
    without = tmp_path / "without"
    (without / "checkpoint" / "step-2").mkdir(parents=True)
    (without / "checkpoint" / "step-2" / "trainer.json").touch()
    mine = tmp_path / "mine.json"
    mine.write_text('{"model_type": "llama"}')
    empty = tmp_path / "empty"
    empty.mkdir()
    convert = "give what flame-convert-dcp-to-hf --checkpoint {} --out FOLDER writes"
    for folder, expected in (
        (exported_run, f' is a run\'s folder: give "{exported_run / "hf"}"'),
        (checkpoint, f" is a checkpoint: {convert.format(checkpoint)}"),
        (without, f" is a run's folder without an export: {convert.format(without / 'checkpoint' / 'step-2')}"),
        (empty, " holds no weights: give the folder of an exported model, or a Hub name"),
        (mine, " is a file: give the folder of an exported model, or a Hub name"),
    ):
        assert main([str(folder), "--data_files", __file__, "--dataset", "text", "--device", "cpu"]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and error.startswith(f'MODEL = "{folder}"{expected}'), error


@pytest.mark.parametrize("command", [main, embed], ids=["readout", "embed"])
def test_texts_are_cut_at_the_positions_of_the_model(exported_run, tmp_path, capsys, command):
    """Of the one with the fewest, where several are compared."""
    short = shutil.copytree(exported_run / "hf", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    texts = tmp_path / "texts.jsonl"
    texts.write_text(10 * (json.dumps({"text": "alpha beta gamma delta epsilon"}) + "\n"))
    models, more = ([str(exported_run / "hf")], ["--horizons", "1"]) if command is main else ([], ["--retrieve"])
    argv = [*models, str(short), "--data_files", str(texts), "--device", "cpu", *more]
    assert command(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    if command is main:
        assert [line.split()[1] for line in printed if line.split()[0] == "1"] == ["30", "30"]
    for longest, code in (("16", 0), ("17", 2)):
        assert command([*argv, "--longest", longest]) == code
    expected = f'--longest 17: MODEL = "{short}" has max_position_embeddings: 16; give at most that'
    assert capsys.readouterr().err.strip() == expected
