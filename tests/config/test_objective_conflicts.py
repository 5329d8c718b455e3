"""Options of what is learned that do not suit each other: one line each, with the option, its value, and what to do."""

from __future__ import annotations

import pytest

from flame.trainer.options import list_idle_options, read_options
from tests.support.options import MODEL, read_mistakes

pytestmark = pytest.mark.usefixtures("folder")

FUTURE = "--objective.name=future"
LEARNED = "--future_encoder.learnable_temperature"
FROZEN = "--experimental.freeze_lm_for_infonce"


@pytest.mark.parametrize(
    ("argv", "start", "end"),
    [
        (
            [FROZEN],
            "experimental.freeze_lm_for_infonce = true leaves nothing to train: ",
            'such as objective.name = "future", with a loss_weight above 0',
        ),
        (
            [FUTURE, FROZEN, "--future_encoder.loss_weight=0"],
            "experimental.freeze_lm_for_infonce = true leaves nothing to train: ",
            "with a loss_weight above 0",
        ),
        (
            ["--objective.name=mtp", FROZEN],
            "experimental.freeze_lm_for_infonce = true leaves nothing to train: ",
            "with a loss_weight above 0",
        ),
        (
            [FUTURE, "--future_encoder.max_anchors=1"],
            "future_encoder.max_anchors = 1 leaves no negatives: ",
            "allowed are 0 (all) and 2 or more",
        ),
        (
            [FUTURE, "--future_encoder.precision=fp8", "--training.mixed_precision_param=float32"],
            'future_encoder.precision = "fp8" beside training.mixed_precision_param = "float32": ',
            'set the one to "bf16" or the other to "bfloat16"',
        ),
        (
            [FUTURE, "--future_encoder.precision=fp8", "--training.float8=rowwise"],
            'future_encoder.precision = "fp8" beside training.float8 = "rowwise"',
            'set the one to "bf16" or the other to "none"',
        ),
        (
            ["--objective.name=infonce"],
            'objective.name = "infonce": ',
            "objective.path names a file with one of your own",
        ),
        (
            [FUTURE, FROZEN, "--objective.start_step=2"],
            "experimental.freeze_lm_for_infonce = true leaves nothing to train before objective.start_step = 2: ",
            "set it to 0",
        ),
        (
            [FUTURE, "--future_encoder.target_shift=8", "--training.context_len=8"],
            "future_encoder.target_shift = 8 leaves no position with a target: ",
            "it must be less than training.context_len = 8",
        ),
        (
            [FUTURE, LEARNED, "--future_encoder.temperature=1.5"],
            "future_encoder.temperature = 1.5 is above 1.0, the highest that future_encoder.learnable_temperature allows: ",
            "lower it or do not learn it",
        ),
        (
            [FUTURE, "--future_encoder.target=shuffled", "--future_encoder.exclude_neighbors=2"],
            'future_encoder.exclude_neighbors = 2 with future_encoder.target = "shuffled": ',
            "leave it out",
        ),
    ],
    ids=lambda value: " ".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_options_that_do_not_suit_each_other_are_one_line(argv, start, end):
    (line,) = read_mistakes([*MODEL, *argv])
    assert line.startswith(start) and line.endswith(end)


@pytest.mark.parametrize(
    "argv",
    [
        ["--objective.name=mtp", "--mtp.loss_weight=0.5"],
        ["--objective.name=mtp", "--mtp.tokens=3", "--training.context_len=4"],
        ["--objective.name=top", "--top.window=1", "--training.context_len=4"],
        ["--objective.name=fsp_bow", "--fsp_bow.window=2"],
        [FUTURE, "--objective.start_step=10", "--training.steps=10"],
        ["--objective.start_step=11", "--training.steps=10"],
        ["--objective.name=next_token", "--objective.start_step=11", "--training.steps=10"],
        [FUTURE, FROZEN, "--objective.start_step=1"],
        [FUTURE, "--optimizer.name=Muon"],
        [FUTURE, "--future_encoder.target_shift=7", "--training.context_len=8"],
        [FUTURE, LEARNED, "--future_encoder.temperature=1"],
        [FUTURE, LEARNED, "--future_encoder.temperature=0.01"],
        [FUTURE, "--future_encoder.estimator_type=cosine", "--future_encoder.temperature=1.5"],
        [FUTURE, "--future_encoder.estimator_type=bilinear", "--future_encoder.negatives=global"],
        [FUTURE, "--future_encoder.target=causal", "--training.mixed_precision_param=float32"],
        [FUTURE, "--future_encoder.future_k=4"],
        [FUTURE, "--future_encoder.target=shuffled", "--future_encoder.exclude_duplicates"],
        [FUTURE, "--future_encoder.target=ema", "--future_encoder.ema_decay=0.9", "--future_encoder.precision=fp8"],
    ],
    ids=lambda argv: " ".join(argv).replace("--", ""),
)
def test_options_just_beside_them_do(argv):
    read_options([*MODEL, *argv], 1)


@pytest.mark.parametrize(
    ("argv", "listed"),
    [
        ([LEARNED, "--future_encoder.estimator_type=bilinear"], "learnable_temperature"),
        (["--future_encoder.estimator_type=cosine", "--future_encoder.negatives=global"], "negatives"),
        (["--future_encoder.estimator_type=smooth_l1", "--future_encoder.exclude_neighbors=2"], "exclude_neighbors"),
        (["--future_encoder.estimator_type=cosine", "--future_encoder.exclude_duplicates"], "exclude_duplicates"),
        (["--future_encoder.target=random", "--future_encoder.ema_decay=0.9"], "ema_decay"),
        (["--future_encoder.target=mean_embedding", "--future_encoder.precision=fp8"], "precision"),
        (["--future_encoder.target=causal", "--future_encoder.precision=fp8"], "precision"),
        (["--future_encoder.target=causal", "--future_encoder.future_k=4"], "future_k"),
    ],
    ids=lambda value: " ".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_options_that_leave_each_other_without_effect_are_listed_and_not_refused(argv, listed):
    assert list_idle_options(read_options([*MODEL, FUTURE, *argv], 1)) == [f"future_encoder.{listed}"]


def test_a_running_average_of_a_frozen_model_is_no_mistake():
    """It is the model itself."""
    read_options([*MODEL, FUTURE, FROZEN, "--future_encoder.target=ema"], 1)


def test_rules_of_an_objective_that_is_not_trained_are_not_asked():
    read_options([*MODEL, "--future_encoder.max_anchors=1", "--fsp_bow.window=1", "--objective.name=mtp"], 1)
