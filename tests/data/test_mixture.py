"""Sources mixed by weight, each packed by itself."""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.config.schema import JobConfig, Source, Training, Validation
from flame.data.encoding import encode_document
from flame.data.loader import PackedLoader
from flame.data.mixture import Mixture, open_held_out, open_mixture
from flame.data.state import DataState, merge_states
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.support.documents import ListSource, tokenize_rows

TOKENIZER = load_tokenizer("bytes")
TEXTS = {
    "web": ["w" * (1 + 7 * i % 90) for i in range(23)],
    "code": ["c" * (1 + 11 * i % 50) for i in range(31)],
    "rare": ["r" * 400],
}


def make_training(num_streams: int) -> Training:
    return Training(num_streams=num_streams, num_workers=0, seq_len=32, context_len=20, seed=1)


def make_mixture(**weights: float) -> Mixture:
    encode = partial(encode_document, TOKENIZER)
    sources = [tokenize_rows(ListSource(list(TEXTS[name])), encode, name) for name in weights]
    return Mixture(tuple(sources), tuple(weights.values()))


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    num_streams=st.integers(1, 300),
    start=st.integers(0, 10**9),
)
def test_shares_hold_in_any_run_of_sequences(weights: list[float], num_streams: int, start: int) -> None:
    mixture = Mixture(tuple(ListSource([]) for _ in weights), tuple(weights))  # type: ignore[arg-type]
    count = 600
    chosen = [mixture.choose(start + j, num_streams) for j in range(count)]
    for index, weight in enumerate(weights):
        assert abs(chosen.count(index) - count * weight / sum(weights)) <= 30


def test_a_source_without_weight_is_never_drawn_and_extreme_weights_add_up() -> None:
    for weights, drawn in (((0.0, 1.0, 0.0), {1}), ((1e308, 1e308, 0.0), {0, 1}), ((0.0, 0.0, 5e-324), {2})):
        mixture = Mixture(tuple(ListSource([]) for _ in weights), weights)  # type: ignore[arg-type]
        assert {mixture.choose(j, 8) for j in range(500)} == drawn


@pytest.mark.parametrize("num_streams", [1, 2, 8, 89, 144, 192])
def test_shares_hold_to_a_few_sequences_in_the_long_run(num_streams: int) -> None:
    """Over all sequences, and within each stream: 89 and 144 are Fibonacci numbers, where the golden ratio alone would fail."""
    mixture = Mixture(tuple(ListSource([]) for _ in range(3)), (0.7, 0.25, 0.05))  # type: ignore[arg-type]
    rounds = max(64, 3000 // num_streams)
    chosen = [mixture.choose(j, num_streams) for j in range(num_streams * rounds)]
    for index, share in enumerate((0.7, 0.25, 0.05)):
        assert abs(chosen.count(index) - share * len(chosen)) < 0.01 * len(chosen)
        for stream in range(num_streams):
            own = chosen[stream::num_streams]
            assert abs(own.count(index) - share * len(own)) < 6, (stream, index)


def read_streams(mixture: Mixture, num_streams: int, count: int) -> dict[tuple[str, int], list[list[int]]]:
    """Sequences in order, by source and stream."""
    loader = PackedLoader(make_training(num_streams), mixture, 0, 1, DataState(num_streams, 1))
    found: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
    for batch in itertools.islice(loader, count):
        found[batch.source, batch.stream].append(batch.input_ids[0].tolist())
    return found


def test_weights_change_nothing_but_how_often_a_source_is_drawn() -> None:
    """Each source's streams are those of the source alone, whatever the weights and the company."""
    alone = {name: read_streams(make_mixture(**{name: 1.0}), 6, 300) for name in TEXTS}
    for weights in ({"web": 1.0, "code": 1.0}, {"web": 0.9, "code": 0.05, "rare": 0.05}):
        mixed = read_streams(make_mixture(**weights), 6, 240)
        assert {name for name, _ in mixed} == set(weights)
        for (name, stream), sequences in mixed.items():
            assert sequences == alone[name][name, stream][: len(sequences)]


def test_resuming_on_other_world_sizes_with_other_weights_goes_on_in_each_stream() -> None:
    alone = {name: read_streams(make_mixture(**{name: 1.0}), 12, 400) for name in TEXTS}
    found: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
    saved = DataState(12, 1).state_dict()
    for world, steps, weights in (
        (1, 30, {"web": 3.0, "code": 1.0}),
        (4, 9, {"web": 1.0, "code": 1.0, "rare": 0.5}),
        (3, 11, {"code": 1.0}),
        (2, 15, {"web": 1.0, "code": 2.0}),
    ):
        states = []
        for rank in range(world):
            state = DataState(12, 1)
            state.load_state_dict(saved)
            batches = list(itertools.islice(PackedLoader(make_training(12), make_mixture(**weights), rank, world, state), steps))
            state.advance(batches, world)
            for batch in batches:
                found[batch.source, batch.stream].append(batch.input_ids[0].tolist())
            states.append(state)
        saved = merge_states(states).state_dict()
    assert sum(map(len, found.values())) == 30 + 36 + 33 + 30
    for (name, stream), sequences in found.items():
        assert sequences == alone[name][name, stream][: len(sequences)]


def test_opening_from_options(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(10)))
    sources = {
        name: Source(dataset="json", data_files=f"{tmp_path}/{name}.jsonl", weight=w) for name, w in (("b", 1.0), ("a", 2.0))
    }
    config = JobConfig(training=make_training(2), sources=sources, validation=Validation(holdout_every=5))
    mixture = open_mixture(config, TOKENIZER)
    assert [source.name for source in mixture.sources] == ["a", "b"] and mixture.weights == (2.0, 1.0)
    assert mixture.count_units() == {"a": 8, "b": 8}
    held_out = open_held_out(config, TOKENIZER, mixture)
    for opened, rows in ((mixture, {1, 2, 3, 4, 6, 7, 8, 9}), (held_out, {0, 5})):
        found = defaultdict(set)
        loader = PackedLoader(config.training, opened, 0, 1, DataState(2, 1))
        for batch in itertools.islice(loader, 30):
            found[batch.source] |= {chunk.document for chunk in batch.documents}
        assert found == {"a": rows, "b": rows}
    config.validation = Validation(dataset="json", data_files=f"{tmp_path}/b.jsonl")
    assert open_held_out(config, TOKENIZER, mixture).count_units() == {"json": 10}


