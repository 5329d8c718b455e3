"""Options that are set and have no effect are accepted, and listed when the run starts."""

from __future__ import annotations

from dataclasses import fields

import pytest

from flame.config.check import list_unused
from flame.config.schema import NAMED, JobConfig, name_any
from flame.config.table import list_types
from flame.config.types import Section, When, get_declaration
from flame.objectives.registry import BUILT_IN
from flame.trainer.options import list_idle_options, read_options
from tests.support.options import MODEL, TABLE

pytestmark = pytest.mark.usefixtures("folder")

FUTURE = "--objective.name=future"
VALIDATED = ["--validation.dataset=stdlib", "--validation.interval=2"]
BY_OBJECTIVE = [(name, section) for name, kind in BUILT_IN.items() for section in kind.sections]
CONDITIONAL = [
    (name, each.name, when)
    for name, kind in TABLE.sections.items()
    for each in fields(kind)
    for when in get_declaration(each).applies
]


def choose_other(key: str) -> object:
    """A value that the option may have and that is neither its default nor 0 or empty, where there is one."""
    schema = TABLE.schemas[key]
    if "enum" in schema:
        return next(value for value in schema["enum"] if value != schema["default"])
    kinds = {"boolean": lambda: not schema["default"], "string": lambda: "x", "integer": lambda: (schema["default"] or 0) + 2}
    type_name = next(name for name in sorted(list_types(schema)) if name != "null")
    return kinds.get(type_name, lambda: 0.5 if schema["default"] != 0.5 else 0.25)()


def find_section(job: JobConfig, name: str) -> Section:
    return job.get(TABLE.extensions[name]) if name in TABLE.extensions else getattr(job, name)


