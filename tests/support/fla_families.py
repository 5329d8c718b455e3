"""Toy models of flash-linear-attention's families, and what must hold of each in both passes.

`python -m tests.support.fla_families NAME ...` checks families on a CPU, in Triton's interpreter: set
`TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from triton.runtime.autotuner import Autotuner

from flame.models.causal_lm import load_model_config
from flame.models.wrapper import TrainingModel
from flame.objectives.step import Requested, compute_losses
from flame.trainer.setup import build_modules, materialize
from tests.support.models import CPU, future_config, pack, random_batch

TOYS: dict[str, dict] = {
    "delta_net": {"num_heads": 4},
    "gated_deltanet": {"num_heads": 4, "head_dim": 32, "expand_v": 1.0},
    "gla": {"num_heads": 4, "expand_k": 1.0},
    "hgrn2": {"expand_ratio": 32},
    "kda": {"num_heads": 4, "head_dim": 32},
    "mamba2": {"head_dim": 32, "state_size": 16, "chunk_size": 16},
    "retnet": {"num_heads": 4, "expand_v": 1.0},
    "rwkv7": {
        "head_dim": 64,
        "decay_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "use_l2warp": False,
    },
}
RUNS_INTERPRETED = ("mamba2", "gla")
"""On CPUs, in seconds. So does hgrn2 in a minute and delta_net in minutes. The others' kernels cast loop counters, which are
plain integers in the interpreter."""
JITTER = 0.05
"""Spread of what is added to all weights, so that no initial zero hides a path."""
ROUNDING = {"rwkv7": 1e-2}
"""Changes of a state, relative, that are rounding and no leak. RWKV-7's kernel scales a chunk of tokens by its last decay: on an
H200 a token changed by 1.5 moves the two before it by 4e-3 in bfloat16, by 4e-5 in float32, and no other document."""
BOUNDARIES = {"cuda": [0, 70, 71, 200, 333, 512], "cpu": [0, 5, 6, 14]}
TOLERANCE = {"cuda": 3e-2, "cpu": 1e-4}
"""Relative, in the Euclidean norm: bfloat16 on GPUs, float32 on CPUs."""


def build_toy(name: str, **changes: object) -> PretrainedConfig:
    """Two layers of 128, vocabulary 61 unless changed."""
    import fla.models  # noqa: F401 - registers the families

    shape = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 61, "hidden_ratio": 2}
    return AutoConfig.for_model(name, **{**shape, **TOYS[name], **changes})


def take_first_kernel_config() -> None:
    """No timing of kernels' variants in this process: the first of each is taken."""
    patch.object(Autotuner, "_bench", lambda *args, **options: [0.0, 0.0, 0.0]).start()


def build_model(name: str, device: torch.device, **changes: object) -> TrainingModel:
    """With weights jittered; bfloat16 on GPUs."""
    toy = build_toy(name, **({"hidden_size": 64} if device.type == "cpu" else {}), **changes)
    model = build_modules(future_config(), toy, "cuda")  # these families are built alike for all devices
    materialize(model, device, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * JITTER).to(device))
    return model.to(torch.bfloat16) if device.type == "cuda" else model


@torch.no_grad()
def encode(model: TrainingModel, tokens: Tensor, cu_seqlens: Tensor, direction: str) -> Tensor:
    batch = pack(tokens, cu_seqlens).to(next(model.parameters()).device)
    return (model.encode_past(batch) if direction == "causal" else model.encode_future(batch, 0)).float()


def _boundaries(device: torch.device) -> tuple[Tensor, Tensor]:
    cu = torch.tensor(BOUNDARIES[device.type], dtype=torch.int32)
    return cu, random_batch(cu).input_ids[0]


