"""All that is used of torchtitan, imported in one place.

Without an accelerator, torchtitan chooses "cuda" as the device, and each of its modules copies that at import. So the choice is
corrected in `torchtitan.tools.utils` before its other modules are imported.
"""

import torch
import torchtitan.tools.utils as _utils

if not torch.cuda.is_available():
    _utils.device_type, _utils.device_module = "cpu", torch.cpu

from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.tools.utils import GarbageCollection, get_peak_flops

__all__ = [
    "FullAC",
    "GarbageCollection",
    "LRSchedulersContainer",
    "OptimizersContainer",
    "ParallelDims",
    "ParallelismConfig",
    "ParamGroupConfig",
    "SelectiveAC",
    "clip_grad_norm_",
    "get_peak_flops",
    "init_optim_state",
]
