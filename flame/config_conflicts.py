"""What must hold between a run's options, and between them and the machine."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from flame.config import (
    BYTES_TOKENIZER,
    CONTRASTIVE,
    DEFAULT_SEPARATOR,
    GENERATED,
    HIGHEST_LEARNED_TEMPERATURE,
    LOCAL_FORMATS,
    LOWEST_LEARNED_TEMPERATURE,
    PATHSTAR,
    SIBLINGS,
    STANDARD_LIBRARY,
    TOKENS_FORMAT,
    Checkpoint,
    Corpus,
    FutureEncoder,
    JobConfig,
    Objective,
    Training,
)
from flame.data.pathstar import FEWEST_GRAPHS, parse_sizes
from flame.data.siblings import NUM_TOKENS
from flame.model_source import find_model_source, find_tokenizer_source, is_checkpoint, looks_like_path, name_model_option

SMALLEST_SHARE = 1e-6
"""Of the largest weight: a smaller one would hardly ever be drawn."""
TOKENIZER_FILES = ("token*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
FLOAT8_SIZE_STEP = 16
"""What each size of an 8-bit matrix product must be a multiple of."""


def find_conflicts(config: JobConfig, world_size: int) -> Iterator[str]:
    """Yield one line for each combination of options, or option and machine, that cannot run.

    Args:
        config: options whose types and ranges are already checked.
        world_size: processes of the run over all nodes.
    """
    yield from _find_folder_conflicts(config)
    yield from _find_model_conflicts(config)
    yield from _find_data_conflicts(config, world_size)
    yield from _find_validation_conflicts(config)
    yield from _find_generated_conflicts(config)
    yield from _find_answer_conflicts(config)
    yield from _find_objective_conflicts(config)
    yield from _find_schedule_conflicts(config)
    yield from _find_export_conflicts(config.checkpoint)
    yield from _find_future_conflicts(config)
    yield from _find_float8_conflicts(config)
    yield from _find_parallel_conflicts(config.training, world_size)


def _find_folder_conflicts(config: JobConfig) -> Iterator[str]:
    folder, checkpoints = config.job.dump_folder, os.path.join(config.job.dump_folder, config.checkpoint.folder)
    for key, value, path in (("job.dump_folder", folder, folder), ("checkpoint.folder", config.checkpoint.folder, checkpoints)):
        if os.path.lexists(path) and not os.path.isdir(path):
            yield f'{key} = "{value}": "{path}" is not a folder; choose another name'
            return
        try:
            os.stat(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:  # too long, inside a file, not to be entered, with a null character
            yield f'{key} = "{value}" cannot be a folder ({getattr(error, "strerror", None) or error}); choose another name'
            return


def _find_export_conflicts(checkpoint: Checkpoint) -> Iterator[str]:
    interval = checkpoint.export_interval
    if checkpoint.export_dtype != "float32" and not (checkpoint.enable_checkpoint and checkpoint.export_hf):
        key = "export_hf" if checkpoint.enable_checkpoint else "enable_checkpoint"
        yield f'checkpoint.export_dtype = "{checkpoint.export_dtype}" has no effect with checkpoint.{key} = false: leave it out'
    if not interval:
        return
    for key in ("enable_checkpoint", "export_hf"):
        if not getattr(checkpoint, key):
            yield (
                f"checkpoint.export_interval = {interval} exports from checkpoints, but checkpoint.{key} = false: "
                "set that to true, or this to 0"
            )
    if interval % checkpoint.interval:
        yield (
            f"checkpoint.export_interval = {interval} is no multiple of checkpoint.interval = {checkpoint.interval}: models are "
            "exported from checkpoints"
        )


def _find_model_conflicts(config: JobConfig) -> Iterator[str]:
    model, weights = config.model, config.checkpoint.initial_load_path
    if looks_like_path(weights) and not os.path.isdir(os.path.expanduser(weights)):
        yield f'checkpoint.initial_load_path = "{weights}": no such folder'
        return
    if newest := _find_checkpoint_in(weights):
        yield f'checkpoint.initial_load_path = "{weights}" is a folder of checkpoints: name one of them, such as "{newest}"'
        return
    if model.resize_embeddings and not weights:
        yield "model.resize_embeddings = true without checkpoint.initial_load_path: name weights whose vocabulary is to grow"
    if not find_model_source(config):
        yield "model.config is not set: give a JSON file, a folder with config.json, or a Hub name (examples: configs/models/)"
    elif not model.config and _lacks(weights, find_model_source(config), ("config.json",)):
        yield f'checkpoint.initial_load_path = "{weights}" comes without a config.json: name the model\'s in model.config'
    elif os.path.exists(os.path.expanduser(find_model_source(config))):
        yield from _find_json_faults(find_model_source(config), name_model_option(config))
    elif looks_like_path(model.config):
        yield f'model.config = "{model.config}": no such file or folder'
    if not find_tokenizer_source(config):
        yield f'model.tokenizer_path is not set: give a folder, a Hub name, or "{BYTES_TOKENIZER}" for the built-in tokenizer'
    elif not model.tokenizer_path and _lacks(weights, find_tokenizer_source(config), TOKENIZER_FILES):
        yield f'checkpoint.initial_load_path = "{weights}" comes without a tokenizer: name the model\'s in model.tokenizer_path'
    elif looks_like_path(model.tokenizer_path) and not os.path.isdir(os.path.expanduser(model.tokenizer_path)):
        yield f'model.tokenizer_path = "{model.tokenizer_path}": no such folder'


def _find_checkpoint_in(weights: str) -> str:
    """The newest checkpoint in a folder that is none itself, but a run's or its checkpoints'."""
    folder = os.path.expanduser(weights)
    if not os.path.isdir(folder) or is_checkpoint(Path(folder)) or os.path.exists(os.path.join(folder, "config.json")):
        return ""
    marks = [
        mark for depth in ((), ("*",)) for mark in glob.glob(os.path.join(glob.escape(folder), *depth, "step-*", "trainer.json"))
    ]
    steps = (os.path.dirname(mark) for mark in marks)
    found = {int(match[1]): step for step in steps if (match := re.search(r"step-(\d+)$", step))}
    return found[max(found)] if found else ""


def _lacks(weights: str, beside: str, patterns: tuple[str, ...]) -> bool:
    """Whether the weights are a folder here, and what comes with them holds no file of these names."""
    is_local = os.path.isdir(os.path.expanduser(weights))
    return is_local and not any(glob.glob(os.path.join(glob.escape(os.path.expanduser(beside)), name)) for name in patterns)


def _find_json_faults(config: str, option: str) -> Iterator[str]:
    path = Path(os.path.expanduser(config))
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f'{option} = "{config}": {path.name} cannot be read as JSON ({error})'
        return
    if not isinstance(content, dict) or "model_type" not in content:
        yield f'{option} = "{config}": {path.name} has no "model_type"; it must be a Hugging Face model configuration'


def _find_data_conflicts(config: JobConfig, world_size: int) -> Iterator[str]:
    training = config.training
    if training.context_len > training.seq_len:
        yield (
            f"training.context_len = {training.context_len} is more than training.seq_len = {training.seq_len}: "
            "a document's piece must fit in a packed sequence; lower the one or raise the other"
        )
    if config.sources:
        for option in fields(Corpus):
            if (value := getattr(training, option.name)) != option.default:
                yield f"training.{option.name} = {json.dumps(value)} beside [sources.NAME]: move it into a source of its own"
    for section, corpus in config.corpora.items():
        yield from find_corpus_conflicts(section, corpus)
    yield from _find_weight_conflicts(config)
    readers = world_size * max(1, training.num_workers)
    if training.num_streams % readers:
        yield (
            f"training.num_streams = {training.num_streams} is not a multiple of ranks x workers = {world_size} x "
            f"{max(1, training.num_workers)}: change training.num_workers or, for a new run, set num_streams to a multiple "
            f"of {readers}"
        )


def find_corpus_conflicts(section: str, corpus: Corpus) -> Iterator[str]:
    """Conflicts inside one section that names a corpus."""
    chosen = f'{section}.dataset = "{corpus.dataset}"'
    if corpus.dataset in (*LOCAL_FORMATS, TOKENS_FORMAT):
        if not corpus.data_files:
            what = "a folder" if corpus.dataset == TOKENS_FORMAT else "paths or globs, separated by commas"
            yield f"{chosen} needs {section}.data_files ({what})"
        elif corpus.dataset in LOCAL_FORMATS:
            for pattern in filter(None, corpus.data_files.split(",")):
                if not any(map(os.path.isfile, expand_glob(pattern))):
                    yield f'{section}.data_files: "{pattern.strip()}" matches no file'
    elif corpus.data_files:
        yield (
            f"{section}.data_files is set but {chosen} does not read files: "
            f"allowed with {', '.join((*LOCAL_FORMATS, TOKENS_FORMAT))}"
        )
    from_hub = corpus.dataset not in (STANDARD_LIBRARY, TOKENS_FORMAT, *GENERATED, *LOCAL_FORMATS)
    for option, default, has_effect in (
        ("dataset_name", "", from_hub or corpus.dataset == PATHSTAR),
        ("dataset_split", "train", from_hub),
        ("text_column", "text", from_hub or corpus.dataset in ("json", "parquet")),
    ):
        if getattr(corpus, option) != default and not has_effect:
            yield f'{section}.{option} = "{getattr(corpus, option)}" has no effect with {chosen}: leave it out'
    if corpus.streaming and corpus.dataset in (STANDARD_LIBRARY, TOKENS_FORMAT, *GENERATED):
        yield (
            f"{section}.streaming = true but {chosen} is read in place: allowed with {', '.join(LOCAL_FORMATS)} and Hub datasets"
        )


def _find_weight_conflicts(config: JobConfig) -> Iterator[str]:
    heaviest = max((source.weight for source in config.sources.values()), default=1.0)
    if heaviest == 0:
        yield "sources.NAME.weight = 0 for all sources leaves nothing to train on: raise one"
    for name, source in config.sources.items():
        if 0 < source.weight < SMALLEST_SHARE * heaviest:
            yield (
                f"sources.{name}.weight = {source.weight:g} is less than a millionth of the largest, {heaviest:g}: raise it, or "
                "set it to 0 to draw nothing"
            )


def _find_validation_conflicts(config: JobConfig) -> Iterator[str]:
    validation = config.validation
    if validation.dataset:
        yield from find_corpus_conflicts("validation", validation)
        if validation.holdout_every:
            yield (
                f'validation.dataset = "{validation.dataset}" and validation.holdout_every = {validation.holdout_every} '
                "both name a held-out set: leave one of them out"
            )
        return
    for option in fields(Corpus):
        if option.name != "dataset" and (value := getattr(validation, option.name)) != option.default:
            yield f"validation.{option.name} = {json.dumps(value)} has no effect without validation.dataset: set that too"
    if validation.interval and not validation.holdout_every:
        yield (
            f"validation.interval = {validation.interval} without held-out documents: set validation.dataset, or "
            "validation.holdout_every to keep some of the training data for it"
        )
    if validation.holdout_every == 1:
        yield "validation.holdout_every = 1 leaves nothing to train on: allowed are 0 (off) and 2 or more"
    for section, corpus in config.corpora.items() if validation.holdout_every else ():
        if corpus.streaming and corpus.dataset == "text":
            yield (
                f'{section}.dataset = "text" with streaming has one document a shard, from which validation.holdout_every = '
                f"{validation.holdout_every} cannot hold out some: set streaming = false, or give validation.dataset"
            )


def expand_glob(pattern: str) -> list[Path]:
    """Paths that a pattern from `training.data_files` stands for, sorted; `**` reaches into sub-folders."""
    # Unlike pathlib's, these and the os.path checks above take any string: one that cannot be a path matches nothing.
    return sorted(map(Path, glob.glob(os.path.expanduser(pattern.strip()), recursive=True)))


def _find_generated_conflicts(config: JobConfig) -> Iterator[str]:
    sections: dict[str, Corpus] = dict(config.corpora)
    if config.validation.dataset:
        sections["validation"] = config.validation
    for section, corpus in sections.items():
        if corpus.dataset == PATHSTAR:
            yield from _find_size_conflicts(config, f"{section}.dataset_name", corpus.dataset_name)
        if corpus.dataset in GENERATED and section != "validation" and config.validation.holdout_every:
            yield (
                f'validation.holdout_every = {config.validation.holdout_every} beside {section}.dataset = "{corpus.dataset}", '
                f'where another number is not another content: set validation.dataset = "{corpus.dataset}", which is never '
                "trained on"
            )
        if config.model.tokenizer_path in GENERATED and corpus.dataset != config.model.tokenizer_path:
            yield (
                f'model.tokenizer_path = "{config.model.tokenizer_path}" knows no text but its own, and {section}.dataset = '
                f'"{corpus.dataset}": change one of them'
            )
    used = {config.model.tokenizer_path, *(corpus.dataset for corpus in sections.values())}
    if config.model.tokenizer_path == SIBLINGS and config.training.context_len < NUM_TOKENS:
        yield f"training.context_len = {config.training.context_len} cuts pairs of siblings, of {NUM_TOKENS} tokens: raise it"
    for name in GENERATED:
        options = getattr(config, name)
        for option in fields(options) if name not in used else ():
            if (value := getattr(options, option.name)) != option.default:
                yield f'{name}.{option.name} = {value} has no effect without a dataset = "{name}": leave it out'


def _find_size_conflicts(config: JobConfig, option: str, names: str) -> Iterator[str]:
    try:
        sizes = parse_sizes(names)
    except ValueError as error:
        yield (
            f'{option} = "{names}": "{error}" is no size of path-star graphs: give arms x nodes of a path with the center, both '
            '2 to 999, such as "5x5", or several, "2x3,5x5"'
        )
        return
    labels, context_len = config.pathstar.labels, config.training.context_len
    for size in sizes:
        if labels < size.num_nodes:
            yield f"pathstar.labels = {labels} are too few for {option}: a graph {size} has {size.num_nodes} nodes: raise it"
        elif size.count_graphs(labels) < FEWEST_GRAPHS:
            yield (
                f"pathstar.labels = {labels} leaves {size.count_graphs(labels)} graphs of {option} = {size}, too few to keep "
                f"some for validation (at least {FEWEST_GRAPHS}): raise it"
            )
        if config.model.tokenizer_path == PATHSTAR and context_len < size.num_tokens:
            yield (
                f"training.context_len = {context_len} cuts the graphs {size} of {option}, which have {size.num_tokens} tokens: "
                "raise it"
            )


def _find_answer_conflicts(config: JobConfig) -> Iterator[str]:
    training = config.training
    if training.loss_on == "all" and training.answer_separator != DEFAULT_SEPARATOR:
        yield (
            f"training.answer_separator = {json.dumps(training.answer_separator)} has no effect with training.loss_on = "
            '"all": leave it out, or set loss_on to "answer"'
        )


def _find_objective_conflicts(config: JobConfig) -> Iterator[str]:
    objective, future = config.objective, config.future_encoder
    if None not in (objective.name, future.enable) and future.enable != (objective.name == "future"):
        yield (
            f'future_encoder.enable = {json.dumps(future.enable)} beside objective.name = "{objective.name}": leave it out, '
            "the name alone decides"
        )
    users = {"loss_weight": ("mtp", "top", "fsp_bow"), "mtp_tokens": ("mtp",), "window": ("top", "fsp_bow")}
    for option in fields(Objective):
        value, allowed = getattr(objective, option.name), users.get(option.name, (config.objective_name,))
        if value != option.default and config.objective_name not in allowed:
            names = " or ".join(f'"{name}"' for name in allowed)
            yield (
                f'objective.{option.name} = {value} has no effect with objective.name = "{config.objective_name}": leave it out, '
                f"or set the name to {names}"
            )


def _find_schedule_conflicts(config: JobConfig) -> Iterator[str]:
    steps = config.training.steps
    if config.uses_future and config.future_encoder.start_step > steps:
        yield (
            f"future_encoder.start_step = {config.future_encoder.start_step} is after the last step, training.steps = {steps}: "
            'start earlier or set objective.name = "next_token"'
        )
    if config.experimental.freeze_lm_for_infonce:
        if not config.uses_future:
            yield (
                "experimental.freeze_lm_for_infonce = true leaves nothing to train: "
                'it needs objective.name = "future" and future_encoder.loss_weight > 0'
            )
        elif config.future_encoder.start_step > 1:
            yield (
                f"experimental.freeze_lm_for_infonce = true leaves nothing to train before "
                f"future_encoder.start_step = {config.future_encoder.start_step}: set it to 0"
            )
        if config.optimizer.name == "Muon":
            yield (
                'optimizer.name = "Muon" beside experimental.freeze_lm_for_infonce = true: Muon trains the decoder layers alone, '
                'which are frozen; set it to "AdamW"'
            )


def _find_future_conflicts(config: JobConfig) -> Iterator[str]:
    future, training = config.future_encoder, config.training
    if future.target_shift >= training.context_len:
        yield (
            f"future_encoder.target_shift = {future.target_shift} leaves no position with a target: "
            f"it must be less than training.context_len = {training.context_len}"
        )
    if future.learnable_temperature and future.temperature < LOWEST_LEARNED_TEMPERATURE:
        yield (
            f"future_encoder.temperature = {future.temperature} is below {LOWEST_LEARNED_TEMPERATURE}, the "
            "lowest that future_encoder.learnable_temperature allows: raise it or do not learn it"
        )
    if future.learnable_temperature and future.temperature > HIGHEST_LEARNED_TEMPERATURE:
        yield (
            f"future_encoder.temperature = {future.temperature} is above {HIGHEST_LEARNED_TEMPERATURE}, the "
            "highest that future_encoder.learnable_temperature allows: lower it or do not learn it"
        )
    if future.learnable_temperature and future.estimator_type != "infonce":
        yield (
            f"future_encoder.learnable_temperature = true has no effect with future_encoder.estimator_type = "
            f'"{future.estimator_type}": leave it out'
        )
    if future.estimator_type not in CONTRASTIVE:
        for name in ("negatives", "exclude_neighbors", "exclude_duplicates"):
            if getattr(future, name) != getattr(FutureEncoder(), name):
                yield (
                    f"future_encoder.{name} is about negatives, and future_encoder.estimator_type = "
                    f'"{future.estimator_type}" has none: leave it out'
                )
    if future.ema_decay != FutureEncoder().ema_decay and future.target != "ema":
        yield (
            f'future_encoder.ema_decay = {future.ema_decay} has no effect with future_encoder.target = "{future.target}": leave '
            "it out"
        )
    if future.target in ("mean_embedding", "causal") and future.precision == "fp8":
        yield (
            f'future_encoder.precision = "fp8" has no effect with future_encoder.target = "{future.target}", which has no '
            "anti-causal pass: leave it out"
        )
    if future.max_anchors == 1:
        yield "future_encoder.max_anchors = 1 leaves no negatives: allowed are 0 (all) and 2 or more"
    if future.max_anchors >= training.seq_len:
        yield (
            f"future_encoder.max_anchors = {future.max_anchors} is no less than training.seq_len = {training.seq_len}: "
            "set it to 0 to take all anchors"
        )
    if future.precision == "fp8" and training.mixed_precision_param != "bfloat16":
        yield (
            f'future_encoder.precision = "fp8" beside training.mixed_precision_param = "{training.mixed_precision_param}": '
            'set the one to "bf16" or the other to "bfloat16"'
        )


def _find_float8_conflicts(config: JobConfig) -> Iterator[str]:
    training = config.training
    if not training.float8:
        return
    if config.future_encoder.precision == "fp8":
        yield (
            'future_encoder.precision = "fp8" beside training.float8 = true, which has both passes in 8-bit floats already: set '
            'the one to "bf16" or the other to false'
        )
    if training.mixed_precision_param != "bfloat16":
        yield (
            f'training.float8 = true beside training.mixed_precision_param = "{training.mixed_precision_param}": set the one to '
            'false or the other to "bfloat16"'
        )
    if training.seq_len % FLOAT8_SIZE_STEP:
        yield (
            f"training.float8 = true: training.seq_len = {training.seq_len} is not a multiple of {FLOAT8_SIZE_STEP}, which the "
            "weights' gradients need: change it, or set float8 to false"
        )


def _find_parallel_conflicts(training: Training, world_size: int) -> Iterator[str]:
    replicate, shard = training.data_parallel_replicate_degree, training.data_parallel_shard_degree
    if shard == 0:
        yield "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more"
    elif shard > 0 and replicate * shard != world_size:
        yield (
            f"training.data_parallel_replicate_degree x data_parallel_shard_degree = {replicate} x {shard} is not the number of "
            f"ranks, {world_size}: set shard to -1 to take all remaining ranks"
        )
    elif shard < 0 and world_size % replicate:
        yield f"training.data_parallel_replicate_degree = {replicate} does not divide the number of ranks, {world_size}"
