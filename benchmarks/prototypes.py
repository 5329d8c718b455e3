"""Two plain implementations of the method, to compare the trainer with. No sharding, no optimizer; bfloat16 throughout.

`Planned`: what a page of PyTorch reaches with care. FlexAttention under masks that are built once, compiled layers, hidden states
only in the second pass, losses whose gradients are formed in the forward, chunk by chunk.
`Dense`: the recipe as first published. T x T attention masks, logits in both passes, the N x N matrix of InfoNCE.

Their predictor is layer norm, linear, GELU, linear; the temperature is 0.1, the weight of the future loss 0.1, the shift 1.
Steps drop their gradients at the end, so that between two steps only weights and masks are held.
Shape legend: T tokens, N anchors, d width, V vocabulary, c rows of a chunk.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flame.data.batch import NO_LABEL, PackedBatch

ROWS_PER_CHUNK = 4096
ANCHOR_MULTIPLE = 128
TEMPERATURE = 0.1
LOSS_WEIGHT = 0.1
DTYPE = torch.bfloat16

_create_block_mask = torch.compile(create_block_mask, dynamic=False)


class Predictor(nn.Module):
    """[..., d] -> [..., d], unit vectors."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.normalize(self.body(hidden_states), dim=-1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden_states [T, d], weight [V, d], labels [T]) -> mean over the labels that are not negative, 0-d float32."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        counted = labels >= 0
        count = counted.sum().clamp(min=1)
        own = labels.clamp(min=0)[:, None]
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=hidden_states.device)
        for start in range(0, len(hidden_states), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            logits = (hidden_states[rows] @ weight.t()).float()
            lse = logits.logsumexp(dim=-1)
            total += ((lse - logits.gather(1, own[rows])[:, 0]) * counted[rows]).sum()
            grad = (logits - lse[:, None]).exp_()
            grad.scatter_add_(1, own[rows], -torch.ones_like(lse)[:, None])
            grad *= (counted[rows] / count)[:, None]
            grad = grad.to(hidden_states.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.t() @ hidden_states[rows]
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total / count

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None


def _score_rows(predictions: Tensor, summaries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum (0-d) and probabilities [c, N] of predictions [c, d] whose own summaries are `rows` [c] of summaries [N, d]."""
    logits = (predictions @ summaries.t()).float() / TEMPERATURE
    lse = logits.logsumexp(dim=-1)
    loss = (lse - logits.gather(1, rows[:, None])[:, 0]).sum()
    return loss, (logits - lse[:, None]).exp().to(predictions.dtype)


_score_rows_compiled = torch.compile(_score_rows, dynamic=False)


class ChunkedInfoNCE(torch.autograd.Function):
    """(predictions [N, d], summaries [N, d], both unit vectors) -> mean, 0-d float32. The summaries get no gradient."""

    @staticmethod
    def forward(ctx, predictions: Tensor, summaries: Tensor) -> Tensor:
        grad_predictions = torch.empty_like(predictions)
        total = torch.zeros((), device=predictions.device)
        # Rows as a tensor: the number of a chunk's first row would be compiled in, and each chunk compiled anew.
        all_rows = torch.arange(len(predictions), device=predictions.device)
        chunks = (tensor.split(ROWS_PER_CHUNK) for tensor in (predictions, summaries, all_rows, grad_predictions))
        for own_predictions, own_summaries, rows, grad in zip(*chunks, strict=True):
            loss, probs = _score_rows_compiled(own_predictions, summaries, rows)
            total += loss
            grad.copy_((probs @ summaries - own_summaries) * (1 / TEMPERATURE / len(predictions)))
        ctx.save_for_backward(grad_predictions)
        return total / len(predictions)

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None]:
        (grad_predictions,) = ctx.saved_tensors
        return grad_predictions * grad_loss, None


class Planned:
    """The method with FlexAttention and chunked losses.

    Args:
        model_config: of a Llama.
        batch: on the device to run on.
    """

    def __init__(self, model_config: PretrainedConfig, batch: PackedBatch):
        device, total = batch.input_ids.device, batch.input_ids.shape[1]
        self.batch = batch
        self.lm = _build_lm(model_config, "flex_attention", device)
        self.predictor = Predictor(model_config.hidden_size).to(device, DTYPE)
        for layer in self.lm.model.layers:
            layer.compile(dynamic=False)
        self.anchors = _find_anchors(batch)

        document = batch.segment_ids[0]

        def is_past(b, h, q, kv):
            return (document[q] == document[kv]) & (kv <= q)

        def is_future(b, h, q, kv):
            return (document[q] == document[kv]) & (kv > q)

        self.past, self.future = (
            _create_block_mask(rule, None, None, total, total, device=device.type) for rule in (is_past, is_future)
        )

    def step_next_token(self) -> None:
        """Forward and backward of the cross entropy."""
        self._cross_entropy(self._encode(self.past)).backward()
        self._drop_gradients()

    def step(self) -> None:
        """Forward and backward of both losses."""
        ce, aux = self.losses()
        (ce + LOSS_WEIGHT * aux).backward()
        self._drop_gradients()

    def losses(self) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and mean InfoNCE loss over the anchors."""
        hidden_states = self._encode(self.past)
        ce = self._cross_entropy(hidden_states)
        with torch.no_grad():
            summaries = F.normalize(self._encode(self.future), dim=-1)
        return ce, ChunkedInfoNCE.apply(self.predictor(hidden_states[self.anchors]), summaries[self.anchors + 1])

    def _encode(self, mask: BlockMask) -> Tensor:
        batch = self.batch
        outputs = self.lm.model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False)
        return outputs.last_hidden_state[0]

    def _cross_entropy(self, hidden_states: Tensor) -> Tensor:
        return ChunkedCrossEntropy.apply(hidden_states, self.lm.lm_head.weight, self.batch.labels[0])

    def _drop_gradients(self) -> None:
        self.lm.zero_grad()
        self.predictor.zero_grad()


class Dense:
    """The recipe as first published, with its leak: the additive mask leaves rows without any key uniform over the pack.

    Args: as `Planned`.
    """

    def __init__(self, model_config: PretrainedConfig, batch: PackedBatch):
        device, total = batch.input_ids.device, batch.input_ids.shape[1]
        self.batch = batch
        self.lm = _build_lm(model_config, "sdpa", device)
        self.predictor = Predictor(model_config.hidden_size).to(device, DTYPE)
        self.anchors = _find_anchors(batch)
        # The library takes the next entry of each for its label, so the first token of a document must not be one.
        self.labels = torch.where(batch.position_ids == 0, NO_LABEL, batch.input_ids)

        document, index = batch.segment_ids[0], torch.arange(total, device=device)
        same = document[:, None] == document[None, :]
        ahead = index[None, :] > index[:, None]
        self.past = (same & ~ahead)[None, None]
        lowest = torch.full((total, total), torch.finfo(DTYPE).min, dtype=DTYPE, device=device)
        self.future = lowest.masked_fill_(same & ahead, 0.0)[None, None]

    def step(self) -> None:
        """Forward and backward of both losses."""
        ce, aux = self.losses()
        (ce + LOSS_WEIGHT * aux).backward()
        self.lm.zero_grad()
        self.predictor.zero_grad()

    def losses(self) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and mean InfoNCE loss over the anchors."""
        outputs = self._run(self.past, labels=self.labels)
        with torch.no_grad():
            summaries = self._run(self.future).hidden_states[-1][0]
        predictions = self.predictor(outputs.hidden_states[-1][0][self.anchors])
        scores = predictions @ F.normalize(summaries[self.anchors + 1], dim=-1).t() / TEMPERATURE
        return outputs.loss, F.cross_entropy(scores, torch.arange(len(predictions), device=predictions.device))

    def _run(self, mask: Tensor, labels: Tensor | None = None):
        batch = self.batch
        return self.lm(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, labels=labels,
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip


def _build_lm(model_config: PretrainedConfig, attention: str, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=DTYPE, attn_implementation=attention)
    return lm.train()


def _find_anchors(batch: PackedBatch) -> Tensor:
    """Positions of all tokens but the last of each document, cut to a number that suits the matrix units: int64 [N]."""
    anchors = (batch.labels[0] != NO_LABEL).nonzero()[:, 0]
    return anchors[: len(anchors) // ANCHOR_MULTIPLE * ANCHOR_MULTIPLE]
