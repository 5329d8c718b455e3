"""The parts of torchtitan in use, imported in one place.

torchtitan takes "cuda" for the device on a machine without an accelerator, and copies that into each module as it is imported:
the choice must be corrected in `torchtitan.tools.utils` before anything else of it is loaded.
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
