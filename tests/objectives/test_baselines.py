"""MTP, TOP and FSP-BoW, value and gradient, against plain loops over their papers' formulas in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from flame.attention.backends import Attention, MaskedBackend, VarlenBackend, choose_attention
from flame.attention.families import find_limits
from flame.data.batch import NO_LABEL, PackedBatch
from flame.errors import UserError
from flame.models import extra_layer
from flame.models.causal_lm import build_on_meta, find_decoder_layers, initialize
from flame.models.flops import count_weights_used
from flame.models.output_head import LogitRule, OutputHead
from flame.models.vocabulary_head import find_upcoming
from flame.objectives.base import Setup
from flame.objectives.label_objective import BackboneOutput, Encode, LabelObjective
from flame.objectives.registry import BUILT_IN
from tests.support.answers import keep_turns
from tests.support.families import TOYS, build_toy
from tests.support.losses import chunks_of
from tests.support.models import CPU, pack, random_batch, tiny_llama

WIDTH, VOCABULARY = 8, 7
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
BASELINES = ("mtp", "top", "fsp_bow")
every_baseline = pytest.mark.parametrize("name", BASELINES)


def small_llama() -> PretrainedConfig:
    return tiny_llama(
        hidden_size=WIDTH, intermediate_size=12, vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1
    )


def build(
    name: str,
    model_config: PretrainedConfig | None = None,
    attention: Attention | None = None,
    window: int = 0,
    tokens: int = 4,
    context_len: int = 64,
) -> LabelObjective:
    """The objective alone, with weights."""
    model_config = model_config or small_llama()
    attention = attention or choose_attention(model_config, "cpu", torch.float32)
    kind, lm = BUILT_IN[name], build_on_meta(model_config, "cpu", attention)
    chosen = {"tokens": tokens} if name == "mtp" else {"window": window}
    setup = Setup(kind.options(**chosen), {}, lm, attention, "cpu", 42, 64, context_len, sequences_per_step=1)
    with torch.device("meta"):
        objective = kind.load()(setup)
    assert isinstance(objective, LabelObjective)
    initialize(objective, CPU, seed=0)
    return objective


@lru_cache
def build_wide(name: str, **options) -> LabelObjective:
    objective = build(name, **options).double()
    for parameter in objective.parameters():  # far from 0, so that nothing is nearly linear
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return objective


def encoder(batch: PackedBatch, model_config: PretrainedConfig) -> Encode:
    masks = MaskedBackend("sdpa", find_limits(model_config))._build_masks(batch.segment_ids[0], "causal", 0)

    def encode(layer, states):
        outputs = layer(inputs_embeds=states[None], position_ids=batch.position_ids, attention_mask=masks, use_cache=False)
        return outputs.last_hidden_state[0]

    return encode


def keep_answers(batch: PackedBatch, seed: int) -> PackedBatch:
    """Labels on a random number of last tokens of each document only."""
    labels = batch.labels.clone()
    for a, b in pairwise(batch.cu_seqlens.tolist()):
        kept = int(torch.randint(0, b - a, (1,), generator=torch.Generator().manual_seed(seed + a)))
        labels[0, a : b - 1 - kept] = NO_LABEL
    return replace(batch, labels=labels)


def draw(shape: tuple[int, ...], seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def documents_ahead(batch: PackedBatch) -> list[list[int | None]]:
    """For each position the tokens after it in its document, nearest first. None for one that does not count."""
    tokens: list[int | None] = batch.input_ids[0].tolist()
    if batch.answers_only:
        labels = [NO_LABEL, *batch.labels[0].tolist()]
        tokens = [None if label == NO_LABEL else token for token, label in zip(tokens, labels, strict=False)]
    return [tokens[t + 1 : b] for a, b in pairwise(batch.cu_seqlens.tolist()) for t in range(a, b)]


def mtp_by_loop(objective: LabelObjective, states: Tensor, batch: PackedBatch, labels: Tensor, head: OutputHead, encode: Encode):
    total, ahead, segments = torch.zeros((), dtype=torch.float64), documents_ahead(batch), batch.segment_ids[0]
    for i, layer in enumerate(objective.layers, start=2):
        logits = encode(layer, states) @ head.weight.T
        if head.bias is not None:
            logits = logits + head.bias
        logits = logits * head.rule.scale
        if head.rule.cap is not None:
            logits = head.rule.cap * torch.tanh(logits / head.rule.cap)
        for t in range(len(segments)):
            if labels[t] != NO_LABEL and len(ahead[t]) >= i and ahead[t][i - 1] is not None:
                total = total - torch.log(torch.softmax(logits[t], dim=-1)[ahead[t][i - 1]])
    return total


def top_by_loop(window: int, weight: Tensor, states: Tensor, batch: PackedBatch, labels: Tensor):
    total, ahead = torch.zeros((), dtype=torch.float64), documents_ahead(batch)
    for t in range(len(states)):
        if labels[t] == NO_LABEL:
            continue
        within = ahead[t][:window]
        y = [window - (within.index(v) + 1) if v in within else -math.inf for v in range(len(weight))]
        target = torch.softmax(torch.tensor(y, dtype=torch.float64), dim=0)
        predicted = torch.softmax(states[t] @ weight.T, dim=0)
        for v in range(len(weight)):
            if target[v] > 0:
                total = total - target[v] * torch.log(predicted[v])
    return total


def bow_by_loop(window: int, weight: Tensor, states: Tensor, batch: PackedBatch, labels: Tensor):
    total, ahead = torch.zeros((), dtype=torch.float64), documents_ahead(batch)
    for t in range(len(states)):
        if labels[t] == NO_LABEL:
            continue
        for v in range(len(weight)):
            p = torch.sigmoid(states[t] @ weight[v])
            total = total - (torch.log(p) if v in ahead[t][1:window] else torch.log(1 - p))
    return total


def compute_by_loop(
    name: str, objective: LabelObjective, states: Tensor, batch: PackedBatch, output: OutputHead, encode: Encode, window: int
):
    labels = batch.labels[0]
    if name == "mtp":
        return mtp_by_loop(objective, states, batch, labels, output, encode)
    if name == "top":
        return top_by_loop(window or 1000, objective.head.weight, states, batch, labels)
    return bow_by_loop(window or 1000, objective.head.weight, encode(objective.layers[0], states), batch, labels)


lengths_of_documents = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@every_baseline
@pytest.mark.parametrize("rows_per_chunk", [3, 4096])
@given(
    lengths=lengths_of_documents,
    window=st.sampled_from([0, 2, 3, 5]),
    kept=st.sampled_from(["all", "answers", "turns"]),
    listed=st.booleans(),
    rule=st.sampled_from([None, LogitRule(0.5), LogitRule(3.0, 2.0)]),
    seed=st.integers(0, 999),
)
def test_it_is_its_definition(name, rows_per_chunk, lengths, window, kept, listed, rule, seed):
    """Loss, and gradients of states, heads and output head; with all positions, or listed ones and some to fill up."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch = random_batch(cu, VOCABULARY, seed)
    batch = {"all": batch, "answers": keep_answers(batch, seed), "turns": keep_turns(batch, seed)}[kept]
    objective, encode = build_wide(name, window=window, tokens=3), encoder(batch, small_llama())
    states, output = draw((int(cu[-1]), WIDTH), seed), draw((VOCABULARY, WIDTH), seed + 1)
    head = OutputHead(output)
    if rule is not None:
        head = OutputHead(output, draw((VOCABULARY,), seed + 2), rule)
    inputs = [states, output, *([] if head.bias is None else [head.bias]), *objective.parameters()]

    positions, labels = None, batch.labels[0]
    if listed:
        marked = (labels != NO_LABEL).nonzero().flatten()
        positions = torch.cat([marked, (labels == NO_LABEL).nonzero().flatten()[:2]])
        labels = labels[positions]
    with chunks_of(rows_per_chunk):
        found = objective.sum_losses(BackboneOutput(states, batch, positions, labels, head, encode))
        found_grads = torch.autograd.grad(3.0 * found, inputs, allow_unused=True)
    assert found.dtype == torch.float64 and found.shape == ()

    expected = compute_by_loop(name, objective, states, batch, head, encode, window)
    torch.testing.assert_close(found, expected, **CLOSE)
    if not expected.requires_grad:
        assert all(grad is None or (grad == 0).all() for grad in found_grads)
        return
    for grad, expected_grad in zip(found_grads, torch.autograd.grad(3.0 * expected, inputs, allow_unused=True), strict=True):
        expected_grad = torch.zeros_like(grad) if expected_grad is None and grad is not None else expected_grad
        torch.testing.assert_close(grad, expected_grad, **CLOSE)


