"""The model card (README.md) of an exported model: its training, its data, its metrics, and how to load it."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from flame.attention.fla_families import NAMED_AS_IN_TRANSFORMERS, TESTED
from flame.config.run import CHECKPOINT_FOLDER
from flame.config.schema import NAMED
from flame.data.sources.registry import is_from_hub
from flame.logging.console import VALIDATION_PREFIX, find_row_kind
from flame.logging.writers.json_lines import METRICS_FILE

CARD_FILE = "README.md"
LIBRARIES = ("torch", "transformers")
SHOWN_METRICS = ("loss", "ce_loss", "aux_loss", "mi_lower_bound", "infonce_accuracy", "temperature")

Settings = dict[str, Any]


def write_card(path: Path, state: Settings, checkpoint: Path, parameters: int, dtype: str) -> None:
    """Write the card of a checkpoint's model. Cards get published, so local paths are reduced to their last component.

    Args:
        path: of the file to write.
        state: the checkpoint's `trainer.json`.
        checkpoint: its folder. If it is in a run's folder, the card shows the run's metrics.
        parameters: of the language model.
        dtype: of the exported weights.
    """
    config = state["config"]  # empty if the checkpoint is a converted model
    objective = state.get("objective")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[state["model_config"]["model_type"], *([f"{objective['name']}-objective"] if objective else [])],
        datasets=_list_hub_datasets(config) or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_name_run(config)}",
        " ".join(config.get("job", {}).get("description", "").split()),
        _describe_model(state, parameters, dtype),
        _describe_loading(path.parent, _find_package(state), objective),
        *(_describe_training(state, checkpoint) if config else []),
        "Made with flame, " + ", ".join(f"{library} {version(library)}" for library in LIBRARIES) + ".",
        f"<details>\n<summary>All options of the run</summary>\n\n````toml\n{_format_config(config)}````\n\n</details>"
        if config
        else "",
    ]
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _describe_training(state: Settings, checkpoint: Path) -> list[str]:
    run = _find_run(checkpoint)
    metrics = _describe_metrics(run / METRICS_FILE, state["step"]) if run is not None else ""
    objective = state.get("objective")
    described = objective["description"] if objective else "Trained on next-token prediction alone."
    return ["## Training", _describe_data(state), described, metrics]


def _name_run(config: Settings) -> str:
    return Path(config["job"]["dump_folder"]).name if config else "Language model"


def _find_run(checkpoint: Path) -> Path | None:
    """The current folder of the run; the configuration may name that of another machine. None if it is not known."""
    above = checkpoint.absolute().parent
    return above.parent if above.name == CHECKPOINT_FOLDER else None


def _list_corpora(config: Settings) -> dict[str, Settings]:
    return config.get("sources") or ({"training": config["training"]} if config else {})


def _list_hub_datasets(config: Settings) -> list[str]:
    names = (corpus["dataset"] for corpus in _list_corpora(config).values())
    return sorted({name for name in names if is_from_hub(name) and not _is_local(name)})


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
    """The package to import so that transformers knows the architecture; empty for transformers' own."""
    family, custom = state["model_config"]["model_type"], state["config"].get("experimental", {}).get("custom_model_path")
    if custom:
        return Path(custom).stem
    is_own = family in CONFIG_MAPPING_NAMES and family not in NAMED_AS_IN_TRANSFORMERS
    return "fla.models" if not is_own and (state["config"] or family in TESTED) else ""


def _describe_loading(folder: Path, package: str, objective: Settings | None) -> str:
    first = f"import {package}  # registers the architecture with transformers\n" if package else ""
    text = (
        f"```python\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )
    others = [path.name for path in folder.glob("*.safetensors") if not path.name.startswith("model")]
    heads = objective["modules"] if objective else ""
    return text + "".join(f"\n\n`{name}` holds {heads}. Generation does not need them." for name in others)


def _describe_data(state: Settings) -> str:
    corpora = _list_corpora(state["config"])
    total = sum(corpus.get("weight", 1.0) for corpus in corpora.values())
    tokens = state["counters"].get("tokens_by_source", {})
    rows = []
    for name, corpus in corpora.items():
        parts = [corpus["dataset"], corpus["dataset_name"], _shorten_paths(corpus["data_files"])]
        share = corpus.get("weight", 1.0) / total if total else 0.0
        seen = tokens.get(name) if len(corpora) > 1 else state["counters"]["tokens_seen"]
        what = _escape(" ".join(_shorten_paths(part) for part in parts if part))
        rows.append(f"| {_escape(name)} | {what} | {corpus['dataset_split']} | {share:.1%} | {seen or 0:,} |")
    return "\n".join(["| source | data | split | weight | tokens seen |", "|---|---|---|---|---|", *rows])


def _describe_metrics(path: Path, step: int) -> str:
    """Table of the last metrics up to a step, in training and in validation."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    train: Settings = {}
    validation: Settings = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # an incomplete line, after a power cut
            continue
        if row["step"] > step:
            continue
        kind = find_row_kind(row)
        if kind == "evaluation":
            continue
        target = validation if kind == "validation" else train
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
    sections = {name: options for name, options in config.items() if name not in NAMED}
    for head in NAMED:
        sections |= {f"{head}.{json.dumps(name)}": options for name, options in config.get(head, {}).items()}
    lines = []
    for section, options in sections.items():
        lines.append(f"[{section}]")
        for name, value in options.items():
            shown = json.dumps(_shorten_paths(value), ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {shown}" if value is not None else f"# {name} = unset")
        lines.append("")
    return "\n".join(lines)


def _shorten_paths(value: Any) -> Any:
    """Reduce each local path in a comma-separated list to its last component."""
    if not isinstance(value, str):
        return value
    return ",".join(_shorten_path(part) for part in value.split(","))


def _shorten_path(part: str) -> str:
    if _is_local(part.strip()):
        return os.path.basename(part.strip().rstrip("/"))
    return re.sub("://[^/@]*@", "://", part)  # a name and a password


def _is_local(path: str) -> bool:
    return path.startswith(("/", "~", "./", "../"))


def _escape(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
