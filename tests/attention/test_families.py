"""Every family of `flame.attention.families`, by one table of toy models: what the support of a family means."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig, PreTrainedModel

from flame.attention.backends import SHORTEST_FLEX, Attention, choose_attention, name_implementation
from flame.attention.families import FAMILIES, find_limits, list_layer_limits
from flame.data.suffix_layout import GRAIN
from flame.errors import UserError
from flame.models.causal_lm import find_model_conflicts, load_model_config
from flame.models.leak_check import LENGTHS
from flame.models.wrapper import TrainingModel
from flame.objectives.future.options import FutureOptions
from flame.objectives.future.summaries import find_horizon
from flame.objectives.step import Requested, compute_losses
from flame.trainer import setup
from flame.trainer.setup import build_modules
from flame.weights.export import convert
from flame.weights.load import load_hf_weights
from flame.weights.source import find_weights
from tests.support.exports import build_model, make_checkpoint
from tests.support.families import TOYS, WINDOW, build_toy, list_paths
from tests.support.models import (
    build_unsharded,
    count_flops,
    future_config,
    pack,
    random_batch,
    random_cu_seqlens,
    shard,
)

CU = torch.tensor([0, 1, 25, 26, 50, 60], dtype=torch.int32)
every_family = pytest.mark.parametrize("name", TOYS)
every_path = pytest.mark.parametrize(("name", "attention"), [(name, path) for name in TOYS for path in list_paths(name)])


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build_like(reference: torch.nn.Module, attention: Attention | None = None) -> TrainingModel:
    """With the same weights; on the path that a CPU takes, if none is given."""
    with patch.object(setup, "choose_attention", choosing(attention)):
        model = build_unsharded(future_config(), copy.deepcopy(reference.config))
    model.lm.load_state_dict(reference.state_dict())
    return model.eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_packs_too_short_for_flex_attention_are_refused(compiled):
    config = future_config()
    config.training.compile, config.training.seq_len = compiled, 127
    build_modules(config, build_toy("llama"), "cpu")  # SDPA
    with patch.object(setup, "choose_attention", lambda *_: "flex"):
        with pytest.raises(UserError, match=r"^training.seq_len = 127: .* 128 tokens or more: raise it$"):
            build_modules(config, build_toy("llama"), "cpu")
        config.training.seq_len = 128
        build_modules(config, build_toy("llama"), "cpu")
    assert min(GRAIN, sum(LENGTHS)) >= SHORTEST_FLEX, "the other packs that a run makes"


def choosing(attention: Attention | None) -> Callable[..., Attention]:
    return choose_attention if attention is None else lambda *_: attention


def build_sharded(model_config: PretrainedConfig, mesh: DeviceMesh, attention: Attention | None = None) -> TrainingModel:
    config = future_config()
    with patch.object(setup, "choose_attention", choosing(attention)):
        model = build_modules(config, model_config, "cpu")
    return shard(model, config, mesh, seed=1)


def build_reference(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(build_toy(name), dtype=torch.float32).eval()


def test_the_table_has_every_family():
    assert {family for family, _ in TOYS.values()} == set(FAMILIES)


@every_family
def test_it_is_accepted(name, tmp_path):
    build_toy(name).save_pretrained(tmp_path)
    assert load_model_config(str(tmp_path)).model_type == TOYS[name][0]


@every_family
def test_meta_build_and_sharding_start_as_the_plain_constructor(name, mesh):
    """Names, shapes, buffers; mean and spread of each tensor to sampling error."""
    model = build_sharded(build_toy(name), mesh)
    plain = build_reference(name)
    ours = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.lm.state_dict().items()}
    assert ours.keys() == plain.state_dict().keys()
    for key, expected in plain.state_dict().items():
        found, n = ours[key], expected.numel()
        spread = expected.std().item() if n > 1 else 0.0
        assert found.shape == expected.shape and found.dtype == torch.float32, key
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=6 * spread * (2 / n) ** 0.5 + 1e-7), key
        assert n == 1 or found.std().item() == pytest.approx(spread, abs=6 * spread / n**0.5 + 1e-7), key
    for (key, expected), (_, found) in zip(plain.named_buffers(), model.lm.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)
    tied = plain.config.tie_word_embeddings
    assert (model.lm.get_output_embeddings().weight is model.lm.get_input_embeddings().weight) == tied


@every_path
def test_the_loss_of_loaded_weights_is_that_of_transformers(name, attention, mesh, tmp_path):
    """From a Hugging Face folder, into a sharded model: the loss of one document longer than any window."""
    draw_zeros(build_reference(name)).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = build_sharded(build_toy(name), mesh, attention)
    load_hf_weights(model, find_weights(str(tmp_path)))
    batch = random_batch(torch.tensor([0, 40], dtype=torch.int32))
    with torch.no_grad():
        expected = reference(input_ids=batch.input_ids, labels=batch.input_ids).loss
        losses = model(compute_losses, batch, Requested(aux=False))
    assert losses.ce_sum is not None
    torch.testing.assert_close(losses.ce_sum / batch.num_labels, expected, rtol=1e-5, atol=0)


def draw_zeros(model: torch.nn.Module) -> PreTrainedModel:
    """The model with random biases: they start at zero."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, PreTrainedModel)
    return model


