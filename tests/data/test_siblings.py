"""Siblings: that documents are what they should be, which pairs are trained on, the tokenizer, and how samples are judged."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flame.config.schema import Corpus
from flame.data.encoding import encode_document, find_separator
from flame.data.tasks.generated import ENDLESS, GeneratedDocuments
from flame.data.tasks.siblings import SiblingsOptions, deal_children, judge_samples
from flame.data.tokenizer import build_bytes_tokenizer, load_tokenizer
from flame.errors import UserError
from tests.support.runs import run_here
from tests.support.sources import list_unused_data_options, open_ids, open_source, read_faults

CORPUS = Corpus(dataset="siblings")
SMALL = SiblingsOptions(parents=2, children=20)


def load_siblings(options: SiblingsOptions):
    return load_tokenizer("siblings", find_options=lambda _: options)


def parse(document: str) -> tuple[int, int, int]:
    """First child, second child and parent."""
    assert document.startswith("=")
    children, parent = document[1:].split("/")
    first, second = children.split(",")
    return int(first), int(second), int(parent)


def list_families(siblings: SiblingsOptions) -> list[set[int]]:
    return [set(row) for row in deal_children(siblings).tolist()]


def test_families_are_a_seeded_deal_of_all_labels():
    families = list_families(SiblingsOptions())
    assert [len(family) for family in families] == [500] * 5 and set.union(*families) == set(range(2500))
    assert families != list_families(SiblingsOptions(seed=1))
    assert all(60 < len(family & set(range(500))) < 140 for family in families)


@settings(max_examples=30, deadline=None)
@given(
    parents=st.integers(2, 64),
    children=st.integers(20, 1000),
    seed=st.integers(0, 2**31 - 1),
    number=st.integers(0, ENDLESS - 1),
    section=st.sampled_from(["training", "validation"]),
)
def test_documents_are_siblings_and_their_parent(parents, children, seed, number, section):
    """And their ids, generated as such or by way of text, are those of the text."""
    siblings = SiblingsOptions(parents=parents, children=children, seed=seed)
    text = open_source(CORPUS, section, siblings).read(number)
    first, second, parent = parse(text)
    assert first != second and {first, second} <= list_families(siblings)[parent]
    for tokenizer in (load_siblings(siblings), build_bytes_tokenizer()):
        documents = open_ids(CORPUS, section, tokenizer, siblings)
        assert isinstance(documents, GeneratedDocuments)
        assert documents.read(number).tolist() == encode_document(tokenizer, text).tolist()


@pytest.mark.parametrize("pairs", [0, 400])
def test_one_pair_in_eight_is_held_out_in_both_orders(pairs):
    siblings = SiblingsOptions(parents=2, children=20, pairs=pairs)
    trained, held_out = (open_source(CORPUS, section, siblings) for section in ("training", "validation"))
    assert len(trained) == (pairs or ENDLESS) and len(held_out) == ENDLESS
    shown = [parse(text)[:2] for block in range(1 if pairs else 8) for text in trained.read_block_texts(block)][: pairs or None]
    kept = [parse(text)[:2] for text in held_out.read_block_texts(0)]
    unordered = [{frozenset(pair) for pair in pairs} for pairs in (shown, kept)]
    assert not unordered[0] & unordered[1]
    assert set(kept) == {(b, a) for a, b in kept}
    if pairs:
        return
    assert len(unordered[0]) + len(unordered[1]) == 2 * math.comb(20, 2)
    assert 0.06 < len(unordered[1]) / (2 * math.comb(20, 2)) < 0.2
    counts = Counter(shown)
    assert len(counts) == 2 * len(unordered[0])
    expected = len(shown) / len(counts)
    deviation = sum((count - expected) ** 2 / expected for count in counts.values()) / len(counts)
    assert 0.8 < deviation < 1.2  # evenly, as by chance


def test_the_tokenizer_is_one_token_a_word_and_is_exported(tmp_path: Path):
    built = load_siblings(SMALL)
    assert len(built) == 2 * 21 + 2 and built.eos_token_id == 43 and find_separator(built, "=") == 42
    built.save_pretrained(tmp_path)
    source = open_source(CORPUS, "training", SMALL)
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for number in range(50):
            text = source.read(number)
            first, second, parent = parse(text)
            ids = encode_document(tokenizer, text).tolist()
            assert ids == [42, first, second, 40 + parent, 43]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    with pytest.raises(UserError, match="training runs only"):
        load_tokenizer("siblings")


def test_samples_are_judged_one_by_one():
    tokenizer = load_siblings(SMALL)
    trained, held_out = (open_source(CORPUS, section, SMALL) for section in ("training", "validation"))
    a, b, parent = parse(held_out.read(0))
    stranger = min(list_families(SMALL)[1 - parent])
    written = {  # text: coherent, held out, not yet seen
        f"{a},{b}/{parent}": (1, 1, 1),
        f"{b},{a}/{parent}": (1, 1, 0),
        trained.read(0)[1:]: (1, 0, 0),
        f"{a},{a}/{parent}": (0, 0, 0),
        f"{a},{stranger}/{parent}": (0, 0, 0),
        f"{a},{b}/{1 - parent}": (0, 0, 0),
        f"{a},{b},{parent}": (0, 0, 0),
        f"{a}/{parent}": (0, 0, 0),
        f"/0,{b}/{parent}": (0, 0, 0),
        "": (0, 0, 0),
    }
    samples = [encode_document(tokenizer, text).tolist() for text in written]
    samples[0] += [1, 2, 3]  # behind the end
    samples.append(encode_document(tokenizer, f"{a},{b}/{parent}").tolist()[:-1])  # not ended
    samples.append(encode_document(tokenizer, f"{a},{b}/{parent},{a}").tolist())  # ended too late
    judged = judge_samples(samples, SMALL)
    assert judged == pytest.approx([sum(column) / len(samples) for column in zip(*written.values(), strict=True)])
    assert judge_samples([[0]], SMALL) == (0, 0, 0)


def test_the_sources_own_samples_are_coherent():
    tokenizer = load_siblings(SiblingsOptions())
    for section, share in (("training", 0), ("validation", 1)):
        documents = open_ids(CORPUS, section, tokenizer, SiblingsOptions())
        samples = [documents.read(number)[1:].tolist() for number in range(100)]
        assert judge_samples([*samples, *samples], SiblingsOptions()) == (1, share, share / 2)


def test_a_run_validates_on_held_out_pairs(workspace, tmp_path: Path):
    changes = {
        "model__tokenizer_path": "siblings",
        "training__dataset": "siblings",
        "training__data_files": None,
        "training__loss_on": "answer",
        "training__seq_len": 100,
        "training__context_len": 8,
        "siblings__parents": 2,
        "siblings__children": 20,
        "validation__dataset": "siblings",
        "validation__interval": 3,
        "validation__num_sequences": 3,
    }
    rows = [row for row in run_here(workspace, tmp_path / "run", **changes) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["validation_ce_loss"] > (math.log(40) + math.log(19)) / 4 for row in rows)
    assert "validation_first_branch" not in rows[0]


BASE = ["--model.config", "configs/models/pathstar_cpu.json", "--model.tokenizer_path", "siblings"]


@pytest.mark.parametrize(
    "given_options, parts",
    [
        (BASE, ('model.tokenizer_path = "siblings"', 'training.dataset = "stdlib"')),
        ([*BASE, "--training.dataset", "siblings", "--training.context_len", "4"], ("training.context_len = 4", "5 tokens")),
        ([*BASE, "--training.dataset", "siblings", "--validation.holdout_every", "9"], ("holdout_every = 9",)),
    ],
)
def test_options_that_cannot_be_are_one_line(given_options, parts):
    (line,) = read_faults(given_options)
    assert line.isprintable() and all(part in line for part in parts)


def test_options_without_effect_are_listed():
    unused = list_unused_data_options([*BASE, "--training.dataset", "siblings", "--training.dataset_name", "a"])
    assert unused == ["training.dataset_name"]
