"""Matrix products of the decoder layers in 8-bit floating point, forward and backward, by torchao.

A scale brings the largest entry into the range of the format. torchao's recipes that are taken:

- "rowwise": a scale for each row of a factor, along the summed dimension, all in float8_e4m3. Scales are powers of two.
- "rowwise_with_gw_hp": as "rowwise", with the gradients of the weights in bfloat16, and one scale for the weights in the product
  that gives the gradients of the activations.

A scale for all activations of a packed sequence ("tensorwise") would let the rounding of a token depend on later tokens and on
other documents, so it is left out.

Weights stay float32 parameters under the same names, so checkpoints and exports do not change. FSDP gathers them in bfloat16.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from flame.errors import UserError
from flame.kernels.fp8 import FIRST_CAPABILITY, SIZE_STEP, has_8_bit_products

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

logger = logging.getLogger("flame")


def convert_to_float8(layers: nn.ModuleList, recipe: str, device_type: str) -> None:
    """Replace the linear layers inside `layers` by 8-bit ones that share their parameters. Call before sharding.

    Layers with unsupported sizes stay as they are. The log says how many were converted.

    Args:
        recipe: `training.float8`.

    Raises:
        UserError: the device does not support 8-bit products, or no layer can use them.
    """
    check_float8(recipe, device_type)
    # The import takes seconds, and warns of parts that its wheel lacks.
    from torchao.float8 import convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    matrices = sum(parameter.ndim > 1 for parameter in layers.parameters())
    changed = sum(map(_can_convert, layers.modules()))
    if not changed:
        raise UserError(
            f'training.float8 = "{recipe}": the decoder layers have no linear layer with sizes that are multiples of '
            f'{SIZE_STEP}: set it to "none"'
        )
    convert_to_float8_training(layers, config=load_recipe(recipe), module_filter_fn=lambda module, name: _can_convert(module))
    for module in layers.modules():
        if isinstance(module, Float8Linear):
            module.__class__ = _build_class(Float8Linear)
    # A fused norm is not rounded to bfloat16 before its rows are scaled, while a recomputed one is: with rowwise scales that has
    # led to NaN in the backward (PyTorch's "RMS norm causes NaNs when used with torch.compile + float8"). It holds for all that
    # this process compiles.
    torch._inductor.config.emulate_precision_casts = True
    logger.info("training in float8, %s: %d of the %d matrices of the decoder layers", recipe, changed, matrices)


@cache
def _build_class(rounded: type[nn.Linear]) -> type[nn.Linear]:
    class TrainedInFloat8(rounded):  # type: ignore[misc, valid-type]  # torchao is imported late
        """Not rounded in validation and evaluation, which measure the model that is exported."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if self.training else F.linear(input, self.weight, self.bias)

    return TrainedInFloat8


def load_recipe(recipe: str) -> Float8LinearConfig:
    """What torchao does with each factor of a layer's three products."""
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig.from_recipe_name(recipe)


def check_float8(recipe: str, device_type: str) -> None:
    """Reject devices without 8-bit products.

    Raises:
        UserError: the device is a CPU or a GPU below compute capability 8.9, or torchao is not installed.
    """
    if not has_8_bit_products(device_type):
        needed = ".".join(map(str, FIRST_CAPABILITY))
        raise UserError(
            f'training.float8 = "{recipe}" needs a GPU of compute capability {needed} or above, which this machine does not '
            'have: set it to "none"'
        )
    if find_spec("torchao") is None:  # not in requirements.txt, since transformers would import it at every start
        raise UserError(f'training.float8 = "{recipe}" needs torchao: pip install -r requirements-hopper.txt')


def _can_convert(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.in_features % SIZE_STEP == 0 and module.out_features % SIZE_STEP == 0
