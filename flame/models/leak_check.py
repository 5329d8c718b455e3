"""Checks that a model respects document boundaries and the direction of a pass, and that its states are the model's own.

It runs for model families that the tests do not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame.attention.backends import is_recurrent
from flame.attention.families import find_family
from flame.attention.fla_families import is_tested_fla
from flame.data.batch import PackedBatch, build_batch
from flame.data.document_streams import Cursor
from flame.data.packing import PackedSequence
from flame.errors import UserError
from flame.models.first_layers import watch_next_layer
from flame.models.wrapper import TrainingModel

T = TypeVar("T")

LENGTHS = (7, 1, *7 * (17,), 7)
"""Lengths of the documents. They have 134 tokens in all, since FlexAttention needs 128 (`backends.SHORTEST_FLEX`). They are
short, since a model may have few positions. The first and the last document are the same text."""
PERTURBED = (0, 4, 7, 8, 16, 24, 133)
"""Positions whose token is changed, one at a time: first, inner and last tokens of four documents."""
SEED = 0
SPREAD = 0.02
"""Standard deviation of the random numbers that replace weights that are all zero."""
WIDEST_SHIFTS = {torch.float32: 0.01, torch.bfloat16: 0.2}
"""Largest relative difference between the states of the same text at two positions of the packed sequence, by compute dtype.
Rounding is far below."""
ALONE = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
"""Positions of a document that is also run alone."""
LEFT_OUT = ("softcap", "s_aux")
"""Arguments of attention that transformers' SDPA leaves out, in some releases without an error."""


class TwoPassModel(Protocol):
    """The interface of a model that can be checked, sharded or not."""

    @property
    def lm(self) -> PreTrainedModel: ...
    @property
    def output_embedding(self) -> Tensor: ...
    def encode_past(self, batch: PackedBatch) -> Tensor: ...
    def encode_future(self, batch: PackedBatch, window_k: int) -> Tensor: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def eval(self) -> Any: ...
    def __call__(self, step: Callable[..., T], *args: Any) -> T:
        """Run `step(self, *args)` in the forward of the root module, where FSDP has gathered its weights."""
        ...


class Finding(NamedTuple):
    """Outcome of one test of one pass."""

    direction: str
    """"causal" or "future"."""
    test: str
    """What must not happen."""
    fault: str
    """What is wrong; empty if nothing is."""
    change: float
    """Largest change of states that should not change, relative to the largest state."""


OTHER_DOCUMENTS = "tokens change states of other documents"
OTHER_DIRECTION = "tokens change states on the wrong side of them"
OTHER_PLACE = "a document's states depend on its place"


def needs_leak_check(config: PretrainedConfig) -> bool:
    """Whether the tests do not cover the family: a custom model, code from the Hub, or an untested family."""
    return not is_tested_fla(config) if is_recurrent(config) else find_family(config) is None


