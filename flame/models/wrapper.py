"""The module that is trained: a causal language model together with the objective that uses its hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel

from flame.attention.backends import AttentionBackend, reverse_documents
from flame.attention.kernel_masks import Privileged
from flame.data.batch import PackedBatch
from flame.models.first_layers import run_first_layers
from flame.models.layer_states import read_layer
from flame.models.output_head import OutputHead, read_head

T = TypeVar("T")


class TrainingModel(nn.Module):
    """Owns every parameter. It is the root module of FSDP.

    Args:
        lm: the language model.
        backend: runs the family's layers on packed sequences.
        objective: a `flame.objectives.base.Objective`; None for next-token prediction alone.
    """

    def __init__(self, lm: PreTrainedModel, backend: AttentionBackend, objective: nn.Module | None = None):
        super().__init__()
        self.lm = lm
        self.objective = objective
        self._backend = backend
        self.has_float8_head = False
        """Whether the cross entropies of the language model's head are trained in 8 bits."""
        self.has_dropout = False
        """Whether the language model has `training.dropout`, which acts where gradients are recorded."""

    def forward(self, step: Callable[..., T], *args: Any) -> T:
        """Run `step(self, *args)` with the root's weights gathered.

        FSDP gathers weights when a module's forward is entered. A step reads the output embedding and may run the network
        twice, so all of it has to happen inside this one forward.
        """
        return step(self, *args)

    def encode_past(self, batch: PackedBatch) -> Tensor:
        """Causal forward: final hidden states [T, d]."""
        with record_function("causal forward"):
            return self._backend.encode_past(self.lm, batch)

    def encode_past_and_layer(self, batch: PackedBatch, depth: int) -> tuple[Tensor, Tensor]:
        """Causal forward: final hidden states [T, d], and those after decoder layer `depth` (from 1), [T, d], before any norm."""
        with read_layer(self.lm, depth) as layer:
            states = self.encode_past(batch)
            return states, self._backend.flatten(layer.take(), batch)

    def encode_future(
        self, batch: PackedBatch, window_k: int = 0, network: PreTrainedModel | None = None, layers: int = 0
    ) -> Tensor:
        """Anti-causal forward: summaries [T, d] of each position's future.

        Args:
            window_k: tokens that each layer attends ahead; 0 is up to the end of the document.
            network: network of the same family that runs the pass; None is the language model.
            layers: decoder layers that run, from the first; 0 is all.

        Raises:
            RuntimeError: `training.dropout` would act in it.
        """
        network = self.lm if network is None else network
        self._check_no_dropout(network)
        with record_function("anti-causal forward"), run_first_layers(network, layers):
            return self._backend.encode_future(network, batch, window_k)

    def encode_privileged(self, batch: PackedBatch, view: Privileged) -> Tensor:
        """Forward in which tokens see what comes after them in their document: final hidden states [T, d], without gradient."""
        with record_function("privileged forward"), torch.no_grad():
            return self._backend.encode_privileged(self.lm, batch, view)

    def encode_reversed(self, network: PreTrainedModel, batch: PackedBatch) -> Tensor:
        """Causal forward of a network of the same family that reads each document from its end: states [T, d], of which that of
        a token has read it and those after it.

        Raises:
            RuntimeError: `training.dropout` would act in it.
        """
        self._check_no_dropout(network)
        with record_function("reversed forward"):
            order = reverse_documents(batch.cu_seqlens, batch.input_ids.shape[1])
            return self._backend.encode_past(network, replace(batch, input_ids=batch.input_ids[:, order]))[order]

    def _check_no_dropout(self, network: PreTrainedModel) -> None:
        """Summaries must not be random. Those that all objectives here make are made without gradient."""
        if self.has_dropout and network is self.lm and network.training and torch.is_grad_enabled():
            raise RuntimeError(
                "training.dropout would act in a pass of the language model that reads the future, since it records gradients: "
                "run it under torch.no_grad(), or set training.dropout = 0"
            )

    def encode_embeddings(self, part: PreTrainedModel, embeddings: Tensor, batch: PackedBatch) -> Tensor:
        """Causal forward of a few layers of the same family over embeddings [T, d]: hidden states [T, d]."""
        return self._backend.encode_past(part, batch, embeddings)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """Input embeddings [T, d]."""
        return self.lm.get_input_embeddings()(batch.input_ids)[0]

    @property
    def output_head(self) -> OutputHead:
        """The language model's output head, with the rule of its family for logits."""
        return read_head(self.lm)._replace(trains_in_float8=self.has_float8_head)

    @property
    def output_embedding(self) -> Tensor:
        """[V, d], the matrix of the output head."""
        return self.lm.get_output_embeddings().weight

    def describe_attention(self) -> str:
        """Name of the attention backend, for the log."""
        return self._backend.describe()
