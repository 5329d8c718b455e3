"""Path-star graphs: that documents are what they should be, which graphs are trained on, and the tokenizer."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flame.config.schema import Corpus
from flame.data.batch import build_batch
from flame.data.document_streams import Cursor, open_document_stream
from flame.data.documents import WHOLE
from flame.data.encoding import encode_document, find_separator
from flame.data.packing import Chunk, Packer
from flame.data.tasks.generated import ENDLESS, GeneratedDocuments
from flame.data.tasks.pathstar import FEWEST_GRAPHS, PathstarOptions, Size, parse_sizes
from flame.data.tokenizer import build_bytes_tokenizer, load_tokenizer
from flame.errors import UserError
from flame.trainer.validation import judge_answers
from tests.support.refusals import expect_one_line
from tests.support.sources import list_unused_data_options, open_ids, open_source, read_faults

BASE = ["--model.config", "configs/models/pathstar_cpu.json", "--model.tokenizer_path", "pathstar"]
GRAPHS = [*BASE, "--training.dataset", "pathstar", "--training.dataset_name"]


def load_pathstar(labels: int):
    return load_tokenizer("pathstar", find_options=lambda kind: kind(labels=labels))


def open_graphs(sizes: str, section: str = "training", **options: int):
    return open_source(Corpus(dataset="pathstar", dataset_name=sizes), section, PathstarOptions(**options))


def parse(document: str) -> tuple[list[tuple[int, int]], int, int, list[int]]:
    """Edges, start, goal and answer."""
    graph, question = document.split("/")
    query, answer = question.split("=")
    start, goal = map(int, query.split(","))
    edges = [(int(u), int(v)) for u, v in (edge.split(",") for edge in graph.split("|"))]
    return edges, start, goal, list(map(int, answer.split(",")))


def find_arms(edges: list[tuple[int, int]], center: int) -> list[list[int]]:
    """Follow the edges from the center outwards; every edge is used exactly once."""
    following: dict[int, list[int]] = {}
    for u, v in edges:
        following.setdefault(u, []).append(v)
    arms = []
    for first in following.pop(center):
        arm = [first]
        while arm[-1] in following:
            (after,) = following.pop(arm[-1])
            arm.append(after)
        arms.append(arm)
    assert not following
    return arms


def name_graph(document: str) -> tuple:
    """What two documents of the same graph have in common."""
    edges, start, _, _ = parse(document)
    return frozenset(edges), start


def test_a_side_without_any_graph_does_not_search_for_ever():
    assert Size(7, 2).count_graphs(8) == 8 < FEWEST_GRAPHS  # refused in a run; none of them is held out
    with pytest.raises(AssertionError, match="no such content"):
        open_graphs("7x2", "validation", labels=8).read(105676)


@settings(max_examples=60, deadline=None)
@given(
    arms=st.integers(2, 10),
    nodes=st.integers(2, 10),
    spare=st.integers(0, 10),
    number=st.integers(0, ENDLESS - 1),
    seed=st.integers(0, 2**31 - 1),
    section=st.sampled_from(["training", "validation"]),
)
def test_documents_are_path_stars_with_the_only_answer(arms, nodes, spare, number, seed, section):
    size = Size(arms, nodes)
    labels = max(size.num_nodes + spare, 8)
    assume(size.count_graphs(labels) >= FEWEST_GRAPHS)  # of fewer, which are refused, none may be on one side
    document = open_graphs(f"{arms}x{nodes}", section, labels=labels, seed=seed).read(number)
    edges, start, goal, answer = parse(document)
    found = find_arms(edges, start)
    assert [len(arm) for arm in found] == [nodes - 1] * arms
    seen = [start, *(node for arm in found for node in arm)]
    assert len(set(seen)) == len(seen) == size.num_nodes and set(seen) <= set(range(labels))
    (way,) = [arm for arm in found if arm[-1] == goal]
    assert answer == [start, *way]
    assert len(encode_document(load_pathstar(labels=labels), document)) == size.num_tokens


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=3),
    block=st.integers(0, 2**30 - 1),
    seed=st.integers(0, 2**31 - 1),
    section=st.sampled_from(["training", "validation"]),
    labels=st.sampled_from([21, 30, 10_000]),
)
def test_ids_are_those_of_the_text(sizes, block, seed, section, labels):
    """Whether generated as such or by way of text, and also by a tokenizer that came with exported weights."""
    names = ",".join(f"{arms}x{nodes}" for arms, nodes in sizes)
    corpus, options = Corpus(dataset="pathstar", dataset_name=names), PathstarOptions(labels=labels, seed=seed)
    tokenizer, texts = load_pathstar(labels=labels), build_bytes_tokenizer()
    source = open_source(corpus, section, options)
    documents = open_ids(corpus, section, tokenizer, options)
    written = open_ids(corpus, section, texts, options)
    assert isinstance(documents, GeneratedDocuments) and isinstance(written, GeneratedDocuments)
    size = documents.block_size
    assert size == written.block_size >= 16
    for number in (block * size, block * size + 1, block * size + size - 1):
        text = source.read(number)
        assert documents.read(number).tolist() == encode_document(tokenizer, text).tolist()
        assert written.read(number).tolist() == encode_document(texts, text).tolist()


def test_ids_are_not_made_by_way_of_text(monkeypatch, tmp_path: Path):
    def refuse(*_):
        raise AssertionError

    corpus, options = Corpus(dataset="pathstar", dataset_name="2x3"), PathstarOptions(labels=6)
    load_pathstar(labels=6).save_pretrained(tmp_path)
    monkeypatch.setattr("flame.data.tasks.generated.encode_document", refuse)
    for tokenizer in (load_pathstar(labels=6), load_tokenizer(str(tmp_path))):
        assert len(open_ids(corpus, "training", tokenizer, options).read(5)) == 19
    for tokenizer in (load_pathstar(labels=7), build_bytes_tokenizer()):
        with pytest.raises(AssertionError):
            open_ids(corpus, "training", tokenizer, options).read(5)


def test_labels_edges_and_goals_are_drawn_evenly():
    source = open_graphs("2x3", labels=6)
    documents = [parse(source.read(number)) for number in range(3000)]
    for counts, outcomes in (
        (Counter(start for _, start, _, _ in documents), 6),
        (Counter(answer[1] for _, _, _, answer in documents), 6),
        (Counter(edges.index((answer[0], answer[1])) for edges, _, _, answer in documents), 4),
        (Counter(edges.index((answer[1], answer[2])) for edges, _, _, answer in documents), 4),
    ):
        assert len(counts) == outcomes
        assert all(abs(count - 3000 / outcomes) < 0.25 * 3000 / outcomes for count in counts.values())


def test_documents_depend_on_seed_and_number_alone():
    source = open_graphs("2x3,5x5", labels=30, seed=7)
    documents = [source.read(number) for number in range(200)]
    again = pickle.loads(pickle.dumps(open_graphs("2x3,5x5", labels=30, seed=7)))
    assert [again.read(number) for number in reversed(range(200))] == documents[::-1]
    assert len({*documents, *(open_graphs("2x3,5x5", labels=30, seed=8).read(number) for number in range(200))}) == 400
    # what a seed means must not change from release to release
    assert open_graphs("2x3", labels=6).read(0) == FIRST_DOCUMENT


FIRST_DOCUMENT = "0,4|1,0|5,3|1,5/1,4=1,0,4"


def test_sizes_are_mixed_evenly():
    source = open_graphs("2x3, 3x3,5x5", labels=30)
    counts = Counter(source.read(number).count("|") for number in range(1500))
    assert set(counts) == {3, 5, 19} and all(400 < count < 600 for count in counts.values())


@pytest.mark.parametrize("graphs", [0, 300])
def test_held_out_graphs_are_never_trained_on(graphs):
    """Even among so few graphs that all of them occur."""
    trained = open_graphs("2x3", labels=6, graphs=graphs)
    held_out = open_graphs("2x3", "validation", labels=6, graphs=graphs)
    assert len(trained) == (graphs or ENDLESS) and len(held_out) == ENDLESS
    seen = {name_graph(trained.read(number)) for number in range(graphs or 8000)}
    kept = {name_graph(held_out.read(number)) for number in range(1500)}
    assert not seen & kept
    if not graphs:
        assert len(seen) + len(kept) == Size(2, 3).count_graphs(6) == 360
        assert 0.08 < len(kept) / 360 < 0.17


def test_a_fixed_set_comes_again_each_epoch_in_a_new_order():
    documents = open_ids(
        Corpus(dataset="pathstar", dataset_name="2x3"),
        "training",
        load_pathstar(labels=6),
        PathstarOptions(labels=6, graphs=50),
    )
    assert isinstance(documents, GeneratedDocuments)
    line = open_document_stream(documents, WHOLE, 0, 1, 5)
    cursor, epochs = line.first, {}
    for _ in range(150):
        entry = line.read(cursor)
        epochs.setdefault(entry.epoch, []).append(entry.document)
        cursor = entry.following
    assert [sorted(order) for order in epochs.values()] == [list(range(50))] * 3
    assert len({tuple(order) for order in epochs.values()}) == 3


def test_endless_sources_repeat_no_number_and_are_packed(monkeypatch):
    """Three streams, from block to block, and from the middle of one as from its beginning."""
    monkeypatch.setattr("flame.data.tasks.generated.LARGEST_BLOCK", 8)
    tokenizer = load_pathstar(labels=6)
    documents = open_ids(Corpus(dataset="pathstar", dataset_name="2x3"), "training", tokenizer, PathstarOptions(labels=6))
    seen: list[int] = []
    for index in range(3):
        stream = Packer(open_document_stream(documents, WHOLE, index, 3, 5), "pathstar", index, seq_len=190, context_len=64)
        cursor = stream.first_cursor
        for _ in range(20):
            sequence = stream.next_sequence(cursor)
            cursor = sequence.cursor
            seen += [chunk.document for chunk in sequence.documents]
            assert sequence.cu_seqlens.tolist() == list(range(0, 191, 19))
            whole = [documents.read(chunk.document).tolist() for chunk in sequence.documents]
            assert sequence.input_ids.tolist() == [token for document in whole for token in document]
        fresh = Packer(open_document_stream(documents, WHOLE, index, 3, 5), "pathstar", index, seq_len=190, context_len=64)
        assert fresh.next_sequence(Cursor(0, 3 * 13 + index, 0, 4)).documents[0] == Chunk(seen[200 * index + 13], 4, 19, 0, True)
    assert len(set(seen)) == len(seen) == 600 and max(seen) > ENDLESS // 2


def test_wrong_branches_and_wrong_ends_are_told_apart():
    """In a pack of held-out graphs of three sizes, cut at its end, where some answers take a wrong arm, some err at the end."""
    corpus, options = Corpus(dataset="pathstar", dataset_name="2x4,3x3,5x5"), PathstarOptions(labels=30)
    tokenizer = load_pathstar(labels=30)
    documents = open_ids(corpus, "validation", tokenizer, options)
    stream = Packer(open_document_stream(documents, WHOLE, 0, 1, 5), "a", 0, 2000, 80, find_separator(tokenizer, "="))
    batch = build_batch(stream.next_sequence(stream.first_cursor), 0)
    source, predictions = open_source(corpus, "validation", options), batch.input_ids[0].tolist()
    exact, branch = [], []
    for number, (chunk, end) in enumerate(zip(batch.documents, batch.cu_seqlens[1:].tolist(), strict=True)):
        if not chunk.is_last:
            assert end == 2000
            continue
        edges, start, _, answer = parse(source.read(chunk.document))
        places = range(end - 1 - len(answer), end - 1)
        assert [predictions[place] for place in places] == answer
        if number % 3 == 1:
            predictions[places[1]] = next(v for u, v in edges if u == start and v != answer[1])
        if number % 3 == 2:
            predictions[places[-1]] = start
        exact.append(number % 3 == 0)
        branch.append(number % 3 != 1)
    is_correct = torch.tensor([*predictions[1:], 0]) == batch.labels[0]
    judged = judge_answers(is_correct, batch)
    assert (judged.is_exact.tolist(), judged.has_second_token.tolist()) == (exact, branch)
    assert len(exact) == len(batch.documents) - 1 > 30


@pytest.mark.parametrize("labels", [6, 101])
def test_the_tokenizer_is_one_token_a_label_and_mark_and_is_exported(tmp_path: Path, labels: int):
    built = load_pathstar(labels=labels)
    assert len(built) == labels + 4 and built.eos_token_id == labels + 3
    source = open_graphs("2x3", labels=labels)
    built.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for number in range(50):
            text = source.read(number)
            ids = encode_document(tokenizer, text).tolist()
            expected = [int(w) if w.isdigit() else labels + "|/=".index(w) for w in split_words(text)]
            assert ids == [*expected, labels + 3]
            assert tokenizer.decode(ids[:-1]) == text
        assert (len(tokenizer), tokenizer.eos_token) == (labels + 4, "<|endoftext|>")


def split_words(text: str) -> list[str]:
    for mark in "|/=":
        text = text.replace(mark, f" {mark} ")
    return text.replace(",", " ").split()


def test_separators_are_one_token():
    graphs, texts = load_pathstar(labels=6), build_bytes_tokenizer()
    assert find_separator(graphs, "=") == 8 and find_separator(texts, "=") == ord("=")
    for tokenizer, text in ((graphs, ""), (graphs, "=="), (graphs, "?"), (graphs, ","), (texts, "=>"), (texts, "é"), (texts, "")):
        with pytest.raises(UserError) as caught:
            find_separator(tokenizer, text)
        expect_one_line(caught.value, "training.answer_separator = ", "exactly one")


def test_sizes_as_text():
    assert parse_sizes("2x3, 10x10") == [Size(2, 3), Size(10, 10)]
    assert Size(5, 5).num_nodes == 21 and str(Size(5, 5)) == "5x5"
    for wrong in ("", "5", "5x", "x5", "1x5", "5x1", "2x3,", "-2x3", "2x3x4", "5 by 5", "٣x5"):
        with pytest.raises(ValueError):
            parse_sizes(wrong)


@pytest.mark.parametrize(
    "options, parts",
    [
        ([*GRAPHS, "5"], ('training.dataset_name = "5"', '"5x5"')),
        ([*GRAPHS[:-1]], ('training.dataset_name = ""', '"5x5"')),
        ([*GRAPHS, "5x5", "--pathstar.labels", "20"], ("pathstar.labels = 20", "training.dataset_name", "5x5 has 21 nodes")),
        ([*GRAPHS, "2x3", "--pathstar.labels", "5"], ("pathstar.labels = 5 leaves 60 graphs", "at least 300")),
        ([*GRAPHS, "5x5", "--training.context_len", "68"], ("training.context_len = 68", "69 tokens")),
        ([*GRAPHS, "5x5", "--training.data_files", "a"], ("training.data_files",)),
        ([*GRAPHS, "5x5", "--validation.holdout_every", "9"], ("validation.holdout_every = 9", "validation.dataset")),
        (
            [*GRAPHS, "5x5", "--validation.dataset", "stdlib", "--validation.interval", "5"],
            ('model.tokenizer_path = "pathstar"', 'validation.dataset = "stdlib"'),
        ),
        (BASE, ('model.tokenizer_path = "pathstar"', 'training.dataset = "stdlib"')),
    ],
)
def test_options_that_cannot_be_are_one_line(options, parts):
    (line,) = read_faults(options)
    assert line.isprintable() and all(part in line for part in parts)


@pytest.mark.parametrize(
    "options, unused",
    [
        ([*GRAPHS, "5x5"], []),
        ([*GRAPHS, "5x5", "--pathstar.graphs", "9", "--siblings.pairs", "9"], ["siblings.pairs"]),
        ([*GRAPHS, "5x5", "--training.text_column", "a"], ["training.text_column"]),
        ([*GRAPHS, "5x5", "--training.streaming", "true"], ["training.streaming"]),
        ([*GRAPHS, "5x5", "--training.answer_separator", "|"], ["training.answer_separator"]),
        ([*BASE[:3], "bytes", "--pathstar.graphs", "9"], ["pathstar.graphs"]),
    ],
)
def test_options_without_effect_are_listed(options, unused):
    assert list_unused_data_options(options) == unused


def test_the_tokenizer_exists_in_runs_only():
    with pytest.raises(UserError, match="training runs only"):
        load_tokenizer("pathstar")
