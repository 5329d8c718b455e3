from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.data.document_streams import Cursor, IndexedStream, ShardStream
from flame.data.documents import Subset
from flame.data.order import shuffled_index
from flame.data.packing import PackedSequence, Packer
from flame.errors import UserError
from tests.support.documents import Documents, ListSource, encode_numbers, pack_plainly, tokenize_rows, tokenize_shards

lengths = st.lists(st.one_of(st.none(), st.integers(1, 12)), min_size=1, max_size=8).filter(any)


def number_tokens(lengths: list[int | None]) -> Documents:
    """Documents of the given lengths in which each token occurs once in the corpus. None is a bad row."""
    return [None if length is None else [100 * i + j for j in range(length)] for i, length in enumerate(lengths)]


def open_packer(documents: Documents, index: int, num_streams: int, seq_len: int, context_len: int, seed: int) -> Packer:
    rows = [None if tokens is None else " ".join(map(str, tokens)) for tokens in documents]
    return pack_source(ListSource(rows), index, num_streams, seq_len, context_len, seed)


def pack_source(source: ListSource, index: int, num_streams: int, seq_len: int, context_len: int, seed: int) -> Packer:
    line = IndexedStream(tokenize_rows(source, encode_numbers), Subset(), index, num_streams, seed)
    return Packer(line, source.name, index, seq_len, context_len)


def take(stream: Packer, count: int, cursor: Cursor | None = None) -> list[PackedSequence]:
    sequences: list[PackedSequence] = []
    cursor = cursor or stream.first_cursor
    for _ in range(count):
        sequences.append(stream.next_sequence(cursor))
        cursor = sequences[-1].cursor
    return sequences


def summarize(sequence: PackedSequence) -> tuple:
    return sequence.input_ids.tolist(), sequence.cu_seqlens.tolist(), sequence.documents, sequence.cursor, sequence.bad_rows


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths,
    num_streams=st.integers(1, 12),
    seq_len=st.integers(1, 20),
    context_len=st.integers(1, 20),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_equals_the_plain_packer(
    lengths: list[int | None], num_streams: int, seq_len: int, context_len: int, seed: int, data: st.DataObject
) -> None:
    documents = number_tokens(lengths)
    index = data.draw(st.integers(0, num_streams - 1))
    epochs = 40
    expected = pack_plainly(documents, index, num_streams, seq_len, context_len, seed, epochs)[:-1][:12]
    sequences = take(open_packer(documents, index, num_streams, seq_len, context_len, seed), len(expected))
    for sequence, (tokens, chunks) in zip(sequences, expected, strict=True):
        assert sequence.input_ids.tolist() == tokens
        assert sequence.documents == chunks
        boundaries = [0]
        for chunk in chunks:
            boundaries.append(boundaries[-1] + chunk.end - chunk.start)
        assert sequence.cu_seqlens.tolist() == boundaries
        assert (sequence.input_ids.dtype, sequence.cu_seqlens.dtype, sequence.stream) == ("int64", "int32", index)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, num_streams=st.integers(1, 5), seq_len=st.integers(1, 20), context_len=st.integers(1, 20))
def test_every_token_of_every_epoch_comes_exactly_once(
    lengths: list[int | None], num_streams: int, seq_len: int, context_len: int
) -> None:
    documents, epochs = number_tokens(lengths), 3
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in range(num_streams):
        stream = open_packer(documents, index, num_streams, seq_len, context_len, seed=1)
        cursor = stream.first_cursor
        while cursor.epoch < epochs:
            sequence = stream.next_sequence(cursor)
            cursor = sequence.cursor
            for chunk in sequence.documents:
                seen[chunk.epoch, chunk.document].extend(range(chunk.start, chunk.end))
    expected = {
        (epoch, document): list(range(length)) for epoch in range(epochs) for document, length in enumerate(lengths) if length
    }
    assert {key: tokens for key, tokens in seen.items() if key[0] < epochs} == expected


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, seq_len=st.integers(1, 20), context_len=st.integers(1, 20), start=st.integers(0, 9))
def test_any_recorded_cursor_reproduces_the_rest(lengths: list[int | None], seq_len: int, context_len: int, start: int) -> None:
    arguments = (number_tokens(lengths), 1, 3, seq_len, context_len, 5)
    sequences = take(open_packer(*arguments), 12)
    assert [s.cursor for s in sequences] == sorted(s.cursor for s in sequences)
    fresh, used = open_packer(*arguments), open_packer(*arguments)
    take(used, 4)
    for stream in (fresh, used):
        rest = take(stream, 12 - start - 1, sequences[start].cursor)
        assert list(map(summarize, rest)) == list(map(summarize, sequences[start + 1 :]))


