"""The action loss of the future objective against its definition as a plain loop in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from flame.data.batch import NO_LABEL, PackedBatch
from flame.models.wrapper import TrainingModel
from flame.objectives.future.actions import DIAGNOSTICS
from flame.objectives.future.anchors import choose_shift
from flame.objectives.future.options import ActionOptions, FutureOptions, PredictorOptions
from flame.objectives.probe import measure_step
from flame.objectives.step import Requested, compute_losses
from tests.support.answers import build_pack, split_documents
from tests.support.families import build_toy
from tests.support.models import (
    build_unsharded,
    configure,
    count_flops,
    get_own,
    pack,
    random_batch,
    random_cu_seqlens,
    tiny_llama,
)
from tests.support.objectives import build_objective, choose

TOP_K = 4
WITHOUT_NEGATIVES = {"estimator_type": "cosine", "learnable_temperature": False}
"""Then the whole loss is a sum over documents."""


def build(*further, action: dict | None = None, **changes) -> TrainingModel:
    options = ActionOptions(**{"top_k": TOP_K, "loss_weight": 0.7} | (action or {}))
    model = build_objective("future", options, *further, **WITHOUT_NEGATIVES | changes)
    with torch.no_grad():  # states and embeddings of one size, so that candidates differ
        model.lm.get_input_embeddings().weight.mul_(30)
    return model.double()


def draw_batch(answers_only: bool = False) -> PackedBatch:
    return build_pack([(11, 3), (4, 0), (6, 5)]) if answers_only else random_batch(random_cu_seqlens(40, 6, seed=1))


def run(model: TrainingModel, batch: PackedBatch, **requested: bool):
    return model(compute_losses, batch, Requested(aux=True, ce=False, **requested)).aux


def compute_by_loop(model: TrainingModel, batch: PackedBatch) -> tuple[Tensor, dict[str, float]]:
    """The sum over anchors, and of each diagnostic: one document and one anchor at a time."""
    own, total = get_own(model), torch.zeros((), dtype=torch.float64)
    head, options, shift = own.action.head, own.action.options, choose_shift(batch, own.options, own.setup.seed)
    sums = dict.fromkeys(DIAGNOSTICS, 0.0)
    embed = model.lm.get_input_embeddings()
    for document in split_documents(batch):
        states = model.encode_past(document)
        logits = model.output_head.compute_logits(states)
        summaries = model.encode_future(document).detach()
        if own.estimator.projection is not None:
            summaries = summaries @ own.estimator.projection
        for t, label in enumerate(document.labels[0].tolist()):
            if label == NO_LABEL or t + shift >= len(states):
                continue
            top = logits[t].topk(options.top_k).indices.tolist()
            actions = sorted({*top, label})
            scores = []
            for action in actions:
                mixed = head.mix.weight @ torch.cat([states[t].detach(), embed(torch.tensor(action)).detach()]) + head.mix.bias
                predicted, wanted = head.out.weight @ gelu(mixed) + head.out.bias, summaries[t + shift]
                scores.append(predicted @ wanted / (predicted.norm() * wanted.norm()).clamp(min=1e-9))
            biased = [score + options.label_bias * (action == label) for score, action in zip(scores, actions, strict=True)]
            rewards = torch.softmax(torch.stack(biased) / options.temperature, dim=0)
            log_probs = torch.log_softmax(logits[t], dim=0)[actions]
            total = total - (rewards * log_probs).sum() / len(actions)
            spread = torch.stack(scores).std(correction=0)
            found = (label in top, rewards[actions.index(label)], rewards.max(), spread)
            sums = {name: value + float(each) for (name, value), each in zip(sums.items(), found, strict=True)}
    return total, sums


def expect_same(model: TrainingModel, compute: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Value and gradient, but for the rounding of norms, which transformers computes in float32."""
    found = []
    for each in (compute, other):
        model.zero_grad()
        loss = each()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.lm.parameters() if p.grad is not None])))
    (loss, gradient), (expected, expected_gradient) = found
    assert loss == pytest.approx(expected, rel=1e-7)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


