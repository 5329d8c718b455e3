"""Completes prompts, many in a packed sequence.

Each token takes a causal forward over all texts so far, without a cache. So every architecture completes by the forward that it
is trained by, also under FSDP. Prompts are packed and dealt to the ranks like texts to score, with the room that they may need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flame.data.batch import PackedBatch
from flame.errors import UserError
from flame.evaluation.scoring import build_packed, pack_by_length
from flame.evaluation.texts import encode_texts, find_first_token
from flame.models.wrapper import TrainingModel
from flame.runtime.distributed import sum_over_ranks
from flame.runtime.seeds import derive_seed


class _Open:
    """A prompt that is being completed.

    Args:
        seed: of the draws.
    """

    def __init__(self, index: int, ids: np.ndarray, seed: int):
        self.index, self.ids, self.is_done = index, ids, False
        self._generator = torch.Generator().manual_seed(seed)

    def extend(self, logits: Tensor, temperature: float) -> int:
        """Choose the next token by its logits, [V], and append it. A temperature of 0 chooses the highest."""
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = (logits.double().cpu() / temperature).softmax(dim=-1)
            token = int(probabilities.multinomial(1, generator=self._generator))
        self.ids = np.append(self.ids, token)
        return token


class Completer:
    """Completes the same prompts as often as it is asked.

    Args:
        prompts: token ids of each, integer [n]. Of a prompt that leaves no room for its completion, the end is kept.
        num_tokens: of the longest completion, at most `context_len`.
        needed: tokens that the completion of each prompt has room for, at most `num_tokens`; `num_tokens` if None. A completion
            is longer where the prompt leaves room for more.
        temperature: as `evaluation.temperature`.
        seed: of the draws. A prompt is completed alike on any number of ranks, and beside any others.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        num_tokens: int,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        context_len: int,
        rank: int,
        world_size: int,
        device: torch.device,
        temperature: float = 0.0,
        seed: int = 0,
        needed: Sequence[int] | None = None,
    ):
        first = np.asarray([find_first_token(tokenizer)])
        inputs = context_len + 1  # the last token is none
        rooms = [inputs - count for count in ([num_tokens] * len(prompts) if needed is None else needed)]
        self._prompts = [(ids if len(ids) else first)[-room:] for ids, room in zip(prompts, rooms, strict=True)]
        self.num_cut = sum(len(ids) > room for ids, room in zip(prompts, rooms, strict=True))
        self._limits = [min(num_tokens, inputs - len(ids)) for ids in self._prompts]
        self._num_tokens, self._end, self._device = num_tokens, tokenizer.eos_token_id, device
        self._seq_len, self._context_len = seq_len, context_len
        self._temperature, self._seed = temperature, seed
        packed = pack_by_length([len(ids) + limit - 1 for ids, limit in zip(self._prompts, self._limits, strict=True)], seq_len)
        self._own, self._rounds = packed[rank::world_size], -(-len(packed) // world_size)

    def complete(self, model: TrainingModel, is_stopped: Callable[[], bool]) -> list[list[int]] | None:
        """Complete the prompts under the model, which is in evaluation mode. All ranks call it.

        Args:
            is_stopped: called before each token. If it returns True on any rank, all ranks stop.

        Returns:
            for each prompt the ids that follow it, without the end of text; None if stopped.
        """
        rows = [
            [_Open(index, self._prompts[index], derive_seed(self._seed, index)) for index in indices] for indices in self._own
        ]
        found = torch.zeros(len(self._prompts), self._num_tokens, dtype=torch.int64)  # 0 for nothing, else 1 + token
        with torch.no_grad():
            for place in range(self._num_tokens):
                votes, unfinished = sum_over_ranks(is_stopped(), sum(not each.is_done for row in rows for each in row))
                if votes:
                    return None
                if not unfinished:
                    break
                for turn in range(self._rounds):
                    row = [each for each in rows[turn] if not each.is_done] if turn < len(rows) else []
                    batch = build_packed([each.ids for each in row], self._seq_len, self._context_len)
                    logits = model(_predict, batch.to(self._device), len(row))
                    for each, own in zip(row, logits, strict=True):
                        token = each.extend(own, self._temperature)
                        found[each.index, place] = 0 if token == self._end else 1 + token
                        each.is_done = token == self._end or place + 1 == self._limits[each.index]
        dist.all_reduce(found)  # each prompt is of one rank
        return [[token - 1 for token in row if token] for row in found.tolist()]


def _predict(model: TrainingModel, batch: PackedBatch, count: int) -> Tensor:
    """Logits [count, V], float32 or wider, of the tokens that follow the first documents of a packed sequence."""
    ends = batch.cu_seqlens[1 : count + 1].long() - 1
    return model.output_head.compute_wide_logits(model.encode_past(batch)[ends])


def read_prompts(path: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[np.ndarray]]:
    """The lines of `evaluation.prompts` that are not empty, and their token ids.

    Raises:
        UserError: the file cannot be read, or has no such line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'evaluation.prompts = "{path}" cannot be read ({error}): give a text file in UTF-8') from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'evaluation.prompts = "{path}" has no prompt: write one a line, or leave the option out')
    return prompts, encode_texts(tokenizer, prompts)
