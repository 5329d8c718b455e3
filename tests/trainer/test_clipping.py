"""`training.max_norm`: gradients are clipped to it; 0 and inf leave them as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flame import train
from tests.support.runs import run_here


@pytest.mark.parametrize(("max_norm", "is_clipped"), [("0", False), ("inf", False), ("1e9", False), ("1e-3", True)])
def test_gradients_are_clipped_to_a_norm_that_is_smaller_and_no_other(workspace, tmp_path, monkeypatch, max_norm, is_clipped):
    changes = []
    clip = train.clip_grad_norm_

    def watch(parameters, *arguments, **options) -> Tensor:
        kept = [parameter for parameter in parameters if parameter.grad is not None]
        before = [parameter.grad.clone() for parameter in kept]
        norm = clip(kept, *arguments, **options)
        changes.append([not torch.equal(old, parameter.grad) for old, parameter in zip(before, kept, strict=True)])
        return norm

    monkeypatch.setattr(train, "clip_grad_norm_", watch)
    rows = run_here(
        workspace, tmp_path / "run", training__max_norm=max_norm, training__steps=2, checkpoint__enable_checkpoint=False
    )
    assert len(changes) == 2 and all(any(of_step) == is_clipped for of_step in changes)
    assert all(row["grad_norm"] > 1e-3 for row in rows), "the norm that is logged is the one before clipping"
