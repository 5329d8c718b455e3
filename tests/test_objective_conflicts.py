"""Options of what is learned that do not suit each other: one line each, with the option, its value, and what to do."""

from __future__ import annotations

import pytest

from flame.config_reader import read_config
from flame.unused_options import list_unused
from tests.test_config import MODEL, folder, read_mistakes  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("folder")

FUTURE = "--objective.name=future"
LEARNED = "--future_encoder.learnable_temperature"
FROZEN = "--experimental.freeze_lm_for_infonce"


@pytest.mark.parametrize(
    ("argv", "start", "end"),
    [
        (
            [FUTURE, "--future_encoder.enable=false"],
            'future_encoder.enable = false beside objective.name = "future": ',
            "leave it out, the name alone decides",
        ),
        (
            ["--objective.name=mtp", "--future_encoder.enable=true"],
            'future_encoder.enable = true beside objective.name = "mtp": ',
            "leave it out, the name alone decides",
        ),
        (
            [FUTURE, "--objective.loss_weight=0.5"],
            'objective.loss_weight = 0.5 has no effect with objective.name = "future": ',
            'leave it out, or set the name to "mtp" or "top" or "fsp_bow"',
        ),
        (
            ["--objective.name=top", "--objective.mtp_tokens=3"],
            'objective.mtp_tokens = 3 has no effect with objective.name = "top": ',
            'leave it out, or set the name to "mtp"',
        ),
        (
            ["--objective.window=8"],
            'objective.window = 8 has no effect with objective.name = "next_token": ',
            'leave it out, or set the name to "top" or "fsp_bow"',
        ),
        (
            [FUTURE, "--future_encoder.loss_weight=0", "--objective.window=8"],
            "objective.window = 8 has no effect with future_encoder.loss_weight = 0: ",
            'leave it out, or set the name to "top" or "fsp_bow"',
        ),
        (
            [FUTURE, "--future_encoder.start_step=11", "--training.steps=10"],
            "future_encoder.start_step = 11 is after the last step, training.steps = 10: ",
            'start earlier or set objective.name = "next_token"',
        ),
        (
            [FROZEN],
            "experimental.freeze_lm_for_infonce = true leaves nothing to train: ",
            'it needs objective.name = "future" and future_encoder.loss_weight > 0',
        ),
        (
            [FUTURE, FROZEN, "--future_encoder.start_step=2"],
            "experimental.freeze_lm_for_infonce = true leaves nothing to train before future_encoder.start_step = 2: ",
            "set it to 0",
        ),
        (
            [FUTURE, FROZEN, "--optimizer.name=Muon"],
            'optimizer.name = "Muon" beside experimental.freeze_lm_for_infonce = true: ',
            'set it to "AdamW"',
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
            [FUTURE, LEARNED, "--future_encoder.estimator_type=bilinear"],
            'future_encoder.learnable_temperature = true has no effect with future_encoder.estimator_type = "bilinear": ',
            "leave it out",
        ),
        (
            [FUTURE, "--future_encoder.estimator_type=cosine", "--future_encoder.negatives=global"],
            'future_encoder.negatives is about negatives, and future_encoder.estimator_type = "cosine" has none: ',
            "leave it out",
        ),
        (
            [FUTURE, "--future_encoder.estimator_type=smooth_l1", "--future_encoder.exclude_neighbors=2"],
            'future_encoder.exclude_neighbors is about negatives, and future_encoder.estimator_type = "smooth_l1" has none: ',
            "leave it out",
        ),
        (
            [FUTURE, "--future_encoder.estimator_type=cosine", "--future_encoder.exclude_duplicates"],
            'future_encoder.exclude_duplicates is about negatives, and future_encoder.estimator_type = "cosine" has none: ',
            "leave it out",
        ),
        (
            [FUTURE, "--future_encoder.target=shuffled", "--future_encoder.exclude_neighbors=2"],
            'future_encoder.exclude_neighbors = 2 with future_encoder.target = "shuffled": ',
            "leave it out",
        ),
        (
            [FUTURE, "--future_encoder.target=random", "--future_encoder.ema_decay=0.9"],
            'future_encoder.ema_decay = 0.9 has no effect with future_encoder.target = "random": ',
            "leave it out",
        ),
        (
            [FUTURE, "--future_encoder.target=mean_embedding", "--future_encoder.precision=fp8"],
            'future_encoder.precision = "fp8" has no effect with future_encoder.target = "mean_embedding", which has no ',
            "anti-causal pass: leave it out",
        ),
        (
            [FUTURE, "--future_encoder.target=causal", "--future_encoder.precision=fp8"],
            'future_encoder.precision = "fp8" has no effect with future_encoder.target = "causal", which has no ',
            "anti-causal pass: leave it out",
        ),
        (
            [FUTURE, FROZEN, "--future_encoder.target=ema"],
            'future_encoder.target = "ema" beside experimental.freeze_lm_for_infonce = true: ',
            'set it to "self"',
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
        [FUTURE, "--future_encoder.enable=true"],
        ["--objective.name=mtp", "--future_encoder.enable=false", "--objective.loss_weight=0.5"],
        ["--objective.name=mtp", "--objective.mtp_tokens=3", "--training.context_len=4"],
        ["--objective.name=top", "--objective.window=1", "--training.context_len=4"],
        ["--objective.name=fsp_bow", "--objective.window=2"],
        [FUTURE, "--future_encoder.start_step=10", "--training.steps=10"],
        ["--future_encoder.start_step=11", "--training.steps=10"],
        [FUTURE, FROZEN, "--future_encoder.start_step=1"],
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
    read_config([*MODEL, *argv], 1)


@pytest.mark.parametrize(
    ("argv", "unused"),
    [
        ([], []),
        ([FUTURE, "--future_encoder.loss_weight=0.5", "--metrics.future_interval=7"], []),
        (["--objective.name=top", "--future_encoder.enable=false"], []),
        (
            ["--objective.name=top", "--future_encoder.loss_weight=0.5", "--future_predictor.dropout=0.1"],
            ["future_encoder.loss_weight", "future_predictor.dropout"],
        ),
        ([FUTURE, "--future_encoder.loss_weight=0", "--future_encoder.future_k=4"], ["future_encoder.future_k"]),
        (["--objective.name=next_token", "--metrics.future_interval=7"], ["metrics.future_interval"]),
        ([FUTURE, "--future_encoder.estimator_type=cosine", "--future_encoder.temperature=0.5"], ["future_encoder.temperature"]),
        (["--validation.dataset=stdlib", "--validation.num_sequences=8"], ["validation.dataset", "validation.num_sequences"]),
        (["--validation.dataset=stdlib", "--validation.num_sequences=8", "--validation.interval=2"], []),
        (["--validation.holdout_every=4"], ["validation.holdout_every"]),
        (["--training.skip_nan_inf=false", "--training.max_skipped_steps=3"], ["training.max_skipped_steps"]),
        (["--training.num_workers=0", "--training.prefetch_factor=2"], ["training.prefetch_factor"]),
        (["--checkpoint.enable_checkpoint=false", "--checkpoint.keep_latest_k=3"], ["checkpoint.keep_latest_k"]),
    ],
    ids=str,
)
def test_options_without_effect_are_told(argv, unused):
    assert list_unused(read_config([*MODEL, *argv], 1)) == unused
