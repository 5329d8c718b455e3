"""A decoder of one's own, registered with transformers under the model_type "tiny_transformer"."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import TinyTransformerConfig
from .modeling import TinyTransformerForCausalLM

AutoConfig.register("tiny_transformer", TinyTransformerConfig)
AutoModelForCausalLM.register(TinyTransformerConfig, TinyTransformerForCausalLM)