CASES = {
    "plain": {},
    "sharp": {"action": {"temperature": 0.1, "label_bias": 0.2}},
    "all tokens": {"action": {"top_k": 61}},
    "projected": {"projection_dim": 8},
    "shifts drawn": {"target_shift_max": 3},
    "early layer": {"further": PredictorOptions(layer=1)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("answers_only", [False, True])
def test_it_is_its_definition(case, answers_only):
    """Value and gradient of what it adds to the loss of the summaries."""
    settings = dict(CASES[case])
    further = [settings.pop("further")] if "further" in settings else []
    model, batch = build(*further, **settings), draw_batch(answers_only)
    own = get_own(model)

    def compute() -> Tensor:
        action, own.action = own.action, None
        without = run(model, batch).loss_sum
        own.action = action
        return run(model, batch).loss_sum - without

    expect_same(model, compute, lambda: 0.7 * compute_by_loop(model, batch)[0])


def test_logits_and_embeddings_are_those_of_the_family():
    """Gemma 2 caps logits, and scales embeddings in their module."""
    model = build_unsharded(choose("future", ActionOptions(top_k=TOP_K), **WITHOUT_NEGATIVES), build_toy("gemma2")).double()
    batch, embed = draw_batch(), model.lm.get_input_embeddings()
    assert model.output_head.rule.cap and not torch.equal(embed(batch.input_ids), embed.weight[batch.input_ids])
    expected, _ = compute_by_loop(model, batch)
    assert run(model, batch).measures["action_loss"].total.item() == pytest.approx(expected.item(), rel=1e-7)


def test_a_pack_is_the_sum_of_its_documents():
    """Loss and gradients: candidates, scores and rewards see no other document."""
    model, batch = build(action={"temperature": 0.1}), draw_batch()
    parts = lambda: sum(run(model, each).loss_sum for each in split_documents(batch))  # noqa: E731
    expect_same(model, lambda: run(model, batch).loss_sum, parts)


def test_a_changed_document_changes_its_own_part_alone():
    """Also beside negatives, which the loss of the summaries takes from other documents."""
    model, batch = build(estimator_type="infonce"), draw_batch()
    start = int(batch.cu_seqlens[-2])
    tokens = batch.input_ids[0].clone()
    tokens[start:] = (tokens[start:] + 1) % 61
    changed = pack(tokens, batch.cu_seqlens)

    def measure(each: PackedBatch) -> float:
        return run(model, each).measures["action_loss"].total.item()

    moved = measure(changed) - measure(batch)
    assert moved == pytest.approx(measure(split_documents(changed)[-1]) - measure(split_documents(batch)[-1]), rel=1e-6)
    assert abs(moved) > 1e-3


def test_the_language_model_and_its_output_head_learn_but_not_the_action_head():
    """Without the action loss, the output head learns nothing and there is no action head."""
    model = build_unsharded(
        choose("future", ActionOptions(top_k=TOP_K, loss_weight=0.7), **WITHOUT_NEGATIVES), tiny_llama(tie_word_embeddings=False)
    )
    run(model, draw_batch()).loss_sum.backward()
    head = {name: weight for name, weight in model.named_parameters() if ".action." in name}
    assert len(head) == 4 and all(weight.grad is None and not weight.requires_grad for weight in head.values())
    assert not any(f"action.{name}".startswith(tuple(get_own(model).list_exported())) for name in head)
    assert all(weight.grad.any() for weight in model.lm.parameters())
    plain = build_unsharded(choose("future", **WITHOUT_NEGATIVES), tiny_llama(tie_word_embeddings=False))
    run(plain, draw_batch()).loss_sum.backward()
    assert plain.lm.lm_head.weight.grad is None and not any(".action." in name for name in plain.state_dict())


def test_the_loss_and_its_part_are_logged():
    model, batch = build(estimator_type="infonce"), draw_batch()
    aux, (total, _) = run(model, batch), compute_by_loop(model, batch)
    part, items = aux.measures["action_loss"]
    assert part.item() == pytest.approx(0.7 * total.item(), rel=1e-9) and items == get_own(model).count(batch) == aux.num_items
    bound = aux.measures["mi_lower_bound"].total / items
    values = {"aux_loss": (aux.loss_sum / items).item(), "action_loss": (part / items).item(), "mi_lower_bound": bound.item()}
    told = f" (ln N {math.log(items):5.2f}) · of which actions {values['action_loss']:6.3f}"
    assert get_own(model).describe_metrics(values).startswith(told)


def test_diagnostics_are_their_definitions(one_process):
    model, batch = build(action={"temperature": 0.1}), draw_batch()
    found, (_, expected) = measure_step(model, batch, 42, 0.5, None), compute_by_loop(model, batch)
    for name, value in expected.items():
        total, items = found[f"future/{name}"]
        assert total.item() == pytest.approx(value, rel=1e-8) and items == get_own(model).count(batch), name
    assert 0 < expected["action_label_in_top_k"] < get_own(model).count(batch)


@pytest.mark.parametrize("part", ["rewards", "summaries"])
def test_if_one_of_the_losses_is_not_finite_both_are_zero(part):
    model, batch = build(), draw_batch()
    own = get_own(model)
    with torch.no_grad():
        (own.action.head.out if part == "rewards" else own.predictor.out).bias.fill_(torch.nan)
    aux = run(model, batch)
    assert aux.failed == 1 and aux.loss_sum == 0 and aux.num_items == 0
    assert all(total == items == 0 for total, items in aux.measures.values())
    aux.loss_sum.backward()
    assert not any(weight.grad.any() for weight in model.lm.parameters())


@pytest.mark.parametrize("answers_only", [False, True])
def test_flops_by_hand(answers_only):
    batch = draw_batch(answers_only)
    with_it, without = build(projection_dim=8), build_objective("future", projection_dim=8, **WITHOUT_NEGATIVES)
    rows = get_own(without).count(batch) if answers_only else 40
    head = 2 * 32 * 48 + 5 * (2 * 32 * 48 + 2 * 48 * 8)
    assert count_flops(with_it, batch).heads - count_flops(without, batch).heads == rows * (6 * 61 * 32 + head)


def test_impossible_values_are_refused_in_a_line():
    (line,) = ActionOptions(top_k=62).find_model_conflicts(tiny_llama())
    assert line.startswith("future_action.top_k = 62 is more than the model's vocab_size = 61")
    assert not list(ActionOptions(top_k=61).find_model_conflicts(tiny_llama()))
    config = configure(FutureOptions(), ActionOptions(top_k=4))
    assert not list(ActionOptions(top_k=4).find_conflicts(config, "future_action"))
    config.experimental.freeze_lm_for_infonce = True
    (line,) = ActionOptions(top_k=4).find_conflicts(config, "future_action")
    assert line.startswith("future_action.top_k = 4 beside experimental.freeze_lm_for_infonce = true") and "\n" not in line
    assert not list(ActionOptions().find_conflicts(config, "future_action"))
