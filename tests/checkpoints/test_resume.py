"""What may change between two starts of a run, and what is told of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.checkpoints.resume import (
    FORMAT,
    check_made_by_run,
    check_model,
    check_resumable,
    check_tokenizer,
    flatten,
    list_changes,
    list_used_sections,
)
from flame.config.run import NEXT_TOKEN, ObjectiveChoice
from flame.config.schema import Job, JobConfig, Optimizer, Source, Training
from flame.config.types import Section, list_fixed
from flame.data.tasks.pathstar import PathstarOptions
from flame.errors import UserError
from flame.objectives.future.options import FutureOptions
from flame.objectives.mtp.options import MultiTokenOptions
from flame.objectives.registry import choose_objective
from tests.support.models import configure, future_config, tiny_llama

TRAINS_MTP = ObjectiveChoice(name="mtp")


def saved_config(config: JobConfig) -> dict[str, Any]:
    """As it comes out of a checkpoint."""
    return json.loads(json.dumps(config.to_dict()))


def name_objective(config: JobConfig) -> str:
    kind = choose_objective(config)
    return kind.name if kind else NEXT_TOKEN


def check(saved: dict[str, Any], config: JobConfig, saved_objective: str | None = None) -> None:
    """Go on under `config`, with the objective that it has unless another was trained."""
    own = name_objective(config)
    check_resumable(saved, saved_objective or own, config, own, list_used_sections(config), "the run in exp/here")


def set_option(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    section, name = key.split(".")
    changed[section][name] = value
    return changed


def list_fixed_options(config: JobConfig) -> list[str]:
    return [f"{section}.{name}" for section, options in config.list_sections() for name in list_fixed(options)]


def with_sections(objective: str, *sections: Section) -> JobConfig:
    return configure(*sections, objective=ObjectiveChoice(name=objective), job=Job(dump_folder="exp/here"))


def test_an_unchanged_run_goes_on_in_silence():
    config = JobConfig()
    check(saved_config(config), config)
    assert list_changes(saved_config(config), config) == []


@pytest.mark.parametrize(
    "config",
    [with_sections("future", FutureOptions()), with_sections("mtp", MultiTokenOptions())],
    ids=name_objective,
)
def test_fixed_options_are_refused_by_name(config):
    keys = list_fixed_options(config)
    assert {"training.seed", "training.num_streams", "optimizer.name"} < set(keys)
    assert any(key.startswith(("future_encoder.", "mtp.")) for key in keys)
    saved = saved_config(config)
    for key in keys:
        section, name = key.split(".")
        changed = set_option(saved, key, "other")
        with pytest.raises(UserError) as error:
            check(changed, config)
        (line,) = error.value.lines
        assert line.startswith(f"{key} = {json.dumps(saved[section][name])}, but the run in exp/here was made with")
        assert list_changes(changed, config) == []


def test_every_other_option_may_change_and_is_told():
    config = with_sections("future", FutureOptions())
    saved, fixed = saved_config(config), list_fixed_options(config)
    silent = {"job.config_file", "job.dump_folder", "job.description", "checkpoint.load_step", "checkpoint.branch_from"}
    for section, options in config.list_sections():
        for name in vars(options):
            key = f"{section}.{name}"
            if key not in fixed and section != "profiling":  # which changes nothing that is computed
                changed = set_option(saved, key, "other")
                check(changed, config)
                told = [line.split(":")[0] for line in list_changes(changed, config)]
                assert told == ([] if key in silent else [key]), key


@pytest.mark.parametrize(
    ("options", "is_learned"),
    [({}, False), ({"learnable_temperature": True}, True), ({"estimator_type": "bilinear"}, True)],
)
def test_a_temperature_that_is_learned_is_the_checkpoints(options, is_learned):
    saved, config = (future_config(temperature=value, **options) for value in (0.1, 0.5))
    if is_learned:
        with pytest.raises(UserError, match=r"future_encoder.temperature = 0.5, but the run in .* was made with 0.1"):
            check(saved_config(saved), config)
    else:
        check(saved_config(saved), config)
        assert list_changes(saved_config(saved), config) == ["future_encoder.temperature: 0.1 -> 0.5"]


def test_each_refusal_has_its_line():
    saved = saved_config(JobConfig(training=Training(seed=1, num_streams=2)))
    with pytest.raises(UserError) as error:
        check(saved, JobConfig(training=Training(seed=3, num_streams=4)))
    assert [line.split(" = ")[0] for line in error.value.lines] == ["training.num_streams", "training.seed"]


@pytest.mark.parametrize(("before", "after", "is_fine"), [(0.1, 0.2, True), (0.0, 0.1, False), (0.1, 0.0, False)])
def test_the_future_loss_cannot_be_switched(before, after, is_fine):
    made, config = future_config(loss_weight=before), future_config(loss_weight=after)
    if is_fine:
        check(saved_config(made), config, name_objective(made))
        assert list_changes(saved_config(made), config) == [f"future_encoder.loss_weight: {before} -> {after}"]
    else:
        with pytest.raises(UserError, match=r'^objective\.name = "\w+" .* they have different modules') as error:
            check(saved_config(made), config, name_objective(made))
        assert len(error.value.lines) == 1


def test_another_objective_is_one_line_whatever_its_options_are():
    made = with_sections("mtp", MultiTokenOptions(tokens=2), FutureOptions(projection_dim=8))
    with pytest.raises(UserError) as error:
        check(saved_config(made), with_sections("future", FutureOptions()), "mtp")
    (line,) = error.value.lines
    assert line.startswith('objective.name = "future"') and '"mtp"' in line


def test_options_without_effect_are_never_refused():
    """Those of an objective or a data source that is not in use, however they change."""
    made = configure(
        FutureOptions(target="random", projection_dim=8),
        PathstarOptions(labels=50),
        MultiTokenOptions(tokens=3),
        objective=TRAINS_MTP,
    )
    now = configure(FutureOptions(), PathstarOptions(), MultiTokenOptions(tokens=3), objective=TRAINS_MTP)
    check(saved_config(made), now)
    with pytest.raises(UserError, match=r"^mtp\.tokens = 4, but the run in"):
        check(saved_config(made), configure(MultiTokenOptions(tokens=4), objective=TRAINS_MTP))
    generated = Training(dataset="pathstar")
    made = configure(PathstarOptions(labels=50), training=generated)
    with pytest.raises(UserError, match=r"^pathstar\.labels = 30, but the run in"):
        check(saved_config(made), configure(PathstarOptions(), training=generated))


def test_changes_are_told():
    saved = saved_config(JobConfig(optimizer=Optimizer(lr=1e-3), job=Job(config_file="a.toml", description="one")))
    saved["optimizer"]["momentum"] = [0.5]
    config = JobConfig(optimizer=Optimizer(lr=5e-4), job=Job(config_file="b.toml", description="two"))
    check(saved, config)
    assert list_changes(saved, config) == ["optimizer.lr: 0.001 -> 0.0005", "optimizer.momentum: [0.5] -> unset"]


def test_an_option_that_a_checkpoint_does_not_know_had_its_default():
    """A release before an option did what is its default now."""
    saved = saved_config(future_config())
    del saved["comm"], saved["future_encoder"]["target"], saved["future_encoder"]["negatives"]
    same = future_config()
    check(saved, same)
    assert list_changes(saved, same) == []
    assert list_changes(saved, future_config(negatives="global")) == ['future_encoder.negatives: "local" -> "global"']
    with pytest.raises(UserError, match=r'^future_encoder\.target = "causal", but the run in .* was made with "self"'):
        check(saved, future_config(target="causal"))


def test_a_checkpoint_of_another_release_is_refused_in_one_line(tmp_path):
    """Before checkpoints had a format, trainer.json held none."""
    state = {"step": 7, "config": saved_config(JobConfig()), "format": FORMAT}
    check_made_by_run(state, tmp_path)
    for changed in ({key: value for key, value in state.items() if key != "format"}, state | {"format": FORMAT + 1}):
        with pytest.raises(UserError) as error:
            check_made_by_run(changed, tmp_path)
        (line,) = error.value.lines
        assert "step-7" in line and "another release" in line and "checkpoint.initial_load_path" in line


def test_a_converted_model_is_no_run_to_go_on_with(tmp_path):
    with pytest.raises(UserError, match=r"step-0.* is a converted model.*checkpoint\.initial_load_path"):
        check_made_by_run({"step": 0, "config": {}}, tmp_path)


def test_sources_are_compared_by_dotted_key():
    before = saved_config(JobConfig(sources={"web": Source(weight=0.5, text_column="a"), "code": Source(weight=0.5)}))
    now = JobConfig(sources={"web": Source(weight=0.25, text_column="a"), "books": Source(weight=0.75)})
    check(before, now)
    assert [line for line in list_changes(before, now) if ".weight" in line] == [
        "sources.web.weight: 0.5 -> 0.25",
        "sources.books.weight: unset -> 0.75",
        "sources.code.weight: 0.5 -> unset",
    ]


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
TREES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda trees: st.dictionaries(st.sampled_from("xyz"), LEAVES | trees, max_size=3),
)


@given(TREES)
def test_flatten_finds_each_leaf(tree):
    flat = flatten(tree)
    for key, value in flat.items():
        found: Any = tree
        for part in key.split("."):
            found = found[part]
        assert found == value and not isinstance(value, dict)

    def count(node: Any) -> int:
        return sum(map(count, node.values())) if isinstance(node, dict) else 1

    assert len(flat) == count(tree)


def test_a_model_is_compared_by_content():
    saved = json.loads(tiny_llama().to_json_string(use_diff=False))
    check_model(
        saved, tiny_llama(eos_token_id=7, pad_token_id=3, use_cache=False, dtype="bfloat16", name_or_path="there").to_dict()
    )
    newer = tiny_llama().to_dict() | {"transformers_version": "99", "an_option_of_it": 1}
    check_model(saved, newer)
    with pytest.raises(UserError) as error:
        check_model(saved, tiny_llama(hidden_size=64, tie_word_embeddings=False, rope_theta=5e5).to_dict())
    (line,) = error.value.lines
    for part in ("hidden_size = 64 (before: 32)", "tie_word_embeddings = false (before: true)", "rope_theta = 500000.0"):
        assert part in line
    assert "vocab_size" not in line and line.startswith("model.config: ")


def test_a_nested_key_that_only_one_has_is_a_difference():
    with pytest.raises(UserError, match=r"rope_parameters.factor = 4 \(before: unset\)"):
        check_model({"rope_parameters": {"theta": 1}}, {"rope_parameters": {"theta": 1, "factor": 4}})


def test_a_tokenizer_is_compared_by_fingerprint():
    check_tokenizer("abc", "abc")
    with pytest.raises(UserError, match=r"model.tokenizer_path: .* def\) is not the one .*\(abc\)"):
        check_tokenizer("abc", "def")
