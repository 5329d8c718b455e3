"""What describes a model: the keys of its config.json."""

from __future__ import annotations

from transformers import PretrainedConfig


class TinyTransformerConfig(PretrainedConfig):
    """`vocab_size`, `hidden_size` and `num_hidden_layers` are names that the trainer reads; so is `max_position_embeddings`."""

    model_type = "tiny_transformer"

    def __init__(
        self,
        vocab_size: int = 264,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 256,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **further: object,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **further)
