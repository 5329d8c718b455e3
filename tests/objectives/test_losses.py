"""InfoNCE and cross entropy, value and gradient, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flame.kernels.cross_entropy import linear_cross_entropy
from flame.models.estimators import HIGHEST_LEARNED_TEMPERATURE, LOWEST_LEARNED_TEMPERATURE
from flame.models.future_predictor import FuturePredictorHead
from flame.models.mi_estimator import InfoNCEEstimator, build_mi_estimator
from flame.models.output_head import LogitRule, OutputHead
from flame.objectives.step import find_correct
from tests.support.losses import chunks_of


def infonce_by_loop(x, y, valid, temperature):
    """Sum over valid anchors; also how many score their own summary strictly best, and the cosine sums."""
    rows = [i for i in range(len(x)) if valid[i]]
    cosine = [[torch.dot(x[i], y[j]) / (x[i].norm() * y[j].norm()) for j in rows] for i in rows]
    total, correct, positive, negative = torch.zeros((), dtype=x.dtype), 0, 0.0, 0.0
    for a in range(len(rows)):
        total = total + torch.log(sum(torch.exp(c / temperature) for c in cosine[a])) - cosine[a][a] / temperature
        others = [cosine[a][b].item() for b in range(len(rows)) if b != a]
        correct += bool(others) and all(cosine[a][a].item() > c for c in others)
        positive += cosine[a][a].item()
        negative += sum(others) / len(others) if others else 0.0
    return total, correct, positive, negative


@pytest.mark.parametrize("rows_per_chunk", [3, 4096])
@given(n=st.integers(1, 11), seed=st.integers(0, 1000), temperature=st.sampled_from([0.05, 0.1, 1.0]), learnable=st.booleans())
def test_infonce_is_its_definition(rows_per_chunk, n, seed, temperature, learnable):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(n, generator=generator) < 0.7
    estimator = build_mi_estimator("infonce", 4, temperature=temperature, learnable_temperature=learnable).double()
    estimator.init_weights()  # the logarithm again, now in float64
    with chunks_of(rows_per_chunk):
        found = estimator.compare(x, y, valid)
    (3.0 * found.loss_sum).backward()

    x_loop = x.detach().clone().requires_grad_()
    t_loop = torch.tensor(math.log(temperature), dtype=torch.float64, requires_grad=True)
    total, correct, positive, negative = infonce_by_loop(x_loop, y, valid, t_loop.exp())
    count = int(valid.sum())
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.loss_sum, total, **tolerance)
    assert found.num_items == count
    expected = {
        "mi_lower_bound": count * math.log(max(count, 1)) - total.item(),
        "infonce_accuracy": correct,
        "positive_cosine": positive,
        "negative_cosine": negative,
    }
    assert {name: sums.item() for name, (sums, _) in found.measures.items()} == pytest.approx(expected, abs=1e-8)
    assert all(counted == count for _, counted in found.measures.values())
    if count:
        (3.0 * total).backward()
        torch.testing.assert_close(x.grad, x_loop.grad, **tolerance)
        if learnable:
            torch.testing.assert_close(estimator.log_temperature.grad.squeeze(), t_loop.grad, **tolerance)
    else:
        assert found.loss_sum == 0 and (x.grad == 0).all()


def test_reductions_and_shapes():
    estimator = InfoNCEEstimator(4)
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    total, mean = estimator(x, y, valid, reduction="sum"), estimator(x, y, valid)
    assert total.shape == mean.shape == ()
    torch.testing.assert_close(mean, total / 3)
    assert estimator(x, y, torch.zeros(2, 3, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match="median"):
        estimator(x, y, valid, reduction="median")
    with pytest.raises(ValueError, match='"nwj": allowed are "infonce", "bilinear", "cosine", "smooth_l1"'):
        build_mi_estimator("nwj", 4)


def test_collapsed_summaries_are_not_called_accurate():
    x, y = torch.randn(8, 4), torch.ones(8, 4)
    outcome = InfoNCEEstimator(4).compare(x, y, torch.ones(8, dtype=torch.bool))
    assert outcome.measures["infonce_accuracy"][0] == 0
    assert outcome.loss_sum.item() / 8 == pytest.approx(math.log(8), rel=1e-5)


def test_invalid_rows_cannot_be_seen():
    x, y, valid = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([True, False, True, True, False, True])
    base = InfoNCEEstimator(4)(x, y, valid)
    x[~valid], y[~valid] = 100.0, -100.0
    assert InfoNCEEstimator(4)(x, y, valid) == base


@pytest.mark.parametrize(("start", "bound"), [(-20.0, LOWEST_LEARNED_TEMPERATURE), (3.0, HIGHEST_LEARNED_TEMPERATURE)])
def test_learned_temperature_has_bounds(start, bound):
    estimator = InfoNCEEstimator(4, temperature=0.5, learnable_temperature=True)
    with torch.no_grad():
        estimator.log_temperature.fill_(start)
    estimator.limit_temperature()
    assert estimator.temperature(like=torch.zeros(1)).item() == pytest.approx(bound)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    estimator(x, y, torch.ones(5, dtype=torch.bool)).backward()
    assert estimator.log_temperature.grad != 0  # it can come back


@pytest.mark.parametrize("head_type", ["linear", "mlp", "gated"])
def test_predictor_gives_unit_vectors(head_type):
    head = FuturePredictorHead(8, head_type, dropout=0.5)
    out = head(torch.randn(3, 5, 8))
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(3, 5))
    x = torch.randn(1, 8)
    assert not torch.equal(head(x), head(x))  # dropout is there
    head.eval()
    assert torch.equal(head(x), head(x))


def test_unknown_head_is_named():
    with pytest.raises(ValueError, match="conv"):
        FuturePredictorHead(8, "conv")


@pytest.mark.parametrize("rows_per_chunk", [2, 4096])
@given(tokens=st.integers(1, 9), seed=st.integers(0, 1000))
def test_cross_entropy_is_its_definition(rows_per_chunk, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    with chunks_of(rows_per_chunk):
        found = linear_cross_entropy(hidden, weight, labels)
    (0.5 * found).backward()

    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    expected = sum(
        (torch.log(torch.exp(w @ h[t]).sum()) - w[labels[t]] @ h[t] for t in range(tokens) if labels[t] != -100), 0.0 * h.sum()
    )
    (0.5 * expected).backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hidden.grad, h.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight.grad, w.grad if w.grad is not None else torch.zeros_like(w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows_per_chunk", [2, 4096])
@given(
    tokens=st.integers(1, 9),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    cap=st.sampled_from([None, 0.7, 30.0]),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cross_entropy_of_changed_logits_is_its_definition(rows_per_chunk, tokens, scale, cap, has_bias, seed):
    """Value and all gradients by autograd of the formula, in float64, over chunks of two rows and of all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (tokens, 5), "weight": (7, 5), **({"bias": (7,)} if has_bias else {})}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    labels = torch.randint(0, 7, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    ours, theirs = ({name: tensor.clone().requires_grad_() for name, tensor in drawn.items()} for _ in range(2))
    with chunks_of(rows_per_chunk):
        found = linear_cross_entropy(ours["hidden"], ours["weight"], labels, ours.get("bias"), scale, cap)
    (0.5 * found).backward()

    expected = 0.0 * sum(tensor.sum() for tensor in theirs.values())
    for t in range(tokens):
        if labels[t] != -100:
            logits = theirs["weight"] @ theirs["hidden"][t]
            logits = scale * (logits + theirs["bias"] if has_bias else logits)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            expected = expected - torch.log_softmax(logits, dim=0)[labels[t]]
    (0.5 * expected).backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-9, atol=1e-9, msg=name)


