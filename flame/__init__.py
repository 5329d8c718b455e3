"""Train causal language models that also predict a summary of their own future.

`bash train.sh` trains from a TOML file. The names below are for a model of one's own, in Python: docs/library.md.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

# transformers imports torchao wherever it is installed, and that tells of kernels which it cannot load on this machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from flame.errors import UserError as UserError
    from flame.kernels.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from flame.library.future_loss import FutureLoss as FutureLoss
    from flame.library.leaks import LeakReport as LeakReport
    from flame.library.leaks import check_leaks as check_leaks
    from flame.library.passes import encode_future as encode_future
    from flame.library.passes import encode_past as encode_past
    from flame.models.future_predictor import FuturePredictorHead as FuturePredictorHead
    from flame.models.mi_estimator import InfoNCEEstimator as InfoNCEEstimator
    from flame.models.mi_estimator import build_mi_estimator as build_mi_estimator

_MODULES = {
    "FutureLoss": "flame.library.future_loss",
    "FuturePredictorHead": "flame.models.future_predictor",
    "InfoNCEEstimator": "flame.models.mi_estimator",
    "LeakReport": "flame.library.leaks",
    "UserError": "flame.errors",
    "build_mi_estimator": "flame.models.mi_estimator",
    "check_leaks": "flame.library.leaks",
    "encode_future": "flame.library.passes",
    "encode_past": "flame.library.passes",
    "linear_cross_entropy": "flame.kernels.cross_entropy",
}
"""Where each name is; imported when first asked for, so that checking options imports no torch."""

__all__ = [
    "FutureLoss",
    "FuturePredictorHead",
    "InfoNCEEstimator",
    "LeakReport",
    "UserError",
    "build_mi_estimator",
    "check_leaks",
    "encode_future",
    "encode_past",
    "linear_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
