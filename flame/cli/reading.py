"""What the commands that read an export and texts have in common."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from flame.config.data import Corpus
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST = 1024
"""Default of --longest."""


def add_options(parser: argparse.ArgumentParser, num_tokens: int) -> None:
    """Add the options that name a corpus, as in [training] of a run, how much of it is read, and how the model is loaded.

    Args:
        num_tokens: default of --tokens.
    """
    parser.add_argument(
        "--dataset", default="json", help="as training.dataset of a run, such as text, parquet or stdlib (default: %(default)s)"
    )
    parser.add_argument("--data_files", default="", help="files, as training.data_files of a run")
    parser.add_argument("--text_column", default="text", help="column of the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=num_tokens, help="tokens of texts to read (default: %(default)s)")
    longest = f"tokens taken of a text (default: {LONGEST:,}, or the positions of a model that has fewer)"
    parser.add_argument("--longest", type=int, help=longest)
    parser.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code that comes with the model")


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Check options that are integers or lists of integers, or not given.

    Raises:
        UserError: one is below 1.
    """
    for name in names:
        value = getattr(arguments, name)
        least = min(value) if isinstance(value, list) else value
        if least is not None and least < 1:
            raise UserError(f"--{name} {least}: allowed are integers > 0")


def get_corpus(arguments: argparse.Namespace) -> Corpus:
    """The corpus that the options name."""
    return Corpus(dataset=arguments.dataset, data_files=arguments.data_files, text_column=arguments.text_column)


def choose_longest(arguments: argparse.Namespace, *models: str) -> int:
    """Tokens to take of a text, so that each model has positions for them.

    Raises:
        UserError: --longest is more than a model has, or its configuration cannot be loaded.
    """
    from flame.library.loading import load_config
    from flame.library.passes import find_length_limits

    longest = arguments.longest or LONGEST
    for model in models:
        for name, limit in find_length_limits(load_config(model, arguments.trust_remote_code)).items():
            if arguments.longest and arguments.longest > limit:
                raise UserError(f'--longest {arguments.longest}: MODEL = "{model}" has {name}: {limit}; give at most that')
            longest = min(longest, limit)
    return longest


def load_own_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """The tokenizer that comes with a model.

    Raises:
        UserError: it cannot be loaded.
    """
    from flame.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(name, trust_remote_code)
    except UserError as error:  # it names the options of a run
        options = {"model.tokenizer_path": "MODEL", "model.trust_remote_code = true": "--trust_remote_code"}
        lines = list(error.lines)
        for option, own in options.items():
            lines = [line.replace(option, own) for line in lines]
        raise UserError(*lines) from error


def run_quietly(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command without the warnings and progress bars of libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return run(arguments)
