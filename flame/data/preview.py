"""Decodes a packed sequence for the log. Step 9 in the life of a batch (`flame.data.loader`)."""

from __future__ import annotations

from itertools import pairwise

from transformers import PreTrainedTokenizerFast

from flame.data.batch import PackedBatch

MOST_CHUNKS = 8


def render_sequence(batch: PackedBatch, tokenizer: PreTrainedTokenizerFast, limit_chars: int) -> str:
    """Decode a packed sequence. A line before each chunk names its document and tokens.

    Args:
        limit_chars: most characters of decoded text. The shown chunks share them evenly; longer chunks are cut in the middle.
    """
    ids = batch.input_ids[0].tolist()
    shown = min(len(batch.documents), MOST_CHUNKS)
    spans = list(pairwise(batch.cu_seqlens.tolist()))
    lines = []
    for chunk, (start, end) in zip(batch.documents[:shown], spans, strict=False):
        lines.append(f"── document {chunk.document}, tokens {chunk.start}-{chunk.end - 1} ──")
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        assert isinstance(text, str)
        lines.append(_shorten(text, limit_chars // shown))
    if shown < len(batch.documents):
        lines.append(f"── {len(batch.documents) - shown} more chunks ──")
    return "\n".join(lines)


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit - limit // 2
    return f"{text[:head]} … {len(text) - limit} characters … {text[len(text) - limit // 2 :]}"
