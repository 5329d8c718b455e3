"""What generated sources have in common: each document is drawn from hashes of (seed, number), and many are drawn at once.

Documents are divided by their contents, whatever is drawn besides: one content in `HELD_OUT_EVERY` is never trained on, so that a
set to validate on shares none with training, even where there are few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

HELD_OUT_EVERY = 8
ENDLESS = 2**40
"""Documents of a source that is generated on the fly."""
MOST_WORDS = 2**18
"""Drawn for one block: what it takes of memory is a few times 8 bytes of each."""
LARGEST_BLOCK = 1024
MOST_ATTEMPTS = 10_000
"""At a document of the right side."""
INDEX_BITS = 16
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class GeneratedSource(ABC):
    """`flame.data.sources.Source` of generated documents, with a second way to read them: a block of them as token ids.

    A document is a function of the seed, its number and whether it is to be held out, whoever reads it and in whatever block.
    A subclass draws it from `num_words` random words.

    Args:
        count: documents in the training set, or 0 for `ENDLESS` ones; of held-out ones there are always `ENDLESS`.
    """

    def __init__(self, name: str, option: str, seed: int, count: int, is_held_out: bool, num_words: int):
        self.name, self.option = name, option
        self.is_held_out = is_held_out
        self._seed, self._num_words = seed, num_words
        self._count = count if count and not is_held_out else ENDLESS

    def __len__(self) -> int:
        return self._count

    @property
    def block_size(self) -> int:
        """Documents that are drawn at once: a power of two."""
        return 1 << min(LARGEST_BLOCK, max(MOST_WORDS // self._num_words, 1)).bit_length() - 1

    def read(self, index: int) -> str:
        """Return the text of a document."""
        return self._write(self._draw(np.asarray([index], dtype=np.uint64)))[0]

    def read_block_texts(self, block: int) -> list[str]:
        """The texts of a block."""
        return self._write(self._draw(self._number(block)))

    def read_block_ids(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The block as ids of the source's own tokenizer, which are what it makes of the texts: uint16 [N], documents end to end,
        and their lengths, int64 [B]."""
        return self._encode(self._draw(self._number(block)))

    def _number(self, block: int) -> np.ndarray:
        first = block * self.block_size
        return np.arange(first, min(first + self.block_size, len(self)), dtype=np.uint64)

    def _draw(self, numbers: np.ndarray) -> np.ndarray:
        """Words of the documents with these numbers, uint64 [n] -> uint64 [n, num_words]: the first ones drawn whose contents are
        held out, or are not, as they should be."""
        words = np.empty((len(numbers), self._num_words), dtype=np.uint64)
        open_rows, attempt = np.arange(len(numbers)), 0
        while len(open_rows):
            assert attempt < MOST_ATTEMPTS, "options that leave no content on this side are refused before"
            drawn = draw_words(2 * self._seed + self.is_held_out, numbers[open_rows], attempt, self._num_words)
            fits = is_held_out(self._hash_contents(drawn)) == self.is_held_out
            words[open_rows[fits]] = drawn[fits]
            open_rows, attempt = open_rows[~fits], attempt + 1
        return words

    @abstractmethod
    def _hash_contents(self, words: np.ndarray) -> np.ndarray:
        """What decides on holding out, uint64 [n, num_words] -> uint64 [n]."""

    @abstractmethod
    def _write(self, words: np.ndarray) -> list[str]:
        """The texts, of uint64 [n, num_words]."""

    @abstractmethod
    def _encode(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `read_block_ids`, of uint64 [n, num_words]."""


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
    """Random words, uint64 [n] -> uint64 [n, count]: for each number the sequence of a SplitMix64 generator that starts at a hash
    of (seed, number, attempt)."""
    key = mix(np.asarray([seed], dtype=np.uint64) + GOLDEN_RATIO)
    starts = mix(mix(key + numbers) + np.asarray([attempt], dtype=np.uint64))
    return mix(starts[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_RATIO)


def draw_orders(words: np.ndarray) -> np.ndarray:
    """A random order of m <= 65,536 things in each row, uint64 [n, m] -> int64 [n, m]."""
    low = np.uint64(2**INDEX_BITS - 1)
    tagged = (words & ~low) | np.arange(words.shape[1], dtype=np.uint64)
    tagged.sort(axis=1)  # faster than argsort, and the same on every machine: no two are equal
    return (tagged & low).astype(np.int64)
