"""A pre-norm transformer with learned positions. Shapes: B sequences (1 in training), T tokens, H heads, d = hidden_size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration import TinyTransformerConfig


class Attention(nn.Module):
    is_causal = False  # the mask says what is allowed, not the attention function

    def __init__(self, config: TinyTransformerConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: object) -> Tensor:
        heads = (*hidden_states.shape[:-1], 3, -1, self.head_dim)
        query, key, value = self.qkv_proj(hidden_states).view(heads).permute(2, 0, 3, 1, 4)  # each [B, H, T, d / H]
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]  # "sdpa" on CPUs, "flex_attention" on GPUs
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)  # [B, T, H, d / H]
        return self.o_proj(out.reshape(hidden_states.shape))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyTransformerConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.up_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.down_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: object) -> Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), attention_mask)
        inner = nn.functional.silu(self.up_proj(self.mlp_norm(hidden_states)))
        return hidden_states + self.down_proj(inner)


class TinyTransformerPreTrainedModel(PreTrainedModel):
    config_class = TinyTransformerConfig
    base_model_prefix = "model"  # where the model without its head is found
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - as the library declares it
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Set every parameter: the model is built without storage and starts from this alone."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class TinyTransformerModel(TinyTransformerPreTrainedModel):
    def __init__(self, config: TinyTransformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: object = None,
        **further: object,
    ) -> BaseModelOutputWithPast:
        """Final hidden states [B, T, d].

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T]; without them, 0 .. T-1.
            attention_mask: what may attend to what: bool [B, 1, T, T], or a BlockMask. Without one, causal.
        """
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
            attention_mask = _allow_past(length, attention_mask, input_ids.device)
        hidden_states = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


def _allow_past(length: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Bool [B, 1, T, T]: causal, without what padding, [B, T], has zeros for."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    return allowed if padding is None else allowed & padding.bool()[:, None, None, :]


class TinyTransformerForCausalLM(TinyTransformerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as the library declares it

    def __init__(self, config: TinyTransformerConfig):
        super().__init__(config)
        self.model = TinyTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: object = None,
        labels: Tensor | None = None,
        **further: object,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size]. The trainer takes its loss from `base_model`; this is for everyone else."""
        hidden_states = self.model(input_ids, position_ids, attention_mask).last_hidden_state
        logits = self.lm_head(hidden_states)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **further: object) -> dict:
        """For `generate`: there is no cache, each step reads the whole text."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}
