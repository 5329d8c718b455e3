"""Does a model obey the boundaries of documents and the direction of a pass? Is its head the plain product that the loss takes?

Asked of families that no test vouches for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from flame.data.batch import PackedBatch, build_batch
from flame.data.lines import Cursor
from flame.data.streams import PackedSequence
from flame.errors import UserError
from flame.models.families import find_family
from flame.models.fla_families import is_tested_fla
from flame.models.future_encoder import is_recurrent
from flame.models.future_lm import FutureLM

LENGTHS = (7, 1, *7 * (17,), 7)
"""Of the documents of the pack: 134 tokens, since compiled FlexAttention needs 128 (`future_lm.SHORTEST_FLEX`), in short
documents, since a model may know few positions. The first and the last are the same text."""
PERTURBED = (0, 4, 7, 8, 16, 24, 133)
"""Tokens that are changed, one at a time: first, inner and last ones, in four of the documents."""
SEED = 0
SPREAD = 0.02
"""Of the numbers that stand in for weights that start at zero."""
WIDEST_SHIFTS = {torch.float32: 0.01, torch.bfloat16: 0.2}
"""How much the states of the same text may differ, relative, between two places of the pack, by the dtype of the products:
rounding is far below."""
ENLARGED = 1000.0
"""Factor of hidden states, so that a cap on logits shows, which the first ones, near zero, do not reach."""
LARGEST_LOGIT_ERROR = 0.05
"""Of all logits together, relative: rounding is below."""


def needs_leak_check(config: PretrainedConfig) -> bool:
    """Whether the family is none whose passes the tests check: a custom model, code from the Hub, a family not tried."""
    return not is_tested_fla(config) if is_recurrent(config) else find_family(config) is None


def check_no_leak(model: FutureLM, device: torch.device, with_future: bool, window_k: int = 0) -> None:
    """Change single tokens of a small random pack and see whose hidden states change.

    In the causal pass only later tokens of the same document may (and the token itself), in the anti-causal one only earlier.
    And the same text must give the same states wherever in the pack it lies. The model's own logits must be its hidden states
    times its output embedding. All ranks must call this together. Weights that
    are all zero, which would hide what stands behind them, are random meanwhile. Weights, gradients, random generators and the
    modes of all modules are as before at the end.

    Args:
        model: with storage and initial weights, sharded or not.
        with_future: check the anti-causal pass too.
        window_k: its window.

    Raises:
        UserError: the model reads what it must not, or its logits are others.
    """
    vocab_size = model.lm.config.vocab_size
    tokens = _draw_tokens(vocab_size)
    packs = [tokens] + [_change(tokens, place, vocab_size) for place in PERTURBED]

    def run(root: FutureLM) -> tuple[dict[str, tuple[Tensor, ...]], bool, torch.dtype]:
        def encode(tokens: np.ndarray, direction: str) -> Tensor:
            batch = _build_pack(tokens).to(device)
            states = root.encode_past(batch) if direction == "causal" else root.encode_future(batch, window_k)
            return states.float().cpu()

        directions = ("causal", "future") if with_future else ("causal",)
        found = {d: (encode(tokens, d), *(encode(pack, d) for pack in packs)) for d in directions}
        return found, _is_head_plain(root, _build_pack(tokens).to(device)), root.output_embedding.dtype

    name = f'model_type "{model.lm.config.model_type}"'
    with _left_as_it_was(model, device), torch.no_grad():
        try:
            found, is_head_plain, dtype = model(run)
        except Exception as error:  # whatever code that nobody has tried does
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"{name} cannot run on packed documents: its base model is called with input_ids, position_ids and a "
                f"four-dimensional attention_mask ({reason})"
            ) from error
    faults = []
    for direction, (again, base, *changed) in found.items():
        faults += _find_leaks(direction, base, again, changed) or _find_shifts(direction, base, WIDEST_SHIFTS[dtype])
    if not is_head_plain:
        faults.append(
            "is not supported: its logits are not its base model's last hidden states times its output embedding, from which the "
            "loss is taken"
        )
    if faults:
        raise UserError(*(f"{name} {fault}; it cannot be trained here" for fault in faults))


def _draw_tokens(vocab_size: int) -> np.ndarray:
    tokens = np.random.default_rng(SEED).integers(0, vocab_size, sum(LENGTHS))
    tokens[-LENGTHS[-1] :] = tokens[: LENGTHS[0]]
    return tokens


def _change(tokens: np.ndarray, place: int, vocab_size: int) -> np.ndarray:
    tokens = tokens.copy()
    tokens[place] = (tokens[place] + 1 + vocab_size // 2) % vocab_size
    return tokens


def _build_pack(tokens: np.ndarray) -> PackedBatch:
    cu_seqlens = np.cumsum([0, *LENGTHS]).astype(np.int32)
    return build_batch(PackedSequence(tokens, cu_seqlens, "", 0, Cursor(0, 0, 0, 0), [], 0), sequence_index=0)


def _find_leaks(direction: str, base: Tensor, again: Tensor, changed: list[Tensor]) -> list[str]:
    """What a pass reads and must not: [] or one fault.

    base and again, of the same tokens, tell by how much kernels vary by themselves.
    """
    noise = 4 * (base - again).abs().max()
    edges = np.cumsum([0, *LENGTHS])
    for place, states in zip(PERTURBED, changed, strict=True):
        touched = ((states - base).abs() > noise).any(-1) | (states.isfinite().all(-1) != base.isfinite().all(-1))
        document = int(np.searchsorted(edges, place, side="right")) - 1
        start, end = int(edges[document]), int(edges[document + 1])
        if touched[:start].any() or touched[end:].any():
            return [
                f"reads across documents: in its {_name(direction)} pass, a token of one document changes the states of another "
                "one in the same packed sequence. It must attend as the attention_mask (bool [1, 1, T, T] or BlockMask) allows"
            ]
        wrong = touched[start:place] if direction == "causal" else touched[place + 1 : end]
        if wrong.any():
            what = "its causal pass sees the future" if direction == "causal" else "its anti-causal pass sees the past"
            return [
                f"takes no mask: {what} of the document. It must attend as the attention_mask allows and add no mask of its own"
            ]
    return []


def _find_shifts(direction: str, base: Tensor, widest: float) -> list[str]:
    """The first and the last document are the same: [] or one fault if their states are not."""
    first, last = base[: LENGTHS[0]], base[-LENGTHS[-1] :]
    if (first - last).norm() <= widest * first.norm():
        return []
    return [
        f"gives a document other states at another place of the packed sequence, in its {_name(direction)} pass: it must take "
        "positions from position_ids, which begin at 0 in each document"
    ]


def _is_head_plain(root: FutureLM, batch: PackedBatch) -> bool:
    """Whether the logits are the base model's last hidden states times the output embedding, also of large states.

    Asked of the first document, whose logits are the same where the whole model takes neither mask nor positions.
    """
    inputs: dict[str, Any] = {}
    factors = [1.0]  # a model may use the head's weight without calling the head

    def enlarge(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factors.append(ENLARGED)
        return args[0] * ENLARGED, *args[1:]

    with ExitStack() as hooks:
        note = root.lm.base_model.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
        hooks.callback(note.remove)
        states = root.encode_past(batch)[: LENGTHS[0]]
        hooks.callback(root.lm.get_output_embeddings().register_forward_pre_hook(enlarge).remove)
        logits = root.lm(**_select_taken(root.lm, inputs)).logits[0, : LENGTHS[0]]
    expected = factors[-1] * states.float() @ root.output_embedding.float().T
    return bool((logits.float() - expected).norm() <= LARGEST_LOGIT_ERROR * expected.norm())


def _select_taken(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of the base model's arguments those that the whole model takes too."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _name(direction: str) -> str:
    return "causal" if direction == "causal" else "anti-causal"


@contextmanager
def _left_as_it_was(model: FutureLM, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no zero weights; afterwards everything as before."""
    modes = [(module, module.training) for module in model.modules()]
    networks = [network for network in (model.lm, model.teacher) if network is not None]
    zeros = [local for network in networks for local in map(_get_local, network.parameters()) if not local.any()]
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
                    module.reshard()  # the weights gathered now are not those of the first step


def _get_local(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
