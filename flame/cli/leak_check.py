"""Test a causal language model for leaks in packed sequences.

    flame-leak-check Qwen/Qwen3-0.6B
    python -m flame.cli.leak_check configs/models/llama_340M.json

Several documents in one sequence must not see each other, and no token what is ahead of it. The check changes
one token at a time and compares the hidden states. Exit codes: 0 no leak, 1 a leak, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from flame.errors import UserError, end_on_user_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_REASON = 300
WEIGHTS = ("*.safetensors", "*.bin")


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
    return int(report.has_leak or (arguments.plain and report.plain_leaks))


def _load(arguments: argparse.Namespace) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    from flame.attention.fla_families import register_fla_family
    from flame.models.custom_model import import_custom_model

    import_custom_model(arguments.custom_model_path)
    path = Path(arguments.model).expanduser()
    is_config = path.is_file() or (path.is_dir() and not any(file for kind in WEIGHTS for file in path.glob(kind)))
    source = str(path) if path.exists() else arguments.model
    settings = {"attn_implementation": arguments.attn} if arguments.attn else {}
    trust = arguments.trust_remote_code
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, arguments.dtype)
        written, _ = PretrainedConfig.get_config_dict(source)
        if "auto_map" not in written:
            register_fla_family(written.get("model_type"))
        if is_config or arguments.random_weights:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust, **settings)
        else:
            lm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust, **settings)
        return lm.to(device).eval()
    except Exception as error:  # a missing file, no network, a bad value, code of the model's own: no common type
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        if "trust_remote_code" in str(error) and not trust:
            reason = "it comes with Python code of its own: give --trust_remote_code to run it, if you trust it"
        elif "does not recognize this architecture" in reason:  # the library advises to upgrade it
            reason = "neither transformers nor flash-linear-attention has this model_type; --custom_model_path can bring one"
        raise UserError(f'MODEL = "{arguments.model}" cannot be loaded: {reason}') from error


def _find_missing(lm: PreTrainedModel) -> str:
    """Why nothing can be tested, or an empty string."""
    if not isinstance(getattr(lm.config, "vocab_size", None), int):
        return f'model_type "{lm.config.model_type}" has a configuration of several parts: give that of its text part'
    if lm.base_model is lm:
        return "its base_model_prefix names no model without head, whose last states could be compared"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