@every_family
def test_an_exported_model_has_the_same_logits(name, tmp_path):
    model = build_model(build_toy(name, vocab_size=264))
    convert(make_checkpoint(tmp_path, model), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = random_batch(torch.tensor([0, 40], dtype=torch.int32), vocab_size=264).input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@every_path
def test_no_leak(name, attention):
    """One token changed: what may see it, in either direction, and nothing else."""
    model = build_like(build_reference(name), attention)
    batch = random_batch(CU)
    limits = list_layer_limits(model.lm.config)
    horizon = sum(limits) if all(limits) else 60
    with torch.no_grad():
        past, futures = model.encode_past(batch), {window_k: model.encode_future(batch, window_k) for window_k in (0, 3)}
        for j in (0, 1, 12, 24, 25, 26, 37, 49, 50, 59):
            document = torch.bucketize(j, CU, right=True)
            start, end = int(CU[document - 1]), int(CU[document])
            tokens = batch.input_ids[0].clone()
            tokens[j] = (tokens[j] + 1) % 61
            changed = pack(tokens, CU)
            seen_by = find_changes(model.encode_past(changed), past)
            assert j in seen_by and min(seen_by) == j and max(seen_by) < end and max(seen_by) <= j + horizon
            for window_k, future in futures.items():
                seen_by = find_changes(model.encode_future(changed, window_k), future)
                ahead = min(horizon, 2 * window_k or 60)
                assert j in seen_by and max(seen_by) == j and min(seen_by) >= max(start, j - ahead)


def find_changes(found: Tensor, base: Tensor) -> list[int]:
    assert found.isfinite().all()
    return ((found - base).abs() > 1e-6).any(-1).nonzero().flatten().tolist()


@every_path
def test_packed_equals_one_by_one(name, attention):
    model = build_like(build_reference(name), attention)
    batch = random_batch(CU)
    with torch.no_grad():
        past, future = model.encode_past(batch), model.encode_future(batch, 0)
        for start, end in pairwise(CU.tolist()):
            alone = pack(batch.input_ids[0, start:end], torch.tensor([0, end - start], dtype=torch.int32))
            torch.testing.assert_close(past[start:end], model.encode_past(alone), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(future[start:end], model.encode_future(alone, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TOYS if "varlen" in list_paths(name)])
def test_flash_passes_equal_those_under_masks(name):
    reference = build_reference(name)
    masked, flash = build_like(reference), build_like(reference, "varlen")
    for seed in range(3):
        batch = random_batch(random_cu_seqlens(60, 5, seed), seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(flash.encode_past(batch), masked.encode_past(batch), rtol=1e-4, atol=1e-5)
            for window_k in (0, 2, 20):
                found, expected = (model.encode_future(batch, window_k) for model in (flash, masked))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_windows_follow_their_definition(name):
    """The anti-causal pass under masks that a loop over all pairs makes."""
    reference = build_reference(name)
    reference.set_attn_implementation(name_implementation(list_paths(name)[0], reference.config))
    limits, document = find_limits(reference.config), torch.bucketize(torch.arange(60), CU[1:], right=True)

    def make_mask(limit: int) -> Tensor:
        rows = [[bool(document[q] == document[k]) and 0 < k - q <= (limit or 60) for k in range(60)] for q in range(60)]
        allowed = torch.tensor(rows)[None, None]
        is_added = reference.config._attn_implementation == "eager"  # of families for which transformers knows no boolean masks
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf) if is_added else allowed

    is_windowed = TOYS[name][1].get("sliding_window") == WINDOW
    assert (WINDOW - 1 in list_layer_limits(reference.config)) == is_windowed
    masks = {kind: make_mask(limit) for kind, limit in limits.items()} if isinstance(limits, dict) else make_mask(limits)
    batch = random_batch(CU)
    with torch.no_grad():
        expected = reference.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False
        ).last_hidden_state[0]
        torch.testing.assert_close(build_like(reference).encode_future(batch, 0), expected, rtol=1e-4, atol=1e-5)


OTHER_WINDOWS = {
    "qwen2": ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, [0, WINDOW - 1]),
    "smollm3": ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, [0, WINDOW - 1]),
    "qwen3_moe": ({"use_sliding_window": True}, [WINDOW - 1] * 2),
    "mixtral": ({}, [WINDOW - 1] * 2),
    "gpt_oss": ({"layer_types": ["full_attention"] * 2}, [0, 0]),
}


