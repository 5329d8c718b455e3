"""How many steps a budget is: `training.tokens`, `epochs` or `flops`."""

from __future__ import annotations

import logging
import math
import sys
from functools import partial
from typing import NamedTuple

import numpy as np

from flame.checkpoints.files import list_checkpoints
from flame.checkpoints.going_back import find_wanted_step
from flame.checkpoints.manifest import read_state
from flame.config.check import find_conflicts
from flame.config.schema import JobConfig
from flame.config.training import list_divisors
from flame.data.mixture import Mixture
from flame.data.passes import estimate_repeats
from flame.data.sources.token_files import TokenFiles
from flame.data.sources.token_folder import LabelledFolder, TokenFolder
from flame.errors import UserError
from flame.models.wrapper import TrainingModel
from flame.runtime.agreement import run_on_main
from flame.trainer.sequence_flops import SequenceFlops
from flame.trainer.setup import build_cadence, build_weight_schedule

MOST_STEPS = 10**9
"""A budget of more is a slip."""
MOST_REPEATED = 0.02
"""Share of the tokens of some passes that may be read once too often."""

logger = logging.getLogger("flame")


class Done(NamedTuple):
    """What the checkpoint that the run goes on from has behind it."""

    step: int = 0
    tokens: int = 0
    sequences: int = 0


def resolve_budget(config: JobConfig, model: TrainingModel, mixture: Mixture) -> None:
    """Replace a budget by `training.steps`, in place. All ranks call it. On any number of ranks, the same budget is trained.

    Raises:
        UserError: the budget cannot be resolved, or its steps do not go with other options.
    """
    training, budget = config.training, config.training.budget
    if budget is None:
        return
    value = getattr(training, budget)
    training.steps = run_on_main(partial(resolve_steps, config, model, mixture))
    training.tokens = training.epochs = training.flops = None  # what is recorded are the steps
    tokens_per_step = training.seq_len * training.gradient_accumulation_steps * config.world_size
    logger.info("training.%s = %g: up to step %d, of %d tokens each", budget, value, training.steps, tokens_per_step)
    if faults := list(find_conflicts(config)):
        raise UserError(*faults)


def resolve_steps(config: JobConfig, model: TrainingModel, mixture: Mixture) -> int:
    """Steps of the whole run that a budget comes to.

    Raises:
        UserError: the budget cannot be resolved.
    """
    training, budget, done = config.training, config.training.budget, _find_done(config)
    assert budget is not None
    per_step = training.gradient_accumulation_steps * config.world_size
    if budget == "flops":
        steps = _resolve_flops(config, model, mixture, done)
    else:
        tokens = training.tokens or _count_epochs(config, mixture, is_new=done.step == 0)
        steps = done.step - (done.tokens - tokens) // (training.seq_len * per_step)
    if steps > MOST_STEPS:
        value = getattr(training, budget)
        raise UserError(
            f"training.{budget} = {value:g} comes to more than {MOST_STEPS:g} steps, the most that are allowed: lower it"
        )
    return max(steps, done.step, 1)  # what is done stays done


def _find_done(config: JobConfig) -> Done:
    folders = list_checkpoints(config.checkpoint_folder) if config.checkpoint.enable_checkpoint else []
    wanted = find_wanted_step(config)
    if wanted is not None:
        folders = [folder for folder in folders if folder.name == f"step-{wanted}"]
    for folder in [*([config.branch_folder] if config.branch_folder else []), *folders][::-1]:
        try:
            state = read_state(folder)
            return Done(state["step"], state["counters"]["tokens_seen"], state["data"]["next_sequence"])
        except (OSError, ValueError, LookupError):
            continue  # a damaged one, which is passed over later
    return Done()


def _count_epochs(config: JobConfig, mixture: Mixture, is_new: bool) -> int:
    """Tokens of `training.epochs`."""
    epochs, source = config.training.epochs, mixture.sources[0]
    assert epochs is not None
    if len(mixture.sources) > 1 or not isinstance(source, TokenFolder | LabelledFolder | TokenFiles):
        found = f"{len(mixture.sources)} sources" if len(mixture.sources) > 1 else source.option
        raise UserError(
            f"training.epochs = {epochs:g} needs one source of counted tokens, and the run has {found}: write its tokens with "
            'flame-preprocess and set training.dataset = "tokens", or give training.tokens'
        )
    lengths = mixture.subset.select(source.measure())
    if is_new:
        _warn_of_repeats(config, lengths, epochs)
    return round(min(epochs * int(lengths.sum()), sys.float_info.max))


def _warn_of_repeats(config: JobConfig, lengths: np.ndarray, epochs: float) -> None:
    training = config.training
    share = estimate_repeats(lengths, training.num_streams, epochs)
    if share <= MOST_REPEATED:
        return
    at_once = config.world_size * max(1, training.num_workers)
    advice = "give more documents"
    for count in reversed([each for each in list_divisors(training.num_streams)[:-1] if each % at_once == 0]):
        fewer = estimate_repeats(lengths, count, epochs)
        advice = f"with training.num_streams = {count} it is {fewer:.0%}"
        if fewer <= MOST_REPEATED:
            break
    logger.warning(
        "training.epochs = %g: about %s of the tokens are read once too often, and as many once too seldom, since %d documents "
        "of unequal length are dealt to training.num_streams = %d streams: %s",
        epochs,
        f"{share:.0%}",
        len(lengths),
        training.num_streams,
        advice,
    )


def _resolve_flops(config: JobConfig, model: TrainingModel, mixture: Mixture, done: Done) -> int:
    """Steps of `training.flops`, as `step_tflops` counts them, by the first packed sequences of the data."""
    flops, share = SequenceFlops(config, model, mixture), build_cadence(config).share
    per_step = config.training.gradient_accumulation_steps * config.world_size
    without = max(build_weight_schedule(config).start_step - 1, 0) * per_step
    """Sequences before the objective's first step."""

    def find_steps(aux: float) -> int:
        """Steps, if the objective adds so much to a sequence."""
        assert config.training.flops is not None
        left = config.training.flops - flops.next_token * done.sequences - aux * max(done.sequences - without, 0)
        before = max(without - done.sequences, 0)
        plainly = left / flops.next_token
        sequences = plainly if plainly <= before else before + (left - before * flops.next_token) / (flops.next_token + aux)
        return done.step + math.ceil(min(sequences / per_step, MOST_STEPS + 1))

    # What the objective adds may depend on how far the run is, and so on its length: the fewest steps that take as much.
    fewest, most = 1, max(find_steps(0.0), 1)
    while fewest < most:
        middle = (fewest + most) // 2
        if find_steps(share * flops.average_aux(middle)) <= middle:
            most = middle
        else:
            fewest = middle + 1
    return most
