"""The head of the action loss: what summary would follow, if a candidate were the next token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class ActionHead(nn.Module):
    """W_2 gelu(W_1 [h; e] + b_1) + b_2 of a state h and a candidate's embedding e.

    Its weights stay as they are drawn: in the method's first publication no loss reaches them (docs/objectives.md).

    Args:
        state_size: width d of states.
        embedding_size: width of embeddings.
        inner_size: outputs of W_1.
        output_size: width of summaries as they are compared.
    """

    def __init__(self, state_size: int, embedding_size: int, inner_size: int, output_size: int):
        super().__init__()
        self.state_size = state_size
        self.mix = nn.Linear(state_size + embedding_size, inner_size)
        self.out = nn.Linear(inner_size, output_size)
        self.requires_grad_(False)

    def init_weights(self) -> None:
        """Draw all weights; needed after building on the meta device."""
        self.mix.reset_parameters()
        self.out.reset_parameters()

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """[c, d] and [c, candidates, embedding_size] -> [c, candidates, output_size]. The product with a state is made once for
        all of its candidates."""
        of_states, of_embeddings = self.mix.weight.split((self.state_size, self.mix.in_features - self.state_size), dim=1)
        mixed = F.linear(states, of_states, self.mix.bias)[:, None] + F.linear(embeddings, of_embeddings)
        return self.out(F.gelu(mixed))

    def count_flops(self, candidates: int) -> int:
        """FLOPs of a forward of one state with its candidates."""
        per_candidate = self.mix.in_features - self.state_size + self.out.out_features
        return 2 * self.mix.out_features * (self.state_size + candidates * per_candidate)

    def count_kept(self, candidates: int) -> int:
        """Numbers of one state in working memory: inside the head before and after gelu, embeddings, and outputs in float32."""
        return candidates * (3 * self.mix.out_features + self.mix.in_features + 4 * self.out.out_features)


def build_action_head(lm: PreTrainedModel, output_size: int) -> ActionHead:
    """A head for a language model. Its inner width is that of the model's MLPs, as published, or else twice the model's."""
    config, table = lm.config, lm.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) and inner > 0 else 2 * config.hidden_size
    return ActionHead(config.hidden_size, table.shape[1], inner, output_size)
