"""Multi-token prediction (MTP; Gloeckle et al. 2024, arXiv:2404.19737, sections 2 and 3).

k heads on one backbone predict the next k tokens independently. With backbone f_s, heads f_1 .. f_k of one transformer layer each
and a shared unembedding f_u,

    P(x_{t+i} | x_{<=t}) = softmax(f_u(f_i(f_s(x_{<=t})))),      L = - sum_t sum_{i=1..k} ln P(x_{t+i} | x_{<=t}).

Here the backbone is the whole language model up to its final norm. Head 1 adds no layer: its term of L is the next-token cross
entropy. Heads 2 .. k are one layer and one norm each. Unlike the paper, the backbone keeps all of its layers; the paper removes
as many as the heads add, so that the number of weights stays the same.

A curriculum (Aynetdinov and Akbik 2025, arXiv:2505.22757) lets only the first heads learn. Of E steps in all, after e of them,

    forward: min(k, floor(e k / E) + 1) tokens are predicted,      reverse: max(1, k - floor(e k / E)).

The other heads are left out of the loss, and not computed. (The formulas of the paper speak of epochs, its figures of steps.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flame.models.extra_layer import build_extra_layer, find_extra_layer_conflicts
from flame.objectives.base import Setup
from flame.objectives.label_objective import BackboneOutput
from flame.objectives.mtp.options import Curriculum, MultiTokenOptions
from flame.objectives.token_heads import TokenHeads, shift_labels
from flame.runtime.measures import Last, Measures


class MultiTokenPrediction(TokenHeads):
    """Heads 2 .. k. The loss is the sum of their cross entropies; with k = 1 there is no head and it is 0.

    Raises:
        UserError: as `build_extra_layer`.
    """

    name: ClassVar[str] = "mtp"
    Options: ClassVar[type[MultiTokenOptions]] = MultiTokenOptions

    def __init__(self, setup: Setup):
        assert isinstance(setup.options, MultiTokenOptions)
        self.options = setup.options
        config = setup.lm.config
        super().__init__(setup, [build_extra_layer(self.name, config, setup.attention) for _ in range(setup.options.tokens - 1)])
        self._num_active = len(self.layers)

    @classmethod
    def find_model_conflicts(cls, options: MultiTokenOptions, config: PretrainedConfig) -> Iterator[str]:  # type: ignore[override]
        return find_extra_layer_conflicts(cls.name, config)

    @property
    def num_active(self) -> int:
        return self._num_active

    @property
    def fits_graph(self) -> bool:
        return self.options.curriculum == "none"

    def begin_step(self, step: int, total_steps: int) -> None:
        self._num_active = count_tokens(self.options.curriculum, self.options.tokens, step, total_steps) - 1

    def list_head_losses(self, output: BackboneOutput) -> list[Tensor]:
        losses = []
        for steps, layer in enumerate(self.list_counted_layers(), start=1):
            ahead = output.pick(output.encode(cast(PreTrainedModel, layer), output.hidden_states))
            losses.append(output.output_head.sum_cross_entropy(ahead, shift_labels(output, steps)))
        return losses

    def combine(self, losses: list[Tensor]) -> Tensor:
        total = losses[0].new_zeros(())
        for loss in losses:
            total = total + loss
        return total

    def read_metrics(self, compute_dtype: Any) -> Measures:
        return {} if self.options.curriculum == "none" else {"mtp_tokens": Last(float(self.num_active + 1))}


def count_tokens(curriculum: Curriculum, most: int, step: int, total_steps: int) -> int:
    """Tokens that each position predicts in a step, including the next.

    Args:
        most: k.
        step: from 1.
    """
    phase = (step - 1) * most // max(total_steps, 1)
    return {"none": most, "forward": min(most, phase + 1), "reverse": max(1, most - phase)}[curriculum]
