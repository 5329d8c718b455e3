"""What may change between two starts of a run, and what is told of it."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.checkpoints.resume_check import FIXED_OPTIONS, check_model, check_resumable, check_tokenizer, flatten, list_changes
from flame.config import Job, JobConfig, Optimizer, Source, Training
from flame.errors import UserError
from flame.objective_config import FutureEncoder, Objective
from tests.helpers import tiny_llama


def saved_config(config: JobConfig) -> dict[str, Any]:
    """As it comes out of a checkpoint."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def set_option(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    section, name = key.split(".")
    changed[section][name] = value
    return changed


def test_an_unchanged_run_goes_on_in_silence():
    config = JobConfig()
    check_resumable(saved_config(config), config)
    assert list_changes(saved_config(config), config) == []


@pytest.mark.parametrize("key", FIXED_OPTIONS)
def test_fixed_options_are_refused_by_name(key):
    config = JobConfig(job=Job(dump_folder="exp/here"))
    saved = saved_config(config)
    section, name = key.split(".")
    changed = set_option(saved, key, "other")
    with pytest.raises(UserError) as error:
        check_resumable(changed, config)
    (line,) = error.value.lines
    assert line.startswith(f"{key} = {json.dumps(saved[section][name])}, but the run in exp/here was made with")
    assert list_changes(changed, config) == []


@pytest.mark.parametrize(
    ("options", "is_learned"),
    [({}, False), ({"learnable_temperature": True}, True), ({"estimator_type": "bilinear"}, True)],
)
def test_a_temperature_that_is_learned_is_the_checkpoints(options, is_learned):
    saved, config = (
        JobConfig(objective=Objective(name="future"), future_encoder=FutureEncoder(temperature=value, **options))
        for value in (0.1, 0.5)
    )
    if is_learned:
        with pytest.raises(
            UserError, match=r"future_encoder.temperature = 0.5, but the run in .* was made with 0.1: set it back"
        ):
            check_resumable(saved_config(saved), config)
    else:
        check_resumable(saved_config(saved), config)
        assert list_changes(saved_config(saved), config) == ["future_encoder.temperature: 0.1 -> 0.5"]


def test_each_refusal_has_its_line():
    saved = saved_config(JobConfig(training=Training(seed=1, num_streams=2)))
    with pytest.raises(UserError) as error:
        check_resumable(saved, JobConfig(training=Training(seed=3, num_streams=4)))
    assert [line.split(" = ")[0] for line in error.value.lines] == ["training.num_streams", "training.seed"]


@pytest.mark.parametrize(("before", "after", "is_fine"), [(0.1, 0.2, True), (0.0, 0.1, False), (0.1, 0.0, False)])
def test_the_future_loss_cannot_be_switched(before, after, is_fine):
    saved = saved_config(JobConfig(future_encoder=FutureEncoder(enable=True, loss_weight=before)))
    config = JobConfig(future_encoder=FutureEncoder(enable=True, loss_weight=after))
    if is_fine:
        check_resumable(saved, config)
        assert list_changes(saved, config) == [f"future_encoder.loss_weight: {before} -> {after}"]
    else:
        with pytest.raises(UserError, match=r'^objective\.name = "\w+" .* they have different heads'):
            check_resumable(saved, config)


def test_changes_are_told():
    saved = saved_config(JobConfig(optimizer=Optimizer(lr=1e-3), job=Job(config_file="a.toml", description="one")))
    saved["optimizer"]["momentum"] = [0.5]
    config = JobConfig(optimizer=Optimizer(lr=5e-4), job=Job(config_file="b.toml", description="two"))
    check_resumable(saved, config)
    assert list_changes(saved, config) == ["optimizer.lr: 0.001 -> 0.0005", "optimizer.momentum: [0.5] -> unset"]


def test_an_option_that_a_checkpoint_does_not_know_had_its_default():
    """A release before an option did what is its default now."""
    saved = saved_config(JobConfig(future_encoder=FutureEncoder(enable=True)))
    del saved["objective"], saved["comm"], saved["future_encoder"]["target"], saved["future_encoder"]["negatives"]
    same = JobConfig(future_encoder=FutureEncoder(enable=True))
    check_resumable(saved, same)
    assert list_changes(saved, same) == []
    assert list_changes(saved, JobConfig(future_encoder=FutureEncoder(enable=True, negatives="global"))) == [
        'future_encoder.negatives: "local" -> "global"'
    ]
    with pytest.raises(UserError, match=r'^future_encoder\.target = "causal", but the run in .* was made with "self"'):
        check_resumable(saved, JobConfig(future_encoder=FutureEncoder(enable=True, target="causal")))


def test_sources_are_compared_by_dotted_key():
    before = saved_config(JobConfig(sources={"web": Source(weight=0.5, text_column="a"), "code": Source(weight=0.5)}))
    now = JobConfig(sources={"web": Source(weight=0.25, text_column="a"), "books": Source(weight=0.75)})
    check_resumable(before, now)
    assert list_changes(before, now) == [
        "sources.web.weight: 0.5 -> 0.25",
        "sources.books.weight: unset -> 0.75",
        "sources.code.weight: 0.5 -> unset",
    ]
    with pytest.raises(UserError, match=r'^sources.web.text_column = "b", but the run in'):
        check_resumable(before, JobConfig(sources={"web": Source(text_column="b")}))


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
