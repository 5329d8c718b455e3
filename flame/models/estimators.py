"""Which estimators there are, by the value of `future_encoder.estimator_type`.

Imports no torch: options are checked against this before anything slow is loaded. To add one, write a class derived from
`flame.models.estimator.Estimator` in a file of its own, and name it here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

LOWEST_LEARNED_TEMPERATURE = 0.01
"""That of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.5)."""
HIGHEST_LEARNED_TEMPERATURE = 1.0
"""Here no score can be more than e^2 times as likely as another, and the loss has little left to say."""

EstimatorName = Literal["infonce", "bilinear", "cosine", "smooth_l1"]


class EstimatorEntry(NamedTuple):
    """What is known of an estimator before it is loaded."""

    module: str
    class_name: str
    has_negatives: bool = False
    """It compares with other summaries."""
    takes_temperature: bool = False
    """`future_encoder.temperature` has an effect."""
    can_learn_temperature: bool = False
    """`future_encoder.learnable_temperature` has an effect."""
    learns_scores: bool = False
    """The temperature is only the start of something learned."""


ESTIMATORS: dict[str, EstimatorEntry] = {
    "infonce": EstimatorEntry(
        "mi_estimator", "InfoNCEEstimator", has_negatives=True, takes_temperature=True, can_learn_temperature=True
    ),
    "bilinear": EstimatorEntry(
        "mi_estimator", "BilinearEstimator", has_negatives=True, takes_temperature=True, learns_scores=True
    ),
    "cosine": EstimatorEntry("regression", "CosineEstimator"),
    "smooth_l1": EstimatorEntry("regression", "SmoothL1Estimator"),
}
