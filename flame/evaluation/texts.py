"""Texts to score, as token ids: answers after their contexts, and held-out documents in windows.

What is too long is handled as in lm-eval (EleutherAI's lm-evaluation-harness, `lm_eval/api/model.py`, `lm_eval/utils.py`): of a
context the end is kept, and a long document is scored window by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.data.encoding import encode_documents
from flame.evaluation.tasks import Answer


class ScoredText(NamedTuple):
    """Tokens of which the last ones are scored, each given all before it."""

    ids: np.ndarray
    """integer [n+1]; the last token is never an input of the model."""
    num_scored: int
    """From 1 to n."""

    @property
    def num_inputs(self) -> int:
        """n"""
        return len(self.ids) - 1


class EncodedAnswer(NamedTuple):
    """An answer after its context."""

    text: ScoredText
    num_bytes: int
    """UTF-8 bytes of what is scored."""
    is_cut: bool
    """Whether the beginning of the context is left out."""


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids as in training, without the end of text that is added there: int32 [n], n >= 0 each."""
    return [ids[:-1] for ids in encode_documents(tokenizer, texts)]


def find_first_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that a text follows which has nothing before it: the one that begins texts, or else the one that ends them."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_answers(tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], context_len: int) -> list[EncodedAnswer | None]:
    """Encode answers as lm-eval does: context and answer are encoded together, and spaces at the end of the context are scored
    with the answer. An answer without context follows the token that begins a text, or else the one that ends it.

    Args:
        context_len: the most tokens that the model reads at once.

    Returns:
        for each answer its encoding. None if it is empty, or longer than `context_len`.
    """
    contexts = [answer.context.rstrip() for answer in answers]
    scored = [
        answer.context[len(context) :] + answer.continuation if context else answer.continuation
        for answer, context in zip(answers, contexts, strict=True)
    ]
    before = encode_texts(tokenizer, contexts)
    whole = encode_texts(tokenizer, [context + text for context, text in zip(contexts, scored, strict=True)])
    encoded: list[EncodedAnswer | None] = []
    for head, ids, text in zip(before, whole, scored, strict=True):
        if len(head) == 0:
            head = np.asarray([find_first_token(tokenizer)], dtype=ids.dtype)
            ids = np.concatenate([head, ids])
        num_scored = len(ids) - len(head)
        if not 0 < num_scored <= context_len:
            encoded.append(None)
            continue
        kept = ids[-(context_len + 1) :]
        encoded.append(EncodedAnswer(ScoredText(kept, num_scored), len(text.encode()), len(kept) < len(ids)))
    return encoded


def cut_windows(ids: np.ndarray, context_len: int) -> list[ScoredText]:
    """Cut a document, integer [n], into windows of at most `context_len` inputs. Each token but the first is scored once. The
    last window begins earlier than it must, so that its tokens have a full context."""
    windows = []
    for start in range(1, len(ids), context_len):
        end = min(start + context_len, len(ids))
        windows.append(ScoredText(ids[max(end - context_len - 1, 0) : end], end - start))
    return windows