@pytest.mark.parametrize("name", OTHER_WINDOWS)
def test_windows_are_those_of_transformers_where_they_are_rare(name):
    changes, limits = OTHER_WINDOWS[name]
    torch.manual_seed(0)
    config = build_toy(name, sliding_window=WINDOW, **changes)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    assert list_layer_limits(reference.config) == limits
    masked, flash = build_like(reference), build_like(reference, "varlen")
    batch = random_batch(torch.tensor([0, 40], dtype=torch.int32))
    with torch.no_grad():
        expected = reference.base_model(input_ids=batch.input_ids).last_hidden_state[0]
        torch.testing.assert_close(masked.encode_past(batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flash.encode_past(batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flash.encode_future(batch, 0), masked.encode_future(batch, 0), rtol=1e-4, atol=1e-5)


@every_family
def test_flops_count_the_experts_and_pairs_in_use(name):
    model = build_like(build_reference(name))
    flops = count_flops(model, random_batch(CU))
    lengths, limits = CU.diff().tolist(), list_layer_limits(model.lm.config)
    pairs = sum(n_pairs(n, limit or n, own=True) for limit in limits for n in lengths)
    later = sum(n_pairs(n, limit or n, own=False) for limit in limits for n in lengths)
    matrices = 0.0
    for module_name, parameter in model.lm.named_parameters():
        if parameter.ndim == 2 and not any(part in module_name for part in ("embed", "wte", "wpe", "lm_head", "bias")):
            matrices += parameter.numel()
        matrices += parameter.numel() / 2 if parameter.ndim == 3 else 0.0  # two of four experts
    width = 4 * (16 + 8 + 16) / 2 if name.startswith("deepseek") else 4 * 8
    assert flops.aux_forward == 2 * matrices * 60 + 4 * width * later
    assert flops.next_token == 3 * (2 * (matrices + 61 * 32) * 60 + 4 * width * pairs)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
        ("opt", {"layerdrop": 0.1, "dropout": 0.0}, "layerdrop = 0.1 is not supported"),
        ("dots3_note_text", {}, "not supported with per_layer_config"),
    ],
)
def test_what_would_be_random_or_uneven_is_refused(family, changes, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **changes}))
    with pytest.raises(UserError) as refusal:
        load_model_config(str(tmp_path))
    (line,) = refusal.value.lines
    assert reason in line


def test_a_head_of_another_width_is_refused():
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 61}
    with pytest.raises(UserError, match=r'"opt" is not supported: its output head has the width 16 beside hidden_size = 32'):
        build_modules(future_config(), OPTConfig(word_embed_proj_dim=16, **shape), "cpu")


def test_longrope_keeps_to_its_first_frequencies():
    """A longer document would switch those of all others in its pack."""
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = build_toy("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    (line,) = find_model_conflicts(config, 61, 25, exports=True)
    assert "training.context_len = 25 is more than the original_max_position_embeddings = 24" in line
    assert not list(find_model_conflicts(config, 61, 24, exports=True))


def n_pairs(length: int, limit: int, own: bool) -> int:
    return sum(1 for q in range(length) for k in range(q + (not own), length) if k - q <= limit)


@every_family
def test_ten_steps_lower_both_losses(name, mesh):
    model = build_sharded(build_toy(name), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    batch, measured = random_batch(CU), []
    for _ in range(10):
        losses = model(compute_losses, batch, Requested(aux=True))
        assert losses.ce_sum is not None and losses.aux is not None
        loss = losses.ce_sum / batch.num_labels + losses.aux.loss_sum / losses.aux.num_items
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured.append((losses.ce_sum.item(), losses.aux.loss_sum.item()))
    assert measured[-1][0] < 0.85 * measured[0][0] and measured[-1][1] < 0.95 * measured[0][1]


@every_family
def test_as_many_tokens_as_the_reach_change_a_summary(name):
    """Up to the last of them, and none from the next one on."""
    one_document, model_config = torch.tensor([0, 40], dtype=torch.int32), build_toy(name)
    model, tokens = build_unsharded(future_config(), model_config), random_batch(one_document).input_ids[0]

    def summarize_first(tokens: Tensor, future_k: int) -> Tensor:
        with torch.no_grad():
            return model.encode_future(pack(tokens, one_document), future_k)[0]

    for future_k in (0, 3, 20):
        reach = min(find_horizon(FutureOptions(future_k=future_k), model_config) or 40, 40)
        places = sorted({0, 1, reach // 2, reach - 2, reach - 1, reach, reach + 1, 39} & set(range(40)))
        base = summarize_first(tokens, future_k)
        others = [torch.cat([tokens[:at], (tokens[at : at + 1] + 1) % 61, tokens[at + 1 :]]) for at in places]
        changing = [at for at, other in zip(places, others, strict=True) if not summarize_first(other, future_k).equal(base)]
        assert changing == [at for at in places if at < reach], future_k


def test_the_reach_of_summaries_that_no_layer_makes():
    windows = build_toy("mistral")
    assert find_horizon(FutureOptions(target="mean_embedding"), windows) == 0
    assert find_horizon(FutureOptions(target="mean_embedding", future_k=5), windows) == 6
    assert find_horizon(FutureOptions(target="causal"), windows) == 0
