"""Base of generated tasks. Each document is a function of (seed, number), and documents are generated in blocks.

Documents are held out by their content. One content in `HELD_OUT_EVERY` is never trained on. So validation shares no content with
training, even if there are few contents. Steps 1 and 2 in the life of a batch (`flame.data.loader`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flame.config.schema import HELD_OUT, JobConfig
from flame.data.encoding import END_OF_TEXT, encode_document, fingerprint_tokenizer
from flame.data.sources.base import SourceKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT_EVERY = 8
ENDLESS = 2**40
"""Number of documents of an endless source."""
MOST_WORDS = 2**18
"""Most random words that are drawn for one block. The memory is a few times 8 bytes per word."""
LARGEST_BLOCK = 1024
MOST_ATTEMPTS = 10_000
"""Most draws of a document until its content is held out, or not, as required."""
INDEX_BITS = 16
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class ContentHeldOutKind(SourceKind):
    """A task that holds out documents by their content. `validation.dataset` and `[held_out.NAME]` read those."""

    def find_conflicts(self, job: JobConfig) -> Iterator[str]:
        every = job.validation.holdout_every
        if every and not self.is_held_out:
            yield (
                f"validation.holdout_every = {every} beside {self.option}, where another number is not another content: set "
                f'validation.dataset = "{self.corpus.dataset}", which is never trained on'
            )

    @property
    def is_held_out(self) -> bool:
        """Whether it generates the held-out documents, which are never trained on."""
        return self.section == "validation" or self.section.startswith(f"{HELD_OUT}.")


class GeneratedKind(ContentHeldOutKind):
    """A task whose documents are generated as ids of its own tokenizer."""

    has_tokenizer = True

    @abstractmethod
    def open(self) -> GeneratedSource: ...

    def open_tokens(self, tokenizer: PreTrainedTokenizerFast) -> GeneratedDocuments:
        own = self.build_tokenizer(self.options)
        is_own = fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(own)  # it may come from an exported model
        encode = None if is_own else partial(encode_document, tokenizer)
        return GeneratedDocuments(self.short_name, self.option, self.open(), encode)


class GeneratedSource(ABC):
    """`TextRows` of generated documents. They can also be read in blocks, as token ids.

    A document is a function of the seed, its number and whether it is held out. A subclass makes it from `num_words` random
    words.

    Args:
        count: documents in the training set; 0 is `ENDLESS`. Held-out documents are always `ENDLESS`.
    """

    def __init__(self, seed: int, count: int, is_held_out: bool, num_words: int):
        self.is_held_out = is_held_out
        self._seed, self._num_words = seed, num_words
        self._count = count if count and not is_held_out else ENDLESS

    def __len__(self) -> int:
        return self._count

    @property
    def block_size(self) -> int:
        """Documents that are generated at once: a power of two."""
        return 1 << min(LARGEST_BLOCK, max(MOST_WORDS // self._num_words, 1)).bit_length() - 1

    def read(self, index: int) -> str:
        """Return the text of a document."""
        return self._write(self._draw(np.asarray([index], dtype=np.uint64)))[0]

    def read_block_texts(self, block: int) -> list[str]:
        """The texts of a block."""
        return self._write(self._draw(self._number(block)))

    def read_block_ids(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block as ids of the source's own tokenizer, equal to the encoded texts.

        Returns:
            uint16 [N], documents end to end; int64 [B], their lengths.
        """
        return self._encode(self._draw(self._number(block)))

    def _number(self, block: int) -> np.ndarray:
        first = block * self.block_size
        return np.arange(first, min(first + self.block_size, len(self)), dtype=np.uint64)

    def _draw(self, numbers: np.ndarray) -> np.ndarray:
        """Random words of the documents with these numbers, uint64 [n] -> uint64 [n, num_words]. They are drawn until the content
        is held out, or not, as required."""
        words = np.empty((len(numbers), self._num_words), dtype=np.uint64)
        open_rows, attempt = np.arange(len(numbers)), 0
        while len(open_rows):
            assert attempt < MOST_ATTEMPTS, "options that leave no such content have been refused"
            drawn = draw_words(2 * self._seed + self.is_held_out, numbers[open_rows], attempt, self._num_words)
            fits = is_held_out(self._hash_contents(drawn)) == self.is_held_out
            words[open_rows[fits]] = drawn[fits]
            open_rows, attempt = open_rows[~fits], attempt + 1
        return words

    @abstractmethod
    def _hash_contents(self, words: np.ndarray) -> np.ndarray:
        """Hash of the content that decides whether a document is held out: uint64 [n, num_words] -> uint64 [n]."""

    @abstractmethod
    def _write(self, words: np.ndarray) -> list[str]:
        """Make texts from words, uint64 [n, num_words]."""

    @abstractmethod
    def _encode(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make ids and lengths, as `read_block_ids` returns them, from words, uint64 [n, num_words]."""


class Block(NamedTuple):
    """Documents of a generated source, end to end."""

    tokens: np.ndarray
    """integer [N]"""
    bounds: list[int]
    """B+1 boundaries, from 0 to N."""

    def read(self, index: int) -> np.ndarray:
        """Return a document, [n], by its index in the block."""
        return self.tokens[self.bounds[index] : self.bounds[index + 1]]


class GeneratedDocuments:
    """`Documents` of a generated source, which is read block by block.

    Blocks of a training set of fixed size are kept in memory. Of an endless source, only the last block is kept.

    Args:
        encode: the run's tokenizer. None if it is the source's own: then ids are generated directly, without text.
    """

    def __init__(self, name: str, option: str, source: GeneratedSource, encode: Callable[[str], np.ndarray] | None):
        self.name, self.option, self.block_size = name, option, source.block_size
        self._source, self._encode = source, encode
        self._blocks: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}}  # generated again elsewhere, faster than sent

    @property
    def is_endless(self) -> bool:
        """Whether documents never repeat."""
        return len(self) == ENDLESS

    def read_untokenized(self, index: int) -> str:
        """The text of a document, generated without its block."""
        return self._source.read(index)

    def read(self, index: int) -> np.ndarray:
        block, within = divmod(index, self.block_size)
        return self.read_block(block).read(within)

    def read_block(self, block: int) -> Block:
        """Return `block_size` documents from number block * block_size on; fewer in the last block."""
        if block not in self._blocks:
            if self.is_endless:
                self._blocks.clear()
            self._blocks[block] = self._make_block(block)
        return self._blocks[block]

    def _make_block(self, block: int) -> Block:
        if self._encode is None:
            tokens, lengths = self._source.read_block_ids(block)
        else:
            documents = [self._encode(text) for text in self._source.read_block_texts(block)]
            tokens, lengths = np.concatenate(documents), np.asarray([len(ids) for ids in documents])
        return Block(tokens, [0, *lengths.cumsum().tolist()])


def build_label_tokenizer(dataset: str, labels: int, marks: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a generated task: id i is label i, followed by the marks and the end of text.

    Commas have no tokens. They separate consecutive labels, and decoding inserts them. Other text raises an error.

    Args:
        dataset: name of the task.
        pattern: regular expression of one token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*map(str, range(labels)), *marks])}))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", "removed"), pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    comma = decoders.Replace(Regex("(?<=[0-9]) (?=[0-9])"), ",")
    # WordPiece's decoder is used because it puts spaces between tokens; no token here begins with "##".
    steps = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), comma, decoders.Replace(" ", "")]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False, name_or_path=dataset
    )


def is_held_out(hashes: np.ndarray) -> np.ndarray:
    """Which contents are never trained on, uint64 [n] -> bool [n]."""
    return hashes % np.uint64(HELD_OUT_EVERY) == 0


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 [...]: the last step of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", with the constants of Stafford's variant 13)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draw_words(seed: int, numbers: np.ndarray, attempt: int, count: int) -> np.ndarray:
    """Random words, uint64 [n] -> uint64 [n, count]. For each number they are the sequence of a SplitMix64 generator that starts
    at a hash of (seed, number, attempt)."""
    key = mix(np.asarray([seed], dtype=np.uint64) + GOLDEN_RATIO)
    starts = mix(mix(key + numbers) + np.asarray([attempt], dtype=np.uint64))
    return mix(starts[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_RATIO)


def draw_orders(words: np.ndarray) -> np.ndarray:
    """A random permutation of m <= 65,536 items in each row, uint64 [n, m] -> int64 [n, m]."""
    low = np.uint64(2**INDEX_BITS - 1)
    tagged = (words & ~low) | np.arange(words.shape[1], dtype=np.uint64)
    tagged.sort(axis=1)  # faster than argsort, and the same on every machine, since no two are equal
    return (tagged & low).astype(np.int64)
