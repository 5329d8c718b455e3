"""A packed sequence as text, to see in the log what the model is fed."""

from __future__ import annotations

from itertools import pairwise

from transformers import PreTrainedTokenizerFast

from flame.data.batch import PackedBatch

MOST_PIECES = 8


def render_sequence(batch: PackedBatch, tokenizer: PreTrainedTokenizerFast, limit_chars: int) -> str:
    """Decode a batch, with a line before each piece that names its document and tokens.

    Args:
        limit_chars: most characters of decoded text. The first pieces share them evenly; a longer piece loses its middle.
    """
    ids = batch.input_ids[0].tolist()
    shown = min(len(batch.documents), MOST_PIECES)
    spans = list(pairwise(batch.cu_seqlens.tolist()))
    lines = []
    for piece, (start, end) in zip(batch.documents[:shown], spans, strict=False):
        lines.append(f"── document {piece.document}, tokens {piece.start}-{piece.end - 1} ──")
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        assert isinstance(text, str)
        lines.append(_shorten(text, limit_chars // shown))
    if shown < len(batch.documents):
        lines.append(f"── {len(batch.documents) - shown} more pieces ──")
    return "\n".join(lines)


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit - limit // 2
    return f"{text[:head]} … {len(text) - limit} characters … {text[len(text) - limit // 2 :]}"