def set_value(job: JobConfig, key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    setattr(find_section(job, section), name, value)


def fulfil(job: JobConfig, when: When, section: str) -> None:
    key = when.resolve(section)
    if when.above is not None:
        set_value(job, key, when.above + 1)
    elif when.values:
        set_value(job, key, when.values[0])
    else:
        set_value(job, key, True if TABLE.schemas[key]["type"] == "boolean" else choose_other(key))


def breach(job: JobConfig, when: When, section: str) -> None:
    """Give the other option a value with which the condition does not hold."""
    key = when.resolve(section)
    schema = TABLE.schemas[key]
    allowed = (
        schema.get("enum") or {"boolean": [False, True], "string": [""], "integer": [0, 2], "number": [0.0, 2.0]}[schema["type"]]
    )
    set_value(job, key, next(value for value in allowed if not when.holds(value)))


def test_there_are_conditions():
    assert len(CONDITIONAL) > 20 and not {section for section, _, _ in CONDITIONAL} & set(map(name_any, NAMED))


@pytest.mark.parametrize(
    ("section", "name", "broken"), CONDITIONAL, ids=lambda value: value if isinstance(value, str) else value.key
)
def test_an_option_is_listed_if_and_only_if_one_of_its_conditions_does_not_hold(section, name, broken):
    job = JobConfig()
    key = f"{section}.{name}"
    (declaration,) = (get_declaration(each) for each in fields(TABLE.sections[section]) if each.name == name)
    set_value(job, key, choose_other(key))
    for when in declaration.applies:
        fulfil(job, when, section)
    assert key not in list_unused(job, (), {})
    breach(job, broken, section)
    assert key in list_unused(job, (), {})
    set_value(job, key, TABLE.schemas[key]["default"])
    assert key not in list_unused(job, (), {}), "nobody has set it"


@pytest.mark.parametrize("key", [key for _, section in BY_OBJECTIVE for key in TABLE.schemas if key.startswith(f"{section}.")])
def test_any_option_of_an_objective_is_accepted_beside_next_token_and_listed(key):
    value = str(choose_other(key)).lower()
    assert list_idle_options(read_options([*MODEL, "--objective.name=next_token", f"--{key}={value}"], 1)) == [key]
    assert list_idle_options(read_options([*MODEL, f"--{key}={value}"], 1)) == [key], "next_token is the default"


NEEDS = {"fsp_revlm.train_reverse": ["--checkpoint.initial_load_path=first/hf"]}
"""What an option cannot do without."""


@pytest.mark.parametrize(("objective", "section"), BY_OBJECTIVE)
def test_options_of_an_objective_are_used_by_it_alone(objective, section):
    """Those without conditions of their own."""
    free = [each.name for each in fields(TABLE.sections[section]) if not get_declaration(each).applies]
    with_shares = [*MODEL, "--training.gradient_accumulation_steps=2"]
    for name in free:
        key = f"{section}.{name}"
        word = f"--{key}={str(choose_other(key)).lower()}"
        for other in BUILT_IN:
            argv = [*with_shares, f"--objective.name={other}", word, *NEEDS.get(key, [])]
            listed = list_idle_options(read_options(argv, 1))
            assert listed == ([] if other == objective else [key]), other


@pytest.mark.parametrize(
    ("argv", "listed"),
    [
        ([], []),
        ([FUTURE, "--future_encoder.loss_weight=0.5", "--metrics.diagnostics_interval=7", "--objective.warmup_steps=3"], []),
        (["--objective.name=next_token", "--metrics.diagnostics_interval=7"], ["metrics.diagnostics_interval"]),
        (["--objective.warmup_steps=3", "--objective.start_step=2"], ["objective.start_step", "objective.warmup_steps"]),
        (
            [FUTURE, "--future_encoder.loss_weight=0", "--future_encoder.future_k=4"],
            ["future_encoder.future_k"],
        ),
        ([FUTURE, "--future_encoder.estimator_type=cosine", "--future_encoder.temperature=0.5"], ["future_encoder.temperature"]),
        ([FUTURE, "--future_encoder.target=causal", "--future_encoder.future_k=4"], ["future_encoder.future_k"]),
        (["--validation.dataset=stdlib", "--validation.num_sequences=8"], ["validation.dataset", "validation.num_sequences"]),
        ([*VALIDATED, "--validation.num_sequences=8"], []),
        (
            ["--held_out.web.dataset=text", "--held_out.web.data_files=m.json"],
            ["held_out.web.data_files", "held_out.web.dataset"],
        ),
        (["--evaluation.interval=2", "--held_out.web.dataset=text", "--held_out.web.data_files=m.json"], []),
        (["--evaluation.interval=2", "--held_out.web.dataset=stdlib", "--evaluation.seed=3"], ["evaluation.seed"]),
        ([*VALIDATED, "--validation.text_column=body"], ["validation.text_column"]),
        (["--validation.interval=3", "--validation.holdout_every=4", "--validation.streaming"], ["validation.streaming"]),
        (["--training.text_column=body"], ["training.text_column"]),
        (["--training.dataset=json", "--training.data_files=m.json", "--training.text_column=body"], []),
        (["--training.answer_separator=:"], ["training.answer_separator"]),
        (["--training.answer_separator=:", "--training.loss_on=answer"], []),
        (["--training.token_dtype=uint16", "--training.end_of_text_id=3"], ["training.end_of_text_id", "training.token_dtype"]),
        (["--checkpoint.enable_checkpoint=false", "--checkpoint.keep_latest_k=3"], ["checkpoint.keep_latest_k"]),
        (["--checkpoint.export_hf=false", "--checkpoint.export_dtype=bfloat16"], ["checkpoint.export_dtype"]),
        (["--pathstar.seed=3", "--siblings.seed=3"], ["pathstar.seed", "siblings.seed"]),
    ],
    ids=lambda words: " ".join(words).replace("--", ""),
)
def test_options_without_effect_are_listed(argv, listed):
    assert sorted(list_idle_options(read_options([*MODEL, *argv], 1))) == listed