@every_baseline
@given(lengths=lengths_of_documents, seed=st.integers(0, 999))
def test_a_pack_is_the_sum_of_its_documents(name, lengths, seed):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch, objective = random_batch(cu, VOCABULARY, seed), build_wide(name, tokens=3)
    states, output = draw((int(cu[-1]), WIDTH), seed), draw((VOCABULARY, WIDTH), seed + 1)

    def compute(batch: PackedBatch, states: Tensor) -> Tensor:
        return objective.sum_losses(
            BackboneOutput(states, batch, None, batch.labels[0], OutputHead(output), encoder(batch, small_llama()))
        )

    packed = compute(batch, states)
    alone = sum(
        compute(pack(batch.input_ids[0, a:b], torch.tensor([0, b - a], dtype=torch.int32)), states[a:b])
        for a, b in pairwise(cu.tolist())
    )
    torch.testing.assert_close(packed, alone, **CLOSE)


@every_baseline
def test_without_any_label_all_is_exactly_zero(name):
    batch = random_batch(torch.arange(9, dtype=torch.int32), VOCABULARY)  # single-token documents
    objective = build(name)
    states, output = draw((8, WIDTH), 0, torch.float32), draw((VOCABULARY, WIDTH), 1, torch.float32)
    loss = objective.sum_losses(
        BackboneOutput(states, batch, None, batch.labels[0], OutputHead(output), encoder(batch, small_llama()))
    )
    assert loss == 0 and loss.dtype == torch.float32
    loss.backward()
    grads = [states.grad, *(parameter.grad for parameter in objective.parameters())]
    assert all(grad is not None and (grad == 0).all() for grad in grads)


