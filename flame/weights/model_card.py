"""The model card, README.md, of an exported model: what was trained, on what, how far, and how to load it."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from flame.checkpoints.resume_check import find_saved_objective
from flame.components.loggers import METRICS_FILE, VALIDATION_PREFIX
from flame.config import GENERATED, LOCAL_FORMATS, STANDARD_LIBRARY, TOKENS_FORMAT
from flame.models.fla_families import NAMED_AS_IN_TRANSFORMERS, TESTED

CARD_FILE = "README.md"
FUTURE_OPTIONS = (
    "loss_weight",
    "target",
    "target_shift",
    "future_k",
    "temperature",
    "learnable_temperature",
    "start_step",
    "warmup_steps",
    "decay_steps",
)
LIBRARIES = ("torch", "transformers")
SHOWN_METRICS = ("loss", "ce_loss", "aux_loss", "mi_lower_bound", "infonce_accuracy", "temperature")

Settings = dict[str, Any]


def write_card(path: Path, state: Settings, checkpoint: Path, parameters: int, dtype: str) -> None:
    """Write the card of a checkpoint's model. No path of this machine is told, only last components: a card gets published.

    Args:
        state: the checkpoint's `trainer.json`.
        checkpoint: its folder; where it lies in the run's, the metrics there are read.
        parameters: of the language model.
        dtype: of the exported weights.
    """
    config = state["config"]  # empty where the checkpoint was converted, and no run has made it
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[state["model_config"]["model_type"], *(["future-prediction"] if _find_objective(config) == "future" else [])],
        datasets=_list_hub_datasets(config) or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_name_run(config)}",
        " ".join(config.get("job", {}).get("description", "").split()),
        _describe_model(state, parameters, dtype),
        _describe_loading(path.parent, _find_package(state), _find_objective(config)),
        *(_describe_training(state, checkpoint) if config else []),
        "Made with " + ", ".join(f"{library} {version(library)}" for library in LIBRARIES) + ".",
        f"<details>\n<summary>All options of the run</summary>\n\n````toml\n{_format_config(config)}````\n\n</details>"
        if config
        else "",
    ]
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _describe_training(state: Settings, checkpoint: Path) -> list[str]:
    config = state["config"]
    run = _find_run(checkpoint, config)
    metrics = _describe_metrics(run / METRICS_FILE, state["step"]) if run is not None else ""
    return ["## Training", _describe_data(state), _describe_objective(config), metrics]


def _name_run(config: Settings) -> str:
    return Path(config["job"]["dump_folder"]).name if config else "Language model"


def _find_run(checkpoint: Path, config: Settings) -> Path | None:
    """The run's folder as it lies now: that of the configuration may be another machine's. None where it is not known."""
    folder = Path(config["checkpoint"]["folder"])
    above = checkpoint.absolute().parent
    depth = len(folder.parts)
    is_inside = len(above.parts) > depth and above.parts[len(above.parts) - depth :] == folder.parts
    return checkpoint.absolute().parents[depth] if is_inside else None


def _find_objective(config: Settings) -> str:
    return find_saved_objective(config) if config else "next_token"


def _list_corpora(config: Settings) -> dict[str, Settings]:
    return config.get("sources") or ({"training": config["training"]} if config else {})


def _list_hub_datasets(config: Settings) -> list[str]:
    local = {*LOCAL_FORMATS, TOKENS_FORMAT, STANDARD_LIBRARY, *GENERATED}
    names = (corpus["dataset"] for corpus in _list_corpora(config).values())
    return sorted({name for name in names if name not in local and not _is_local(name)})


def _describe_model(state: Settings, parameters: int, dtype: str) -> str:
    text = (
        f"A causal language model of the family `{state['model_config']['model_type']}` with {parameters / 1e6:,.1f}M parameters "
        f"({dtype})"
    )
    if not state["config"]:
        return f"{text}."
    steps, tokens = state["config"]["training"]["steps"], state["counters"]["tokens_seen"]
    return f"{text}, after step {state['step']:,} of {steps:,} and {tokens:,} tokens."


def _find_package(state: Settings) -> str:
    """What must be imported for transformers to know the architecture; empty for its own ones."""
    family, custom = state["model_config"]["model_type"], state["config"].get("experimental", {}).get("custom_model_path")
    if custom:
        return Path(custom).stem
    is_own = family in CONFIG_MAPPING_NAMES and family not in NAMED_AS_IN_TRANSFORMERS
    return "fla.models" if not is_own and (state["config"] or family in TESTED) else ""


def _describe_loading(folder: Path, package: str, objective: str) -> str:
    first = f"import {package}  # registers the architecture with transformers\n" if package else ""
    text = (
        f"```python\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )
    others = [path.name for path in folder.glob("*.safetensors") if not path.name.startswith("model")]
    heads = (
        "the modules that predicted summaries of the future during training: `predictor.*` maps a hidden state to a guess of its "
        "future, `estimator.*` scores the guess"
        if objective == "future"
        else f'the heads of "{objective}", `rival.*`'
    )
    return text + "".join(f"\n\n`{name}` holds {heads}. Generation does not need them." for name in others)


def _describe_data(state: Settings) -> str:
    corpora = _list_corpora(state["config"])
    total = sum(corpus.get("weight", 1.0) for corpus in corpora.values())
    tokens = state["counters"].get("tokens_by_source", {})
    rows = []
    for name, corpus in corpora.items():
        places = [corpus["dataset"], corpus["dataset_name"], _shorten_paths(corpus["data_files"])]
        share = corpus.get("weight", 1.0) / total if total else 0.0
        seen = tokens.get(name) if len(corpora) > 1 else state["counters"]["tokens_seen"]
        what = _escape(" ".join(_shorten_paths(place) for place in places if place))
        rows.append(f"| {_escape(name)} | {what} | {corpus['dataset_split']} | {share:.1%} | {seen or 0:,} |")
    return "\n".join(["| source | data | split | weight | tokens seen |", "|---|---|---|---|---|", *rows])


def _describe_objective(config: Settings) -> str:
    objective = _find_objective(config)
    if objective == "next_token":
        return "Trained on next-token prediction alone."
    if objective != "future":
        options = ", ".join(f"{name} {json.dumps(value)}" for name, value in config["objective"].items() if name != "name")
        return f'Trained on next-token prediction and, beside it, "{objective}": {options}.'
    future = config["future_encoder"]
    options = ", ".join(f"{name} {json.dumps(future[name])}" for name in FUTURE_OPTIONS if name in future)
    head = config["future_predictor"]["head_type"]
    return (
        "Beside next-token prediction, each position learned to predict a summary of its own future: "
        f"{future['estimator_type']}, {head} predictor, {options}."
    )


def _describe_metrics(path: Path, step: int) -> str:
    """The last values up to a step, of training and of validation."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    train: Settings = {}
    validation: Settings = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a power cut
            continue
        if row["step"] > step:
            continue
        target = validation if any(key.startswith(VALIDATION_PREFIX) for key in row) else train
        target.clear()
        target.update({key.removeprefix(VALIDATION_PREFIX): value for key, value in row.items()})
    rows = [
        f"| {name} | {_show(train.get(name))} | {_show(validation.get(name))} |"
        for name in SHOWN_METRICS
        if name in train or name in validation
    ]
    if not rows:
        return ""
    header = f"| metric | training{_show_step(train)} | validation{_show_step(validation)} |"
    return "\n".join([header, "|---|---|---|", *rows])


def _show_step(row: Settings) -> str:
    return f", step {row['step']:,}" if row else ""


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _format_config(config: Settings) -> str:
    sections = {name: options for name, options in config.items() if name != "sources"}
    sections |= {f"sources.{json.dumps(name)}": options for name, options in config.get("sources", {}).items()}
    lines = []
    for section, options in sections.items():
        lines.append(f"[{section}]")
        for name, value in options.items():
            shown = json.dumps(_shorten_paths(value), ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {shown}" if value is not None else f"# {name} = unset")
        lines.append("")
    return "\n".join(lines)


def _shorten_paths(value: Any) -> Any:
    """Reduce each path of this machine among those separated by commas to its last component."""
    if not isinstance(value, str):
        return value
    return ",".join(_shorten_path(part) for part in value.split(","))


def _shorten_path(part: str) -> str:
    return os.path.basename(part.strip().rstrip("/")) if _is_local(part.strip()) else part


def _is_local(path: str) -> bool:
    return path.startswith(("/", "~", "./", "../"))


def _escape(text: str) -> str:
    """Text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