def check_no_leak(
    model: TrainingModel,
    device: torch.device,
    with_future: bool,
    window_k: int = 0,
    network: PreTrainedModel | None = None,
    layers: int = 0,
) -> None:
    """Change single tokens of a small random packed sequence and see which hidden states change.

    In the causal pass, only states of the token itself and later ones of its document may change; in the anti-causal pass, only
    those of the token itself and earlier ones. The same text must give the same states anywhere in the packed sequence. A model
    of transformers must give a document the states that its own eager attention gives to it alone.

    All ranks must call it together. Weights that are all zero could hide a leak, so they are random during the check. Afterwards,
    weights, gradients, random generators and module modes are as before.

    Args:
        model: with storage and initial weights, sharded or not.
        with_future: also check the anti-causal pass.
        window_k: window of the anti-causal pass.
        network: what runs it; None is the language model.
        layers: decoder layers that run, from the first; 0 is all.

    Raises:
        UserError: the model leaks, or computes other states than its own.
    """
    packs = build_packs(model.lm.config.vocab_size)
    too_many: list[str] = []

    def run(root: TrainingModel) -> tuple[dict[str, tuple[Tensor, ...]], Tensor | None, torch.dtype]:
        def encode(batch: PackedBatch, direction: str) -> Tensor:
            batch = batch.to(device)
            if direction == "causal":
                return root.encode_past(batch).float().cpu()
            with watch_next_layer(network or root.lm, layers) as ran:
                states = root.encode_future(batch, window_k, network, layers)
            too_many.extend(ran)
            return states.float().cpu()

        directions = ("causal", "future") if with_future else ("causal",)
        found = {d: tuple(encode(pack, d) for pack in packs) for d in directions}
        own = _encode_alone(root, packs[0].to(device)) if type(root.lm).__module__.startswith("transformers.") else None
        return found, own, root.output_embedding.dtype

    name = f'model_type "{model.lm.config.model_type}"'
    with left_as_it_was(model, device), torch.no_grad():
        try:
            found, own, dtype = model(run)
        except Exception as error:  # untested model code may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"{name} cannot run on packed documents: its base model is called with input_ids, position_ids and a "
                f"four-dimensional attention_mask ({reason})"
            ) from error
    faults = []
    for direction, states in found.items():
        findings = judge_pass(direction, states, WIDEST_SHIFTS[dtype])
        faults += [finding.fault for finding in findings if finding.fault][:1]
    if own is not None and not find_change(found["causal"][0][ALONE], own) <= WIDEST_SHIFTS[dtype]:
        faults.append(
            "is not supported: in a packed sequence, under the mask of its documents, it gives a document other states than its "
            "own attention (eager) gives to the document alone"
        )
    if too_many:
        faults.append(
            f"runs more than the first {layers} of its decoder layers, since it does not run the list that it keeps them in: set "
            "future_encoder.layers to 0"
        )
    if faults:
        raise UserError(*(f"{name} {fault}; it cannot be trained here" for fault in faults))