def check_no_leak(name: str, device: torch.device) -> None:
    """A changed token changes itself, what must read it and, in its own document's reach, nothing else."""
    model = build_model(name, device)
    cu, tokens = _boundaries(device)
    edges = sorted({0, *(int(c) - 1 for c in cu[1:]), *(int(c) for c in cu[1:-1]), *(int(c) + 4 for c in cu[2:-1])})
    for direction in ("causal", "future"):
        base = encode(model, tokens, cu, direction)
        assert base.isfinite().all()
        for j in edges:
            changed_tokens = tokens.clone()
            changed_tokens[j] = (changed_tokens[j] + 1) % 61
            states = encode(model, changed_tokens, cu, direction)
            start, end = int(cu[cu <= j].max()), int(cu[cu > j].min())
            least = torch.zeros(len(base))
            least[start:end] = ROUNDING.get(name, 0.0)
            changed = ((states - base).norm(dim=-1) / base.norm(dim=-1)).cpu().gt(least).nonzero().flatten().tolist()
            low, high = (j, end - 1) if direction == "causal" else (start, j)
            assert j in changed and min(changed) >= low and max(changed) <= high, (direction, j, changed)
            if high - low > 1:
                assert len(changed) > 1, (direction, j, "nothing reads the token")


def check_packed_equals_one_by_one(name: str, device: torch.device) -> None:
    """Also the anti-causal pass against its definition: the reversed document, read forward by the model itself."""
    model = build_model(name, device)
    cu, tokens = _boundaries(device)
    for direction in ("causal", "future"):
        packed = encode(model, tokens, cu, direction)
        for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            document = tokens[start:end] if direction == "causal" else tokens[start:end].flip(0)
            with torch.no_grad():
                alone = model.lm.base_model(input_ids=document[None].to(device), use_cache=False).last_hidden_state[0].float()
            expected = alone if direction == "causal" else alone.flip(0)
            error = (packed[start:end] - expected).norm() / expected.norm()
            assert error < TOLERANCE[device.type], (direction, start, error.item())


def check_first_layers(name: str, device: torch.device) -> None:
    """The anti-causal pass of the first two layers is that of a model of two layers."""
    changes = {"use_lower_bound": False} if name == "hgrn2" else {}  # its bounds depend on how many layers there are
    whole, short = (build_model(name, device, num_hidden_layers=layers, **changes) for layers in (3, 2))
    assert not short.load_state_dict(whole.state_dict(), strict=False).missing_keys
    cu, tokens = _boundaries(device)
    batch = pack(tokens, cu).to(device)
    with torch.no_grad():
        found, expected, other = whole.encode_future(batch, layers=2), short.encode_future(batch), whole.encode_future(batch)
    for states, is_equal in ((found, True), (other, False)):
        error = ((states - expected).float().norm() / expected.float().norm()).item()
        assert (error < TOLERANCE[device.type]) == is_equal, (is_equal, error)


def check_loss_is_the_familys_own(name: str, device: torch.device) -> None:
    """One document: our cross entropy is what the family's own forward returns for labels."""
    model = build_model(name, device)
    total = BOUNDARIES[device.type][-1]
    batch = random_batch(torch.tensor([0, total], dtype=torch.int32)).to(device)
    with torch.no_grad():
        found = model(compute_losses, batch, Requested(aux=False)).ce_sum / batch.num_labels
        if device.type == "cuda":
            expected = model.lm(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
        else:  # the fused loss needs a GPU
            logits = model.lm(input_ids=batch.input_ids, use_cache=False).logits[0].float()
            expected = torch.nn.functional.cross_entropy(logits[:-1], batch.input_ids[0, 1:])
    error = abs(found.item() - expected.item()) / expected.item()
    assert error < (1e-2 if device.type == "cuda" else 1e-5), (found.item(), expected.item())


def check_loaded_class(name: str) -> None:
    """transformers has families of the same names, which read across documents: fla's is meant, before anything loads fla."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": name}))
        assert type(load_model_config(folder)).__module__.startswith("fla.")


CHECKS = (check_loss_is_the_familys_own, check_no_leak, check_packed_equals_one_by_one, check_first_layers)

if __name__ == "__main__":
    take_first_kernel_config()
    torch.set_num_threads(1)
    for family in sys.argv[1:]:
        check_loaded_class(family)
        for check in CHECKS:
            check(family, CPU)
        print(f"{family}: {len(CHECKS)} checks")
