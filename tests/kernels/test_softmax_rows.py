"""Rows of scores: blocks on the CPU against float64 autograd, and the Triton code, interpreted, against those."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given
from hypothesis import settings as how_often
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flame.kernels import softmax_rows
from flame.kernels.softmax_rows import count_chunk_rows, softmax_rows_
from tests.support.models import needs_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def draw_rows(columns: int, seed: int, has_count: bool, has_excluded: bool, has_keys: bool):
    """Scores, own columns (some -1), scale, count, excluded ranges (some empty, some over the own column, some beside it), keys
    of columns and of own columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = 5
    count = int(torch.randint(1, columns + 1, (), generator=generator)) if has_count else columns
    scores = torch.randn(rows, columns, generator=generator)
    own = torch.randint(0, count, (rows,), generator=generator)
    horizon = torch.randint(-3, 4, (2, rows), generator=generator)
    excluded = ((own - horizon[0]).clamp(min=0), (own + horizon[1]).clamp(max=columns - 1)) if has_excluded else None
    column_keys = torch.randint(0, 6, (columns,), generator=generator, dtype=torch.int32)
    keys = (column_keys, column_keys[own]) if has_keys else None
    own[torch.rand(rows, generator=generator) < 0.2] = -1
    return scores, own, torch.tensor(2.5), torch.tensor(count) if has_count else None, excluded, keys


cases = given(
    columns=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    has_count=st.booleans(),
    has_excluded=st.booleans(),
    has_keys=st.booleans(),
    cap=st.sampled_from([None, 0.8, 30.0]),
)


@cases
def test_blocks_against_autograd(columns, seed, has_count, has_excluded, has_keys, cap):
    scores, own, scale, count, excluded, keys = draw_rows(columns, seed, has_count, has_excluded, has_keys)
    scores, scale = scores.double().requires_grad_(), scale.double().requires_grad_()
    found_grad = scores.detach().clone()
    with patch.object(softmax_rows, "BLOCK_SCORES", 2 * columns):
        found = softmax_rows_(found_grad, own, scale.detach(), count, excluded, keys, cap)
    for i in range(len(scores)):
        if own[i] < 0:
            assert not found_grad[i].any() and all(part[i] == 0 for part in found)
            continue
        left_out = set() if excluded is None else set(range(int(excluded[0][i]), int(excluded[1][i]) + 1)) - {int(own[i])}
        if keys is not None:
            left_out |= {j for j in range(columns) if keys[0][j] == keys[0][own[i]]} - {int(own[i])}
        kept = [j for j in range(columns if count is None else int(count)) if j not in left_out]
        row = scores[i] if cap is None else cap * torch.tanh(scores[i] / cap)
        loss = F.cross_entropy((row[kept] * scale)[None], torch.tensor([kept.index(int(own[i]))]))
        by_scores, by_scale = torch.autograd.grad(loss, (scores, scale))
        torch.testing.assert_close(found.loss[i], loss.detach())
        torch.testing.assert_close(found_grad[i], by_scores[i] / scale.detach())
        torch.testing.assert_close(found.grad_scale[i], by_scale)
        assert found.counted[i] == len(kept)
        assert found.own_score[i] == row[own[i]]
        assert found.is_best[i] == all(scores[i, own[i]] > scores[i, j] for j in kept if j != own[i])


@cases
def test_narrow_scores_are_computed_in_float32(columns, seed, has_count, has_excluded, has_keys, cap):
    scores, own, scale, *options = draw_rows(columns, seed, has_count, has_excluded, has_keys)
    narrow, exact = scores.bfloat16(), scores.bfloat16().float()
    found = softmax_rows_(narrow, own, scale, *options, cap)
    for ours, theirs in zip(found, softmax_rows_(exact, own, scale, *options, cap), strict=True):
        assert ours.dtype == torch.float32 and ours.equal(theirs)
    assert narrow.equal(exact.bfloat16())


@pytest.mark.parametrize("by", ["count", "excluded", "keys"])
def test_what_does_not_count_may_be_anything(by):
    """Also NaN: columns after `count` may never have been written."""
    scores, own = torch.randn(3, 8), torch.tensor([0, 1, 2])
    scores[:, 5:] = torch.nan
    count = torch.tensor(5) if by == "count" else None
    excluded = (torch.full((3,), 5), torch.full((3,), 7)) if by == "excluded" else None
    keys = (torch.tensor([9, 9, 9, 1, 1, 9, 9, 9]), torch.full((3,), 9)) if by == "keys" else None
    sums = softmax_rows_(scores, own, torch.tensor(1.0), count, excluded, keys)
    assert scores.isfinite().all() and all(part.isfinite().all() for part in sums)


