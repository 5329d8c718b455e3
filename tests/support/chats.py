"""Tokenizers with chat templates, and chats."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from flame.data.tokenizer import build_bytes_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # drops the thoughts of all turns but the last, as reasoning models do
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Hallo ✓"}],
    [
        SYSTEM,
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "why?\n\n"},
        {"role": "assistant", "content": " \n\nso"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "unanswered"}],
]


def make_chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes, and two special tokens of their own."""
    tokenizer = build_bytes_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")]}
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def to_sharegpt(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(message["role"], message["role"]), "value": message["content"]} for message in chat]


def write_out(chat: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Ids of a chat in ChatML, written message by message, and which of them the assistant wrote."""
    start, end, eos = 258, 259, 256
    ids: list[int] = []
    counts: list[bool] = []
    for message in chat:
        head = [start, *f"{message['role']}\n".encode()]
        body = [*message["content"].encode(), end, *b"\n"]
        ids += head + body
        counts += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    return [*ids, eos], [*counts, chat[-1]["role"] == "assistant"]
