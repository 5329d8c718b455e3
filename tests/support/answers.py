"""Packed sequences in which only the answers count."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from flame.config.schema import JobConfig, Training
from flame.data.batch import NO_LABEL, PackedBatch, build_batch
from flame.data.document_streams import Cursor, open_document_stream
from flame.data.documents import WHOLE
from flame.data.packing import PackedSequence, Packer
from tests.support.documents import ListSource, encode_numbers, tokenize_rows
from tests.support.models import future_config

SEPARATOR = 0


def pack_documents(documents: list[list[int]], seq_len: int, context_len: int, sequences: int) -> list[PackedBatch]:
    source = ListSource([" ".join(map(str, document)) for document in documents])
    line = open_document_stream(tokenize_rows(source, encode_numbers), WHOLE, 0, 1, 3)
    stream = Packer(line, "list", 0, seq_len, context_len, SEPARATOR)
    cursor, batches = stream.first_cursor, []
    for index in range(sequences):
        sequence = stream.next_sequence(cursor)
        cursor = sequence.cursor
        batches.append(build_batch(sequence, index))
    return batches


def answer_config(**changes) -> JobConfig:
    config = future_config(**changes)
    config.training = Training(loss_on="answer")
    return config


TOTAL, LONGEST = 200, 40


def build_pack(prompts_and_answers: list[tuple[int, int]], seed: int = 0) -> PackedBatch:
    """One pack of documents with prompts and answers of these lengths, again and again until it is full."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, lowest: int) -> list[int]:
        return torch.randint(lowest, 61, (length,), generator=generator).tolist()

    documents = [[*draw(prompt, 1), SEPARATOR, *draw(answer, 0)] for prompt, answer in prompts_and_answers]
    (batch,) = pack_documents(documents, TOTAL, LONGEST, 1)
    return batch


def list_suffix_positions(batch: PackedBatch) -> list[int]:
    """Tokens of which a label is, or that have one."""
    labels = batch.labels[0].tolist()
    return [t for t in range(len(labels)) if labels[t] != NO_LABEL or (t and labels[t - 1] != NO_LABEL)]


def keep_turns(batch: PackedBatch, seed: int) -> PackedBatch:
    """The same tokens, of which random ones count, as those of an assistant between turns of a user."""
    ids, cu = batch.input_ids[0].numpy(), batch.cu_seqlens.numpy()
    counts = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)).numpy() < 0.5
    counts[cu[:-1]] = False  # nothing predicts the first token of a document
    places = np.flatnonzero(counts)
    spans = np.stack([places, places + 1], axis=1).astype(np.int64)
    return build_batch(PackedSequence(ids, cu, "chats", 0, Cursor(0, 0, 0, 0), [], 0, spans), 0)


def split_documents(batch: PackedBatch) -> list[PackedBatch]:
    """Each document of a pack as a pack of its own, with the same labels."""
    parts = []
    for a, b in pairwise(batch.cu_seqlens.tolist()):
        ids, bounds, spans = batch.input_ids[0, a:b].numpy(), np.array([0, b - a], dtype=np.int32), None
        if batch.answers_only:
            places = np.flatnonzero(batch.labels[0, a:b].numpy() != NO_LABEL) + 1
            spans = np.stack([places, places + 1], axis=1).astype(np.int64)
        sequence = PackedSequence(ids, bounds, batch.source, 0, Cursor(0, 0, 0, 0), [], 0, spans)
        parts.append(build_batch(sequence, batch.sequence_index))
    return parts