def test_bad_rows_are_counted_once() -> None:
    documents: Documents = [[1, 2], None, None, [3], None]
    sequences = take(open_packer(documents, 0, 1, seq_len=3, context_len=3, seed=0), 20)
    last = sequences[-1].documents[-1]
    passed = [(epoch, shuffled_index(position, 5, 0, epoch)) for epoch in range(last.epoch + 1) for position in range(5)]
    passed = passed[: passed.index((last.epoch, last.document))]
    assert sum(s.bad_rows for s in sequences) == sum(documents[document] is None for _, document in passed)
    assert {token for s in sequences for token in s.input_ids.tolist()} == {1, 2, 3}


class CountingSource(ListSource):
    reads = 0

    def read(self, index: int) -> str | None:
        self.reads += 1
        return super().read(index)


def test_only_the_current_document_is_read() -> None:
    """Seeking does not replay: a cursor in the middle of the corpus costs the documents that its sequence needs."""
    source = CountingSource([f"{i} {i} {i} {i}" for i in range(100)])
    pack_source(source, 0, 1, 4, 4, 0).next_sequence(Cursor(7, 50, 0, 2))
    assert source.reads == 2


def test_corpus_without_text_is_refused_after_a_bounded_search() -> None:
    source = CountingSource([None] * 7)
    stream = pack_source(source, 2, 3, 4, 4, 0)
    message = 'training.dataset = "list" yields no usable text: 7 rows read, all empty, not text or undecodable'
    with pytest.raises(UserError, match=message) as caught:
        stream.next_sequence(stream.first_cursor)
    assert len(caught.value.lines) == 1
    assert source.reads <= 2 * 7


def test_one_good_row_among_many_is_enough_for_every_stream() -> None:
    """Each epoch deals the row to another stream: some wait for it longer than the number of rows."""
    documents: Documents = [None] * 5 + [[1, 2]]
    for index in range(6):
        sequence = open_packer(documents, index, 6, 2, 2, 0).next_sequence(Cursor(0, index, 0, 0))
        assert sequence.input_ids.tolist() == [1, 2]


@dataclass
class ListShards:
    """A streaming source that counts the rows it hands out."""

    shards: list[list[str | None]]
    name: str = "list"
    option: str = 'training.dataset = "list"'
    rows_read: int = 0

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read_shard(self, shard: int, row: int) -> Iterator[str | None]:
        for text in self.shards[shard][row:]:
            self.rows_read += 1
            yield text


def stream_shards(
    source: ListShards, index: int, num_streams: int, seq_len: int, context_len: int, part: Subset | None = None
) -> Packer:
    shards = tokenize_shards(source, encode_numbers)  # type: ignore[arg-type]
    return Packer(ShardStream(shards, part or Subset(), index, num_streams, 5), source.name, index, seq_len, context_len)


shard_lists = st.lists(st.lists(st.one_of(st.none(), st.integers(1, 9)), max_size=5), min_size=1, max_size=5).filter(
    lambda shards: any(any(shard) for shard in shards)
)


def number_shards(lengths: list[list[int | None]]) -> ListShards:
    shards = []
    for i, shard in enumerate(lengths):
        numbers = [None if length is None else [1000 * i + 100 * j + k for k in range(length)] for j, length in enumerate(shard)]
        shards.append([None if ids is None else " ".join(map(str, ids)) for ids in numbers])
    return ListShards(shards)