def test_sizes_that_cannot_work_are_refused(tmp_path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "x"}\n')
    files = f"{tmp_path}/one.jsonl"
    config = JobConfig(training=Training(dataset="json", data_files=files), validation=Validation(holdout_every=2))
    with pytest.raises(UserError) as refusal:
        open_mixture(config, TOKENIZER)
    assert str(refusal.value) == (
        'training.dataset = "json" has 1 document, which validation.holdout_every = 2 holds out: give more documents, or set '
        "validation.holdout_every = 0 and, to validate, validation.dataset"
    )
    config.validation = Validation(interval=1, dataset="json", data_files=files)
    assert not list(config.validation.find_conflicts(config, "validation"))
    mixture = open_mixture(config, TOKENIZER)
    assert mixture.count_units() == open_held_out(config, TOKENIZER, mixture).count_units() == {"json": 1}
    config = JobConfig(training=Training(dataset="json", data_files=files, streaming=True, num_streams=2))
    with pytest.raises(UserError, match=r"has 1 shards, fewer than training\.num_streams = 2"):
        open_mixture(config, TOKENIZER)


def test_streams_that_share_documents_are_told(tmp_path) -> None:
    """Each of the 6 streams begins with one of the 2 documents, 3 streams with the same."""
    (tmp_path / "two.jsonl").write_text('{"text": "abcdefgh"}\n{"text": "ABCDEFGH"}\n')
    training = Training(dataset="json", data_files=f"{tmp_path}/two.jsonl", num_streams=6, seq_len=8, context_len=8)
    mixture = open_mixture(JobConfig(training=training), TOKENIZER)
    (line,) = mixture.list_shared(6)
    assert line.startswith("json: 2 documents are fewer than training.num_streams = 6, so up to 3 streams read the same")
    firsts = [mixture.open_packer(0, stream, 6, training) for stream in range(6)]
    chunks = [packer.next_sequence(packer.first_cursor).documents[0] for packer in firsts]
    assert sorted(chunk.document for chunk in chunks) == [0, 0, 0, 1, 1, 1]
    assert {chunk.epoch for chunk in chunks} == {0, 1, 2} and {chunk.start for chunk in chunks} == {0}
    assert mixture.list_shared(2) == []