@pytest.mark.parametrize("anything", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("run", [softmax_rows._compute, *([softmax_rows._launch] if INTERPRETED else [])])
def test_a_row_without_own_column_may_hold_anything(run, cap, anything):
    scores, own = torch.randn(3, 8), torch.tensor([0, -1, 2])
    scores[1] = anything
    expected = scores[[0, 2]].clone()
    sums = run(scores, own, torch.tensor(2.0), None, None, None, cap)
    assert not scores[1].any() and all(part[1] == 0 for part in sums)
    others = run(expected, own[[0, 2]], torch.tensor(2.0), None, None, None, cap)
    torch.testing.assert_close((scores[[0, 2]], [part[[0, 2]] for part in sums]), (expected, list(others)))


@pytest.mark.parametrize("run", [softmax_rows._compute, *([softmax_rows._launch] if INTERPRETED else [])])
def test_an_own_column_that_does_not_count_is_not_passed_over(run):
    scores, own = torch.randn(4, 20), torch.tensor([3, 20, 17, -1])
    sums = run(scores, own, torch.tensor(1.0), torch.tensor(15), None)
    assert sums.loss.isnan().tolist() == [False, True, True, False] and not scores[1:].any()


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernel_in_the_interpreter, in a process of its own")
@cases
@how_often(deadline=None, max_examples=40)
def test_kernel_against_blocks(columns, seed, has_count, has_excluded, has_keys, cap):
    scores, own, scale, count, excluded, keys = draw_rows(columns, seed, has_count, has_excluded, has_keys)
    found_grad, exact_grad = scores.clone(), scores.double()
    found = softmax_rows._launch(found_grad, own, scale, count, excluded, keys, cap)
    exact = softmax_rows_(exact_grad, own, scale.double(), count, excluded, keys, cap)
    torch.testing.assert_close(found_grad.double(), exact_grad, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason="starts itself")
def test_kernel_in_the_interpreter():
    """Triton's interpreter is chosen when triton is imported. Blocks of 16 columns, so that rows have several."""
    code = (
        "import pytest, flame.kernels.softmax_rows as s; s.BLOCK = 16; "
        f"raise SystemExit(pytest.main(['-rA', '-p', 'no:cacheprovider', {__file__!r} + '::test_kernel_against_blocks', "
        f"{__file__!r} + '::test_an_own_column_that_does_not_count_is_not_passed_over', "
        f"{__file__!r} + '::test_a_row_without_own_column_may_hold_anything']))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "options", [(), ("CAP",), ("COUNT",), ("COUNT", "EXCLUDED"), ("COUNT", "KEYS"), ("COUNT", "EXCLUDED", "KEYS")]
)
def test_kernel_compiles_for_hopper(dtype, options):
    """To machine code, which needs no GPU."""
    kernel = softmax_rows._softmax_rows_kernel
    settings: dict[str, int] = {f"HAS_{name}": name in options for name in ("COUNT", "EXCLUDED", "KEYS", "CAP")}
    settings |= {"BLOCK": softmax_rows.BLOCK, "STAGES": softmax_rows.STAGES}
    signature = dict.fromkeys(kernel.arg_names, "*i64") | dict.fromkeys(settings, "constexpr")
    signature |= dict.fromkeys(("row_stride", "rows", "columns"), "i32") | dict.fromkeys(("scale_ptr", "sums_ptr"), "*fp32")
    signature |= {"cap": "fp32", "scores_ptr": f"*{dtype}", "keys_ptr": "*i32", "own_keys_ptr": "*i32"}
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    aligned = {place[name]: [["tt.divisibility", 16]] for name in ("scores_ptr", "row_stride")}
    constants = {place[name]: value for name, value in settings.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": softmax_rows.NUM_WARPS})
    assert "cubin" in compiled.asm


@given(rows=st.integers(1, 10**6), columns=st.integers(1, 10**6))
def test_chunks_are_even_and_small(rows, columns):
    chunk = count_chunk_rows(rows, columns, torch.bfloat16)
    assert chunk % softmax_rows.ROW_TILE == 0
    chunks = -(-rows // chunk)
    assert chunk * columns * 2 <= softmax_rows.CHUNK_BYTES + softmax_rows.ROW_TILE * columns * 2
    assert chunks * chunk - rows < chunks * softmax_rows.ROW_TILE
