"""Matrix products of the decoder layers in 8-bit floating point, forward and backward, by torchao.

Each row of a factor is scaled to the range of float8_e4m3 by its largest entry; the scale is rounded to a power of two. Weights
stay float32 parameters under the same names, so checkpoints and exports do not change.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn

from flame.errors import UserError
from flame.kernels.fp8 import FIRST_CAPABILITY, SIZE_STEP

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

logger = logging.getLogger("flame")


def convert_to_float8(layers: nn.ModuleList, device_type: str) -> None:
    """Replace the linear layers inside `layers` by 8-bit ones that share their parameters. Call before sharding.

    Layers with unsupported sizes stay as they are. The log says how many were converted.

    Raises:
        UserError: the device does not support 8-bit products, or no layer can use them.
    """
    check_float8(device_type)
    from torchao.float8 import convert_to_float8_training  # the import takes seconds, and warns of parts that its wheel lacks

    matrices = sum(parameter.ndim > 1 for parameter in layers.parameters())
    changed = sum(map(_can_convert, layers.modules()))
    if not changed:
        raise UserError(
            "training.float8 = true: the decoder layers have no linear layer with sizes that are multiples of "
            f"{SIZE_STEP}: set it to false"
        )
    convert_to_float8_training(layers, config=choose_recipe(), module_filter_fn=lambda module, name: _can_convert(module))
    logger.info("training in float8: %d of the %d matrices of the decoder layers", changed, matrices)


def choose_recipe() -> Float8LinearConfig:
    """torchao's row-wise recipe: all three products of a layer in 8 bits, with one scale per row."""
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig.from_recipe_name("rowwise")


def check_float8(device_type: str) -> None:
    """Reject devices without 8-bit products.

    Raises:
        UserError: the device is a CPU or a GPU below compute capability 8.9, or torchao is not installed.
    """
    needed = ".".join(map(str, FIRST_CAPABILITY))
    if device_type != "cuda" or torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        raise UserError(
            f"training.float8 = true needs a GPU of compute capability {needed} or above, which this machine does not have: "
            "set it to false"
        )
    if find_spec("torchao") is None:  # not in requirements.txt, since transformers would import it at every start
        raise UserError("training.float8 = true needs torchao: pip install -r requirements-hopper.txt")


def _can_convert(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.in_features % SIZE_STEP == 0 and module.out_features % SIZE_STEP == 0