class ProductCount(TorchDispatchMode):
    """Counts matrix products while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows_per_chunk", [2, 4096])
@pytest.mark.parametrize("in_float8", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_without_gradients_cross_entropy_is_the_same_to_the_bit(rows_per_chunk, in_float8, has_bias):
    hidden, weight, labels = torch.randn(9, 16), torch.randn(32, 16), torch.randint(0, 32, (9,))
    labels[3] = -100
    bias = torch.randn(32) if has_bias else None
    with chunks_of(rows_per_chunk):
        found = linear_cross_entropy(hidden, weight.requires_grad_(), labels, bias, 0.5, 3.0, in_float8)
        with torch.no_grad(), ProductCount() as products:
            assert linear_cross_entropy(hidden, weight, labels, bias, 0.5, 3.0, in_float8).equal(found)
        assert in_float8 or products.found == -(-9 // rows_per_chunk)
        assert linear_cross_entropy(hidden, weight.detach(), labels, bias, 0.5, 3.0, in_float8).equal(found)


def test_half_precision_inputs_are_summed_in_float32():
    hidden, weight, labels = torch.randn(64, 16), torch.randn(32, 16), torch.randint(0, 32, (64,))
    exact = linear_cross_entropy(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    found = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0.0)


def test_half_precision_logits_with_bias_scale_and_cap_are_near_float64():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in ((640, 16), (32, 16), (32,))]
    labels, results = torch.randint(0, 32, (640,), generator=generator), []
    for dtype in (torch.bfloat16, torch.float64):
        hidden, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in drawn)
        loss = linear_cross_entropy(hidden, weight, labels, bias, 0.5, 3.0)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert [tensor.dtype for tensor in results[0]] == [torch.float32, *3 * [torch.bfloat16]]
    for found, exact in zip(*results, strict=True):
        assert (found.double() - exact).norm() < 1e-2 * exact.norm()


def test_the_highest_logit_is_that_of_the_changed_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, 5), (7, 5), (7,)))
    head = OutputHead(weight, 3 * bias, LogitRule(0.5, 30.0))
    highest = head.compute_logits(hidden).argmax(dim=-1)
    labels = torch.where(torch.arange(40) % 3 == 0, highest, torch.randint(0, 7, (40,), generator=generator))
    labels[::5] = -100
    assert torch.equal(find_correct(hidden, head, labels), highest == labels)
    assert (highest != (hidden @ weight.T).argmax(dim=-1)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_none_is_the_highest(dtype):
    """In half precision logits that differ would be equal, so they are not rounded to it."""
    labels = torch.arange(7)
    equal = OutputHead(torch.zeros(7, 5, dtype=dtype), None, LogitRule())
    assert not find_correct(torch.ones(7, 5, dtype=dtype), equal, labels).any()
    near = OutputHead((torch.eye(7, 5, dtype=dtype) * 2**-10).index_fill(1, torch.tensor([4]), 1.0), None, LogitRule())
    assert find_correct(torch.eye(7, 5, dtype=dtype) + torch.tensor([0.0, 0, 0, 0, 8], dtype=dtype), near, labels)[:4].all()
