"""Small tokenizers."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_bpe(*, merges: bool = True, lowercase: bool = False, eos: str = "</s>", unused: int = 0) -> PreTrainedTokenizerFast:
    """Letters, one merge, and byte fallback for the rest."""
    symbols = [
        *(f"<unused{i}>" for i in range(unused)),
        "</s>",
        "<x>",
        "a",
        "b",
        "A",
        "ab",
        "▁",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")] if merges else [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
