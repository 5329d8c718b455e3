"""Building and initialising models: what starts how, what is refused, what it costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from flame.errors import UserError
from flame.models.causal_lm import initialize, load_model_config
from tests.support.models import CPU, build_unsharded, count_flops, future_config, random_batch, tiny_llama


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_built_on_meta_is_like_one_from_the_plain_constructor(tied):
    config = tiny_llama(hidden_size=64, vocab_size=512, tie_word_embeddings=tied)
    ours = build_unsharded(future_config(), config).lm
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert torch.equal(ours.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        found = ours.state_dict()[name]
        assert found.dtype == torch.float32
        assert found.mean().item() == pytest.approx(tensor.mean().item(), abs=2e-3), name
        assert found.std().item() == pytest.approx(tensor.std().item(), rel=0.1, abs=1e-6), name


def test_the_seed_decides_the_weights():
    a, b, c = (build_unsharded(future_config(), seed=seed).lm.lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_padding_rows_start_at_zero():
    embedding = build_unsharded(future_config(), tiny_llama(pad_token_id=3)).lm.model.embed_tokens
    assert (embedding.weight[3] == 0).all() and (embedding.weight[4] != 0).any()


def test_a_parameter_that_init_weights_forgets_is_named():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept, self.lost = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2))

        def init_weights(self):
            self.kept.zero_()

    with torch.device("meta"):
        module = Forgetful()
    with pytest.raises(UserError, match="leaves lost unset"):
        initialize(module, CPU, seed=0)


V2 = '{"model_type": "deepseek_v2", "num_experts_per_tok": 6, '


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"model_type": "mistral", "sliding_window": 1}', "sliding_window = 1 is not supported"),
        ('{"model_type": "cwm"}', 'model_type "cwm" is not supported with sliding_window = 8192'),
        ('{"model_type": "phimoe", "sliding_window": 64}', 'model_type "phimoe" is not supported with sliding_window = 64'),
        ('{"model_type": "llama4_text"}', "layers of type chunked_attention are not supported"),
        ('{"model_type": "gemma3"}', "it has a configuration for each of several parts"),
        ('{"model_type": "jamba"}', "of mixture-of-experts models, only deepseek_v2, deepseek_v3, dots1, "),
        ('{"model_type": "deepseek_v2"}', "num_experts_per_tok = None: it must be a number from 1 to n_routed_experts = 64"),
        (
            '{"model_type": "mixtral", "num_experts_per_tok": 9}',
            "num_experts_per_tok = 9: it must be a number from 1 to num_local",
        ),
        (V2 + '"norm_topk_prob": true}', "norm_topk_prob = true is not supported: transformers leaves it out"),
        (V2 + '"topk_method": "noaux_tc"}', 'topk_method = "noaux_tc" is not supported: choose greedy or group_limited_greedy'),
        (V2 + '"topk_method": "group_limited_greedy"}', "n_group = None does not divide n_routed_experts = 64"),
        ('{"model_type": "deepseek_v3", "head_dim": 32}', "head_dim = 32 differs from qk_rope_head_dim = 64"),
        ('{"model_type": "deepseek_v3", "n_group": 7}', "n_group = 7 does not divide n_routed_experts = 256"),
        ('{"model_type": "deepseek_v3", "n_group": 256}', "topk_group = 4: it must be at most n_group = 256, and so many"),
        ('{"model_type": "deepseek_v3", "num_key_value_heads": 8}', "num_key_value_heads = 8 differs from num_attention_heads"),
        ('{"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}', "quantised weights cannot be trained"),
        ('{"model_type": "gemma2", "final_logit_softcapping": 0.0}', "final_logit_softcapping = 0.0: it must be greater than 0"),
        ('{"model_type": "granite", "logits_scaling": -8}', "logits_scaling = -8: it must be greater than 0"),
        ('{"model_type": "gemma2", "attn_logit_softcapping": 0.0}', "attn_logit_softcapping = 0.0: it must be greater than 0"),
        (
            '{"model_type": "llama", "attn_logit_softcapping": 50.0}',
            'attn_logit_softcapping = 50.0 is not supported with model_type "llama", only with gemma2, vaultgemma',
        ),
        ('{"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}', "attn_logit_softcapping = 50.0 is not supported with"),
        ('{"model_type": "qwen3_moe", "output_router_logits": true}', "output_router_logits = true is not supported"),
        ('{"model_type": "gemma3_text", "use_bidirectional_attention": true}', "use_bidirectional_attention = true is not"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}',
            'quantization_config = {"quant_method": "fp8"} is not supported: quantised weights cannot be trained',
        ),
        ('{"model_type": "llama", "quantization_config": {}}', "quantization_config = {} is not supported"),
        ('{"model_type": "llama", "attention_dropout": 0.1}', "attention_dropout = 0.1 is not supported"),
        ('{"model_type": "falcon_mamba"}', 'model_type "falcon_mamba" is not supported: its configuration has no num_att'),
        ('{"model_type": "vit"}', 'model_type "vit" is no causal language model'),
        (
            '{"model_type": "abacus"}',
            "neither it nor flash-linear-attention has this model_type; experimental.custom_model_path can bring one",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, content, reason):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as refusal:
        load_model_config(str(tmp_path / "config.json"))
    assert any(reason in line for line in refusal.value.lines), refusal.value.lines


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.sampled_from([0, 1, 3]), st.integers(0, 2), st.booleans())
def test_flops_count_what_is_computed(lengths, window, shift, tied):
    config = future_config(future_k=window, target_shift=shift)
    model = build_unsharded(config, tiny_llama(tie_word_embeddings=tied))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch = random_batch(cu)
    flops = count_flops(model, batch)

    tokens = sum(lengths)
    matrices = [m.weight.numel() for name, m in model.lm.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    body, head, channels = sum(matrices), 61 * 32, 2 * 32
    causal_pairs = sum(1 for n in lengths for q in range(n) for kv in range(n) if kv <= q)
    future_pairs = sum(1 for n in lengths for q in range(n) for kv in range(n) if 0 < kv - q <= (window or n))
    anchors = sum(1 for n in lengths for t in range(n) if t + max(shift, 1) < n)
    predictor = sum(m.weight.numel() for m in model.objective.predictor.modules() if isinstance(m, nn.Linear))
    assert flops.next_token == 6 * (body + head) * tokens + 12 * channels * causal_pairs
    assert flops.aux_forward == 2 * body * tokens + 4 * channels * future_pairs
    assert flops.heads == 6 * predictor * tokens + 4 * anchors**2 * 32

    few_model = build_unsharded(future_config(target_shift=shift, max_anchors=2, projection_dim=8))
    few = count_flops(few_model, batch) if tokens > 2 else None
    assert few is None or few.heads == 6 * (32 * 32 + 32 * 8) * 2 + 4 * min(anchors, 2) ** 2 * 8


def test_an_exported_folder_of_a_family_is_read_back(tmp_path):
    model = build_unsharded(future_config()).lm
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