@every_baseline
def test_half_precision_states(name):
    """Sums are float32, gradients in the dtype of what they belong to, all near the float64 result."""
    batch = random_batch(torch.tensor([0, 20, 40], dtype=torch.int32), VOCABULARY)
    encode, objective = encoder(batch, small_llama()), build(name)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        objective = objective.to(torch.bfloat16).to(dtype)  # the same weights in both
        states, output = (draw(shape, 3, torch.bfloat16).detach().to(dtype) for shape in ((40, WIDTH), (VOCABULARY, WIDTH)))
        states.requires_grad_()
        loss = objective.sum_losses(BackboneOutput(states, batch, None, batch.labels[0], OutputHead(output), encode))
        results.append((loss, *torch.autograd.grad(loss, [states, *objective.parameters()])))
    (loss, *grads), (exact_loss, *exact_grads) = results
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact_loss, rtol=0.02, atol=0.0)
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - exact).norm() < 0.06 * exact.norm()


@every_baseline
def test_long_documents(name):
    """Further than exp(-distance) reaches in float32; each token's next occurrence still counts for the bag."""
    tokens = torch.arange(300) % 150
    batch = pack(tokens, torch.tensor([0, 300], dtype=torch.int32))
    config = tiny_llama(hidden_size=WIDTH, intermediate_size=12, vocab_size=150, num_attention_heads=2, num_key_value_heads=1)
    objective = build(name, config, tokens=2, context_len=512)
    states, output = draw((300, WIDTH), 0, torch.float32), draw((150, WIDTH), 1, torch.float32)
    positions = torch.tensor([0, 3, 100, 149, 150, 298])
    labels = batch.labels[0][positions]
    loss = objective.sum_losses(BackboneOutput(states, batch, positions, labels, OutputHead(output), encoder(batch, config)))
    wide, others = objective.double(), torch.full((300,), NO_LABEL)
    expected = compute_by_loop(
        name,
        wide,
        states.double(),
        replace(batch, labels=others.index_copy(0, positions, labels)[None]),
        OutputHead(output.double()),
        encoder(batch, config),
        window=0,
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


@given(lengths=lengths_of_documents, nearest=st.integers(1, 3), horizon=st.integers(0, 9), seed=st.integers(0, 999))
def test_what_is_ahead(lengths, nearest, horizon, seed):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch = random_batch(cu, 3, seed)
    tokens, is_first = find_upcoming(batch).look_ahead(torch.arange(int(cu[-1])), nearest, horizon)
    for t, ahead in enumerate(documents_ahead(batch)):
        window = ahead[nearest - 1 :][:horizon]
        expected = {place: v for place, v in enumerate(window) if v not in window[:place]}
        assert {place: int(tokens[t, place]) for place in is_first[t].nonzero().flatten().tolist()} == expected


def test_one_token_needs_no_further_head():
    objective = build("mtp", tokens=1)
    batch = random_batch(torch.tensor([0, 9], dtype=torch.int32), VOCABULARY)
    states, output = draw((9, WIDTH), 0), draw((VOCABULARY, WIDTH), 1)
    loss = objective.sum_losses(
        BackboneOutput(states, batch, None, batch.labels[0], OutputHead(output), encoder(batch, small_llama()))
    )
    assert loss == 0 and not list(objective.parameters()) and objective.count_head_weights() == 0


@pytest.mark.parametrize("name", ["mtp", "fsp_bow"])
@pytest.mark.parametrize("family", TOYS)
def test_the_layers_of_every_family(name, family):
    """They hold no table of the vocabulary, learn with all they have, and read neither ahead nor across documents."""
    config = build_toy(family)
    objective = build(name, config, tokens=3)
    assert all(parameter.shape[0] != config.vocab_size for parameter in objective.layers.parameters())
    batch = random_batch(torch.tensor([0, 3, 15, 30], dtype=torch.int32))
    encode = encoder(batch, config)
    states, output = draw((30, 32), 0, torch.float32), draw((61, 32), 1, torch.float32)
    objective.sum_losses(BackboneOutput(states, batch, None, batch.labels[0], OutputHead(output), encode)).backward()
    unreached = {key for key, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not unreached and states.grad.abs().sum() > 0

    changed = states.detach().clone()
    changed[7] += 1.0
    with torch.no_grad():
        for layer in objective.layers:
            differs = (encode(layer, changed) != encode(layer, states)).any(dim=-1).nonzero().flatten().tolist()
            assert differs and differs[0] == 7 and differs[-1] < 15


OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EVERY_KIND = {name: build_toy(name) for name in TOYS} | {
    "gpt2, as many tokens as positions": build_toy("gpt2", vocab_size=256),
    "gpt2, scaled by layer": build_toy("gpt2", scale_attn_by_inverse_layer_idx=True),
    "opt": AutoConfig.for_model("opt", vocab_size=61, max_position_embeddings=256, dropout=0.0, **OPT),
    "qwen3_moe, dense, sparse": build_toy("qwen3_moe", decoder_sparse_step=2),
    "qwen3_moe, sparse, dense by step": build_toy("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=3),
    "qwen3_moe, dense, sparse by list": build_toy("qwen3_moe", mlp_only_layers=[0]),
    "qwen3_moe, sparse, dense": build_toy("qwen3_moe", mlp_only_layers=[1]),
    "qwen3_moe, all dense": build_toy("qwen3_moe", mlp_only_layers=[0, 1]),
}
every_kind = pytest.mark.parametrize("config", EVERY_KIND.values(), ids=EVERY_KIND)


@every_kind
def test_a_head_is_a_layer_as_the_last_one_and_a_norm(config):
    def list_parts(layer: torch.nn.Module) -> list[tuple]:
        return [
            (name, type(module), [p.shape for p in module.parameters(recurse=False)], getattr(module, "scaling", None))
            for name, module in layer.named_modules()
        ]

    model = build_on_meta(config, "cpu", choose_attention(config, "cpu", torch.float32))
    before, head = config.to_dict(), build("mtp", config, tokens=2).layers[0]
    assert config.to_dict() == before
    (layer,) = find_decoder_layers(head)
    assert list_parts(layer) == list_parts(find_decoder_layers(model)[-1])
    beside = {id(parameter) for parameter in head.parameters()} - {id(parameter) for parameter in layer.parameters()}
    norm = set() if config.model_type == "olmo" else {(config.hidden_size,)}  # its norms have no parameters
    assert {p.shape for p in head.parameters() if id(p) in beside} == norm


@every_kind
def test_a_head_reads_the_states_as_they_are(config):
    """Without the factor that a model gives to its embeddings."""
    batch, states, read = random_batch(torch.tensor([0, 3, 15, 30], dtype=torch.int32)), draw((30, 32), 0, torch.float32), []
    head, encode = build("fsp_bow", config).layers[0], encoder(batch, config)
    (layer,) = find_decoder_layers(head)
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    encode(head, states)
    assert torch.equal(read[0][0], states)


@every_kind
def test_a_head_reads_distances_alone(config):
    """Positions are in the states already: those that a model adds to its embeddings are not added once more."""
    batch, states = random_batch(torch.tensor([0, 3, 15, 30], dtype=torch.int32)), draw((30, 32), 0, torch.float32)
    head, encode = build("fsp_bow", config).layers[0], encoder(batch, config)
    moved = encoder(replace(batch, position_ids=batch.position_ids + 100), config)
    torch.testing.assert_close(moved(head, states), encode(head, states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_head_of_gpt2_by_its_parts(dtype):
    head, states = build("fsp_bow", build_toy("gpt2")).layers[0].to(dtype), draw((1, 30, 32), 0, dtype)
    found = head(inputs_embeds=states, position_ids=torch.arange(30)[None], use_cache=False).last_hidden_state
    assert found.dtype == dtype and torch.equal(found, head.ln_f(head.h[0](states)))


def test_layers_start_as_those_of_the_model():
    config = tiny_llama()
    layers = [layer.layers[0] for layer in build("mtp", config, tokens=3).layers]
    for layer in layers:
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
        assert (layer.input_layernorm.weight == 1).all()
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    head = build("top", config).head.weight
    assert head.shape == (61, 32) and head.std().item() == pytest.approx(config.initializer_range, rel=0.1)


@pytest.mark.parametrize("name", ["mtp", "fsp_bow"])
def test_the_flash_attention_of_gpus_gives_the_same(name):
    batch, config = random_batch(torch.tensor([0, 3, 15, 30], dtype=torch.int32), VOCABULARY), small_llama()
    passes = VarlenBackend(max_length=30, head_dim=4)
    layout = passes._lay_out(batch.cu_seqlens, is_strict=False, window_k=0)
    masked, varlen = build(name), build(name, attention="varlen")
    varlen.load_state_dict(masked.state_dict())
    states, output = draw((30, WIDTH), 0, torch.float32), draw((VOCABULARY, WIDTH), 1, torch.float32)

    def encode(layer, states):
        outputs = layer(inputs_embeds=states[None], position_ids=batch.position_ids, documents=layout, use_cache=False)
        return outputs.last_hidden_state[0]

    trunk = BackboneOutput(states, batch, None, batch.labels[0], OutputHead(output), encode)
    expected = masked.sum_losses(trunk._replace(encode=encoder(batch, config)))
    torch.testing.assert_close(varlen.sum_losses(trunk), expected, rtol=1e-5, atol=0.0)


def count_weights(objective: LabelObjective) -> tuple[float, float]:
    """Weights that a token meets in the layers, and behind them where something is predicted."""
    return sum(count_weights_used(each, each.config) for each in objective.layers), objective.count_head_weights()


def test_weights_that_are_counted():
    """A layer of width 32: query and output 32 x 32, key and value 32 x 16, three matrices of 32 x 48."""
    layer, table = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 61 * 32
    assert count_weights(build("mtp", tiny_llama(), tokens=4)) == (3 * layer, 3 * table)
    assert count_weights(build("top", tiny_llama())) == (0, table)
    assert count_weights(build("fsp_bow", tiny_llama())) == (layer, table)
    assert [part.config.num_hidden_layers for part in build("mtp", tiny_llama(), tokens=4).layers] == [1, 1, 1]
    experts, router = 2 * 3 * 32 * 24, 4 * 32
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert count_weights(build("fsp_bow", build_toy("qwen3_moe")))[0] == attention + experts + router
    assert count_weights(build("fsp_bow", build_toy("qwen3_moe", mlp_only_layers=[1])))[0] == layer
    assert count_weights(build("fsp_bow", build_toy("gpt2")))[0] == 12 * 32 * 32


def find_conflicts(name: str, model_config: PretrainedConfig) -> list[str]:
    """What is found before there are processes."""
    kind = BUILT_IN[name]
    return list(kind.load().find_model_conflicts(kind.options(), model_config))


@pytest.mark.parametrize("name", ["mtp", "fsp_bow"])
def test_models_whose_layers_cannot_be_run_are_refused(name, monkeypatch):
    recurrent = type("GLAConfig", (LlamaConfig,), {"__module__": "fla.models.gla"})(max_position_embeddings=4096)
    (line,) = find_conflicts(name, recurrent)
    assert line.startswith(f'objective.name = "{name}"') and "recurrences" in line
    assert not find_conflicts("top", recurrent)

    class OnlyTokens(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    monkeypatch.setattr(extra_layer, "build_on_meta", lambda *_: SimpleNamespace(base_model=OnlyTokens()))
    with pytest.raises(UserError, match=f'objective.name = "{name}" .*inputs_embeds'):
        build(name)