@settings(max_examples=60, deadline=None)
@given(lengths=shard_lists, num_streams=st.integers(1, 5), seq_len=st.integers(1, 20), context_len=st.integers(1, 20))
def test_every_token_of_every_shard_comes_exactly_once_an_epoch(
    lengths: list[list[int | None]], num_streams: int, seq_len: int, context_len: int
) -> None:
    epochs = 2
    seen: dict[tuple[int, int | str], list[int]] = defaultdict(list)
    for index in range(num_streams):
        stream = stream_shards(number_shards(lengths), index, num_streams, seq_len, context_len)
        cursor = stream.first_cursor
        while cursor.epoch < epochs:
            sequence = stream.next_sequence(cursor)
            cursor = sequence.cursor
            for chunk, start in zip(sequence.documents, sequence.cu_seqlens, strict=False):
                seen[chunk.epoch, chunk.document].extend(range(chunk.start, chunk.end))
                shard, row = map(int, str(chunk.document).split("/"))
                assert sequence.input_ids[start] == 1000 * shard + 100 * row + chunk.start
    expected = {
        (epoch, f"{i}/{j}"): list(range(length))
        for epoch in range(epochs)
        for i, shard in enumerate(lengths)
        for j, length in enumerate(shard)
        if length
    }
    assert {key: tokens for key, tokens in seen.items() if key[0] < epochs} == expected


@settings(max_examples=60, deadline=None)
@given(lengths=shard_lists, seq_len=st.integers(1, 20), context_len=st.integers(1, 20), start=st.integers(0, 9))
def test_any_cursor_of_shards_reproduces_the_rest(
    lengths: list[list[int | None]], seq_len: int, context_len: int, start: int
) -> None:
    arguments = (0, 1, seq_len, context_len)
    sequences = take(stream_shards(number_shards(lengths), *arguments), 12)
    assert [s.cursor for s in sequences] == sorted(s.cursor for s in sequences)
    used = stream_shards(number_shards(lengths), *arguments)
    take(used, 4)
    for stream in (stream_shards(number_shards(lengths), *arguments), used):
        rest = take(stream, 12 - start - 1, sequences[start].cursor)
        assert list(map(summarize, rest)) == list(map(summarize, sequences[start + 1 :]))


def test_shards_without_text_are_refused_after_a_bounded_search() -> None:
    source = ListShards([[None] * 3, [], [None]])
    stream = stream_shards(source, 0, 1, 4, 4)
    with pytest.raises(UserError, match="yields no usable text: 3 shards read"):
        stream.next_sequence(stream.first_cursor)
    assert source.rows_read <= 3 * 4


def test_one_shard_with_text_among_many_is_enough_for_every_stream() -> None:
    source = ListShards([[None]] * 5 + [["1 2"]])
    for index in range(6):
        stream = stream_shards(source, index, 6, 2, 2)
        assert stream.next_sequence(stream.first_cursor).input_ids.tolist() == [1, 2]


@given(rows=st.integers(0, 60), every=st.integers(2, 9))
def test_held_out_rows_and_the_others_are_a_partition(rows: int, every: int) -> None:
    trained, held_out = Subset(every), Subset(every, is_held_out=True)
    lists = [[part.locate(index) for index in range(part.count(rows))] for part in (trained, held_out)]
    assert lists[1] == list(range(0, rows, every))
    assert sorted(lists[0] + lists[1]) == list(range(rows))
    assert lists == [[row for row in range(rows) if part.includes(row)] for part in (trained, held_out)]
    assert Subset().count(rows) == rows and Subset().locate(3) == 3 and Subset().includes(0)


def test_documents_held_out_are_not_in_a_stream() -> None:
    documents = number_tokens([3] * 9)
    source = tokenize_rows(ListSource([" ".join(map(str, ids or [])) for ids in documents]), encode_numbers)
    for part, expected in ((Subset(4), {1, 2, 3, 5, 6, 7}), (Subset(4, is_held_out=True), {0, 4, 8})):
        stream = Packer(IndexedStream(source, part, 0, 1, 0), "list", 0, 3 * len(expected), 3)
        assert {chunk.document for chunk in stream.next_sequence(stream.first_cursor).documents} == expected
    shards = ListShards([[str(10 * i + j) for j in range(6)] for i in range(2)])
    stream = stream_shards(shards, 0, 1, 8, 1, Subset(3))
    assert sorted(stream.next_sequence(stream.first_cursor).input_ids.tolist()) == [1, 2, 4, 5, 11, 12, 14, 15]
