"""Checks that a loaded causal model respects document boundaries in packed sequences, by changing one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flame.attention.backends import Attention, PackedTokens, is_recurrent
from flame.attention.kernel_masks import Direction
from flame.errors import UserError
from flame.library.passes import (
    check_window,
    choose,
    find_device,
    find_faults,
    find_lm,
    is_vouched_for,
    list_choices,
    note_passed,
    run_pass,
)
from flame.models.head_check import find_head_error
from flame.models.leak_check import (
    LENGTHS,
    OTHER_PLACE,
    PERTURBED,
    WIDEST_SHIFTS,
    Finding,
    build_packs,
    judge_pass,
    left_as_it_was,
)
from flame.models.output_head import find_head_fault, read_head

T = TypeVar("T")

PASSES: dict[Direction, str] = {"causal": "causal, documents masked", "future": "anti-causal, documents masked"}
PLAIN = "plain forward, position_ids only"
OWN_STATES = "one document's states differ from the model's own"
ROUNDING = 1e-6
"""Largest relative change that counts as rounding in a mixture of experts: a changed token changes which tokens share a product
of an expert."""
LONGEST_REASON = 200


@dataclass(frozen=True)
class LeakTest:
    """One test of one pass."""

    name: str
    """Name of the pass."""
    question: str
    """What must not happen."""
    is_fault: bool
    change: float | None
    """Largest relative change of states that should not change; None if the pass could not be run."""
    reason: str = ""
    """Why the pass could not be run."""


@dataclass(frozen=True)
class LeakReport:
    """The result of `check_leaks`. Printed, it is a table and a verdict."""

    masked: Sequence[LeakTest]
    """Tests of the two passes of this package, `flame.encode_past` and `flame.encode_future`."""
    plain: Sequence[LeakTest]
    """Tests of the model's own forward over the same packed sequence, with position_ids that begin at 0 in each document."""
    has_plain_head: bool
    """Whether `FutureLoss.next_token_loss` computes the model's logits: last hidden states times the output head, with the scale
    and cap that the configuration names."""
    unsupported: Sequence[str] = ()
    """Other reasons why this package does not support the model."""

    @property
    def has_leak(self) -> bool:
        """Whether a pass of this package leaks, or cannot be run."""
        return any(test.is_fault for test in self.masked if test.question != OWN_STATES)

    @property
    def is_usable(self) -> bool:
        """Whether the passes of this package compute the model's own states, without a leak."""
        return not any(test.is_fault for test in self.masked)

    @property
    def failure(self) -> str:
        """Why no test could be run at all; empty otherwise."""
        tests = [*self.masked, *self.plain]
        return tests[0].reason if all(test.reason for test in tests) else ""

    @property
    def plain_leaks(self) -> bool:
        """Whether the model's own forward reads across documents, or reads later tokens."""
        return any(test.is_fault for test in self.plain)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        broken = [test.reason for test in self.masked if test.reason]
        if broken:
            masked = f"LEAK not excluded, since it cannot be run under a document mask ({broken[0]})"
        elif self.has_leak:
            masked = "LEAK under document masks"
        elif not self.is_usable:
            masked = "no leak under document masks, but the states are not the model's own"
        else:
            masked = "no leak under document masks, in either direction"
        if any(test.reason for test in self.plain):
            return f"{masked}; its plain forward cannot be run"
        if self.plain_leaks:
            return f"{masked}; its plain forward with position_ids alone LEAKS"
        return f"{masked}; none in its plain forward with position_ids alone"

    def __str__(self) -> str:
        tests = [*self.masked, *self.plain]
        lines = [("pass", "must not be", "found", "largest change")]
        for test in tests:
            found = "cannot be run" if test.reason else "YES" if test.is_fault else "no"
            lines.append((test.name, test.question, found, "-" if test.change is None else f"{test.change:.1e}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        notes = [] if self.has_plain_head else ["note: its logits are not its last hidden states times its output head"]
        notes += [f"note: the passes of flame are refused for it: {reason}" for reason in self.unsupported]
        return "\n".join([*table, *notes, self.verdict])


def check_leaks(model: nn.Module, window_k: int | None = 0) -> LeakReport:
    """Run a model on a small random packed sequence, change single tokens, and see which hidden states change.

    If the tests of this package do not cover the model's family, `flame.encode_past` and `flame.encode_future` accept the model
    only after it has passed. The model's weights, modes and attention and the random generators are restored afterwards.

    Args:
        model: as `flame.encode_past`.
        window_k: window of the anti-causal pass.

    Raises:
        UserError: the passes do not support this model.
    """
    lm = find_lm(model)
    window = check_window(lm, window_k)
    choices = [choose(lm, sum(LENGTHS))] if is_vouched_for(lm) else list_choices(lm)
    report = examine(lm, choices, window)
    if report.is_usable:
        for attention in choices:
            note_passed(lm, attention)
    return report


def examine(lm: PreTrainedModel, choices: Sequence[Attention], window_k: int = 0) -> LeakReport:
    """Like `check_leaks`, but for any model, and with each of several attention implementations."""
    adapter = _Adapter(lm, choices[0])
    packs = [pack.to(find_device(lm)) for pack in build_packs(lm.config.vocab_size)]
    widest = WIDEST_SHIFTS.get(lm.dtype, WIDEST_SHIFTS[torch.bfloat16])
    tolerance = ROUNDING if any("expert" in key for key in lm.config.to_dict()) else 0.0
    masked: list[LeakTest] = []
    with left_as_it_was(adapter, find_device(lm)), torch.no_grad():
        own = _try(lambda: lm.base_model(input_ids=packs[0].input_ids[:, : LENGTHS[0]], use_cache=False).last_hidden_state[0])
        for attention in choices:
            suffix = f" ({attention})" if len(choices) > 1 else ""
            for direction, title in PASSES.items():
                name = title + suffix
                encode = _Encode(lm, direction, window_k, attention)
                masked += _judge(name, direction, _try_all(encode, packs), widest, tolerance)
            if isinstance(own, Tensor) and not masked[-1].reason:
                first = run_pass(lm, packs[0], "causal", 0, attention, may_split=False)[: LENGTHS[0]]
                change = float((first.float() - own.float()).norm() / own.float().norm())
                masked.append(LeakTest(PASSES["causal"] + suffix, OWN_STATES, not change <= widest, change))
        plain = _judge(PLAIN, "causal", _try_all(lambda pack: _run_plain(lm, pack), packs), widest, tolerance)
        has_plain_head = not find_head_fault(lm) and _try(lambda: find_head_error(lm, read_head(lm))) == ""
    return LeakReport(masked, plain, has_plain_head, find_faults(lm))


class _Adapter(nn.Module):
    """A loaded model with the interface that `flame.models.leak_check` needs."""

    def __init__(self, lm: PreTrainedModel, attention: Attention):
        super().__init__()
        self.lm = lm
        self._attention: Attention = attention

    def encode_past(self, batch: PackedTokens) -> Tensor:
        return run_pass(self.lm, batch, "causal", 0, self._attention, may_split=False)

    def encode_future(self, batch: PackedTokens, window_k: int) -> Tensor:
        return run_pass(self.lm, batch, "future", window_k, self._attention, may_split=False)

    @property
    def output_embedding(self) -> Tensor:
        return self.lm.get_output_embeddings().weight

    def forward(self, step: Callable[..., T], *args: Any) -> T:
        return step(self, *args)


class _Encode:
    def __init__(self, lm: PreTrainedModel, direction: Direction, window_k: int, attention: Attention):
        self._lm, self._direction, self._window_k, self._attention = lm, direction, window_k, attention

    def __call__(self, pack: PackedTokens) -> Tensor:
        return run_pass(self._lm, pack, self._direction, self._window_k, self._attention, may_split=False)


def _run_plain(lm: PreTrainedModel, pack: PackedTokens) -> Tensor:
    """Run packed sequences with position_ids only, as is common. Recurrent models of flash-linear-attention take no positions."""
    positions = {} if is_recurrent(lm.config) else {"position_ids": pack.position_ids}
    return lm.base_model(input_ids=pack.input_ids, use_cache=False, **positions).last_hidden_state[0]


def _try(call: Callable[[], Any]) -> Any:
    """The result of a call or, if it fails, the error in one line."""
    try:
        return call()
    except Exception as error:  # untested model code may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}"


def _try_all(encode: Callable[[Any], Tensor], packs: Sequence[Any]) -> list[Tensor] | str:
    return _try(lambda: [encode(pack).float().cpu() for pack in packs])


def _judge(name: str, direction: str, states: list[Tensor] | str, widest: float, tolerance: float) -> list[LeakTest]:
    if isinstance(states, str):
        return [LeakTest(name, "it cannot be run on packed documents", True, None, states)]

    def is_leak(finding: Finding) -> bool:
        return bool(finding.fault) and not (finding.test != OTHER_PLACE and finding.change <= tolerance)

    findings = judge_pass(direction, states, widest)
    return [LeakTest(name, finding.test, is_leak(finding), finding.change) for finding in findings]


def require_no_leak(lm: PreTrainedModel, window_k: int) -> None:
    """Run `check_leaks` on a model that the tests of this package do not cover.

    Raises:
        UserError: it does not pass.
    """
    if not is_vouched_for(lm):
        report = check_leaks(lm, window_k)
        if not report.is_usable:
            raise UserError(f'{type(lm).__name__} (model_type "{lm.config.model_type}") cannot be used: {report.verdict}')


def describe_pack() -> str:
    """A description of the packed sequence, for output."""
    return f"{len(LENGTHS)} documents, {sum(LENGTHS)} tokens, {len(PERTURBED)} of them changed, one at a time"
