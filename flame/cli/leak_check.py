"""Test a causal language model for leaks in packed sequences.

    flame-leak-check Qwen/Qwen3-0.6B
    python -m flame.cli.leak_check configs/models/llama_340M.json

Several documents in one sequence must not see each other, and no token what is ahead of it. The check changes
one token at a time and compares the hidden states. Exit codes: 0 no leak, 1 a leak or states
that are not the model's own, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

from flame.errors import UserError, end_on_user_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flame-leak-check", description="Test a causal language model for leaks in packed sequences.", allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="Hub name, folder, or a configuration (JSON, or a folder without weights)")
    parser.add_argument("--random_weights", action="store_true", help="read the configuration alone, and draw weights")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code that comes with the model")
    parser.add_argument("--custom_model_path", default="", help="Python code that registers the model (docs/custom_models.md)")
    parser.add_argument("--attn", help="attention of the plain forward: eager, sdpa, flash_attention_2, ... (default: its own)")
    parser.add_argument("--window_k", type=int, default=0, help="window of the anti-causal pass, in tokens (default: none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")
    parser.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--plain", action="store_true", help="end with 1 also where only the plain forward leaks")
    return parser.parse_args(argv)


@end_on_user_error
def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of libraries on import
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    import transformers

    from flame.attention.masks import read_window
    from flame.library.leaks import describe_pack, examine
    from flame.library.passes import choose, find_faults, is_vouched_for, list_choices

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        window_k = read_window(arguments.window_k)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    lm = _load(arguments)
    if faults := _find_missing(lm):
        raise UserError(f'MODEL = "{arguments.model}": {faults}')
    choices = [choose(lm, 128)] if is_vouched_for(lm) and not find_faults(lm) else list_choices(lm)
    report = examine(lm, choices, window_k)
    if report.failure:
        raise UserError(f'MODEL = "{arguments.model}" cannot be run on this machine: {report.failure}')
    config, device = lm.config, next(lm.parameters()).device
    print(f"{type(lm).__name__} (model_type {config.model_type}), {arguments.dtype}, on {device}")
    print(f"plain forward by {config._attn_implementation or 'its own layers'}, masked passes by {', '.join(choices)}")
    print(f"pack: {describe_pack()}\n")
    print(report)
    return int(not report.is_usable or (arguments.plain and report.plain_leaks))


def _load(arguments: argparse.Namespace) -> PreTrainedModel:
    import torch

    from flame.library.loading import load_model

    return load_model(
        arguments.model,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        attention=arguments.attn,
        random_weights=arguments.random_weights,
        trust_remote_code=arguments.trust_remote_code,
        custom_model_path=arguments.custom_model_path,
    )


def _find_missing(lm: PreTrainedModel) -> str:
    """Why nothing can be tested, or an empty string."""
    if not isinstance(getattr(lm.config, "vocab_size", None), int):
        return f'model_type "{lm.config.model_type}" has a configuration of several parts: give that of its text part'
    if lm.base_model is lm:
        return "its base_model_prefix names no model without head, whose last states could be compared"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
