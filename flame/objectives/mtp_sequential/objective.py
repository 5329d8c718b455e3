"""Multi-token prediction by sequential modules (DeepSeek-V3; DeepSeek-AI 2024, arXiv:2412.19437, section 2.2, eqs. 21 to 25).

D modules keep the causal chain: each reads the state of the module before and the embedding of the token that that one predicts.
With h_t^0 the model's final state, embedding and output head those of the model,

    h_t^k = TRM_k( M_k [RMSNorm(h_t^{k-1}); RMSNorm(Emb(x_{t+k}))] ),      P_k(x_{t+k+1}) = softmax(OutHead(h_t^k)),
    L = 1/D sum_{k=1..D} L_k,      L_k the cross entropy of module k.

The paper has D = 1 and adds L with factor 0.3 for the first two thirds of its training, then with 0.1. Like a head of MTP here,
TRM_k is a layer with a final norm. L is divided by the number of labels at every depth; where the document ends before t + k + 1,
module k predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flame.data.batch import PackedBatch
from flame.models.extra_layer import build_extra_layer, find_extra_layer_conflicts
from flame.models.flops import ModelFlops, count_matrix_weights
from flame.objectives.base import AuxFlops, Setup
from flame.objectives.label_objective import BackboneOutput
from flame.objectives.mtp_sequential.options import SequentialTokenOptions
from flame.objectives.token_heads import TokenHeads, shift_labels

KEPT_WIDTHS, BFLOAT16_BYTES = 5, 2
"""Vectors of the model's width that the input of a module keeps for each token: both norms, the projection, and gradients."""


class ModuleInput(nn.Module):
    """M_k [RMSNorm(state); RMSNorm(embedding)].

    Args:
        width: d.
        eps: of the norms.
        spread: standard deviation of the initial weights of M_k.
    """

    def __init__(self, width: int, eps: float, spread: float):
        super().__init__()
        self.norm_state, self.norm_token = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.spread = spread

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights; needed after building on the meta device."""
        self.norm_state.reset_parameters()
        self.norm_token.reset_parameters()
        self.projection.weight.normal_(std=self.spread)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """[T, d], [T, d] -> [T, d]"""
        return self.projection(torch.cat([self.norm_state(states), self.norm_token(embeddings)], dim=-1))


class SequentialModules(TokenHeads):
    """The modules. The loss is the mean of their cross entropies.

    Raises:
        UserError: as `build_extra_layer`.
    """

    name: ClassVar[str] = "mtp_sequential"
    Options: ClassVar[type[SequentialTokenOptions]] = SequentialTokenOptions

    def __init__(self, setup: Setup):
        assert isinstance(setup.options, SequentialTokenOptions)
        config, depth = setup.lm.config, setup.options.tokens - 1
        super().__init__(setup, [build_extra_layer(self.name, config, setup.attention) for _ in range(depth)])
        eps, spread = getattr(config, "rms_norm_eps", None) or 1e-6, getattr(config, "initializer_range", 0.02)
        with torch.device("meta"):
            self.inputs = nn.ModuleList(ModuleInput(config.hidden_size, eps, spread) for _ in range(depth))

    @classmethod
    def find_model_conflicts(cls, options: SequentialTokenOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        return find_extra_layer_conflicts(cls.name, config)

    @property
    def fits_graph(self) -> bool:
        return True

    def list_head_losses(self, output: BackboneOutput) -> list[Tensor]:
        states, embeddings, segments = output.hidden_states, output.embed(), output.batch.segment_ids[0]
        here = torch.arange(len(states), device=states.device)
        last = torch.searchsorted(segments, segments, side="right") - 1
        losses = []
        for steps, (join, layer) in enumerate(zip(self.inputs, self.layers, strict=True), start=1):
            # Positions with nothing left to predict read the document's last token. Others, which are earlier, never see them.
            following = embeddings[torch.minimum(here + steps, last)]
            states = output.encode(cast(PreTrainedModel, layer), join(states, following))
            losses.append(output.output_head.sum_cross_entropy(output.pick(states), shift_labels(output, steps)))
        return losses

    def combine(self, losses: list[Tensor]) -> Tensor:
        return torch.stack(losses).mean()

    def list_compiled(self) -> list[nn.Module]:
        return list(self.inputs)

    def count_flops(self, batch: PackedBatch, model: ModelFlops) -> AuxFlops:
        flops = super().count_flops(batch, model)
        return flops._replace(heads=flops.heads + 6.0 * count_matrix_weights(self.inputs) * batch.input_ids.shape[1])

    def estimate_memory(self, tokens: int) -> float:
        inputs = KEPT_WIDTHS * len(self.inputs) * tokens * self.setup.lm.config.hidden_size * BFLOAT16_BYTES
        return super().estimate_memory(tokens) + inputs