def _encode_alone(root: TwoPassModel, batch: PackedBatch) -> Tensor:
    """States [n, d] of the document `ALONE` by the model's own eager attention, with its own mask and positions.

    Raises:
        NotImplementedError: SDPA runs the model, and would leave out an argument of its attention.
    """
    configs = {id(config): config for module in root.lm.modules() if (config := getattr(module, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def refuse(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name in LEFT_OUT:
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"its attention asks for {name}, which SDPA leaves out")
        return own(module, *args, **kwargs)

    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for these two forwards
        try:
            if root.lm.config._attn_implementation == "sdpa":
                ALL_ATTENTION_FUNCTIONS["sdpa"] = refuse
                root.encode_past(batch)
            for config in configs.values():
                config._attn_implementation = "eager"
            return root.lm.base_model(input_ids=batch.input_ids[:, ALONE], use_cache=False).last_hidden_state[0].float().cpu()
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = own
            for key, config in configs.items():
                config._attn_implementation = before[key]


def build_packs(vocab_size: int) -> list[PackedBatch]:
    """The packed sequences to run: the original twice, since kernels may vary from run to run, then one for each change of
    `PERTURBED`."""
    tokens = _draw_tokens(vocab_size)
    return [_build_pack(pack) for pack in [tokens, tokens] + [_change(tokens, position, vocab_size) for position in PERTURBED]]


def judge_pass(direction: str, states: Sequence[Tensor], widest_shift: float) -> list[Finding]:
    """Findings of one pass.

    Args:
        states: [T, d], float on the CPU, for each packed sequence of `build_packs`.
    """
    again, base, *changed = states
    return [*_find_leaks(direction, base, again, changed), _find_shift(direction, base, widest_shift)]


def _draw_tokens(vocab_size: int) -> np.ndarray:
    tokens = np.random.default_rng(SEED).integers(0, vocab_size, sum(LENGTHS))
    tokens[-LENGTHS[-1] :] = tokens[: LENGTHS[0]]
    return tokens


def _change(tokens: np.ndarray, position: int, vocab_size: int) -> np.ndarray:
    tokens = tokens.copy()
    tokens[position] = (tokens[position] + 1 + vocab_size // 2) % vocab_size
    return tokens


def _build_pack(tokens: np.ndarray) -> PackedBatch:
    cu_seqlens = np.cumsum([0, *LENGTHS]).astype(np.int32)
    return build_batch(PackedSequence(tokens, cu_seqlens, "", 0, Cursor(0, 0, 0, 0), [], 0), sequence_index=0)


def _find_leaks(direction: str, base: Tensor, again: Tensor, changed: list[Tensor]) -> list[Finding]:
    """Leaks of a pass from other documents, and from the wrong side of its own.

    Args:
        base, again: states of the same tokens. Their difference is the noise of the kernels.
        changed: states after each change of `PERTURBED`.
    """
    noise, largest = 4 * (base - again).abs().max(), base.abs().max()
    edges = np.cumsum([0, *LENGTHS])
    elsewhere, astray = [0.0], [0.0]
    leaks = [False, False]
    for position, states in zip(PERTURBED, changed, strict=True):
        moved = ((states - base).abs() / largest).amax(-1)
        touched = ((states - base).abs() > noise).any(-1) | (states.isfinite().all(-1) != base.isfinite().all(-1))
        document = int(np.searchsorted(edges, position, side="right")) - 1
        start, end = int(edges[document]), int(edges[document + 1])
        wrong = slice(start, position) if direction == "causal" else slice(position + 1, end)
        leaks[0] |= bool(touched[:start].any() or touched[end:].any())
        leaks[1] |= bool(touched[wrong].any())
        elsewhere += [*moved[:start].tolist(), *moved[end:].tolist()]
        astray += moved[wrong].tolist()
    across = (
        f"reads across documents: in its {_name(direction)} pass, a token of one document changes the states of another "
        "one in the same packed sequence. It must attend as the attention_mask (bool [1, 1, T, T] or BlockMask) allows"
    )
    what = "its causal pass sees the future" if direction == "causal" else "its anti-causal pass sees the past"
    unmasked = f"takes no mask: {what} of the document. It must attend as the attention_mask allows and add no mask of its own"
    return [
        Finding(direction, OTHER_DOCUMENTS, across if leaks[0] else "", max(elsewhere)),
        Finding(direction, OTHER_DIRECTION, unmasked if leaks[1] else "", max(astray)),
    ]


def _find_shift(direction: str, base: Tensor, widest: float) -> Finding:
    """The first and the last document are the same text, so their states must be equal."""
    first, last = base[: LENGTHS[0]], base[-LENGTHS[-1] :]
    change = find_change(first, last)
    fault = (
        f"gives a document other states at another place of the packed sequence, in its {_name(direction)} pass: it must take "
        "positions from position_ids, which begin at 0 in each document"
    )
    return Finding(direction, OTHER_PLACE, "" if change <= widest else fault, change)


def find_change(first: Tensor, second: Tensor) -> float:
    """Norm of the difference of states, relative to the first."""
    return float((first - second).norm() / first.norm())


def _name(direction: str) -> str:
    return "causal" if direction == "causal" else "anti-causal"


@contextmanager
def left_as_it_was(model: TwoPassModel, device: torch.device) -> Iterator[None]:
    """Evaluation mode without all-zero weights. Everything is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    zeros = [local for local in map(_get_local, model.parameters()) if not local.any()]
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(SEED)
        model.eval()
        with torch.no_grad():
            for local in zeros:
                local.normal_(std=SPREAD)
        try:
            yield
        finally:
            for local in zeros:
                local.zero_()
            for module, mode in modes:
                module.training = mode
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # drop the gathered weights: they still hold the random replacements


def _get_local(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
