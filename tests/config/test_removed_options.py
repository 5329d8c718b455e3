"""An option that has gone, or that other trainers have, answers in one line with what to write instead."""

from __future__ import annotations

import re

import pytest

from flame.config.renamed import DECLINED, RENAMED
from flame.trainer.options import read_options
from tests.support.options import MODEL, TABLE, read_mistakes

pytestmark = pytest.mark.usefixtures("folder")
KEY = re.compile(r"\b[a-z_]+\.[a-z_]+\b")


@pytest.mark.parametrize("key", RENAMED)
def test_a_removed_option_says_what_to_write_instead(key):
    (line,) = read_mistakes([*MODEL, f"--{key}=1"])
    assert line.startswith(f"{key} = 1 (command line): this option is gone: ") and line.endswith(RENAMED[key])
    assert re.search(r"\b(write|leave it out)\b", line)


@pytest.mark.parametrize("key", RENAMED)
def test_a_removed_option_is_none_any_more_and_what_replaces_it_is(key):
    assert key not in TABLE.schemas
    named = set(KEY.findall(RENAMED[key]))
    assert named <= TABLE.schemas.keys()
    assert named or "leave it out" in RENAMED[key]


@pytest.mark.parametrize(
    ("objective", "key", "meant"),
    [
        ("nitp", "objective.loss_weight", "nitp.loss_weight"),
        ("future", "objective.loss_weight", "future_encoder.loss_weight"),
        ("top", "objective.window", "top.window"),
    ],
)
def test_an_option_that_each_objective_has_is_that_of_the_chosen_one(folder, objective, key, meant):
    (folder / "run.toml").write_text(f'[objective]\n{key.partition(".")[2]} = 1\nname = "{objective}"\n')
    expected = f"{key} = 1 (run.toml): this option is gone: write {meant}"
    assert read_mistakes([*MODEL, "--job.config_file=run.toml"]) == [expected]


def test_removed_options_of_a_file_are_named_all_at_once(folder):
    tables: dict[str, list[str]] = {}
    for key in RENAMED:
        section, _, name = key.partition(".")
        tables.setdefault(section, []).append(f"{name} = 1\n")
    (folder / "run.toml").write_text("".join(f"[{section}]\n{''.join(lines)}" for section, lines in tables.items()))
    lines = read_mistakes([*MODEL, "--job.config_file=run.toml"])
    assert sorted(line.split(" = ")[0] for line in lines) == sorted(RENAMED)


def test_hyphens_do_not_hide_a_removed_option():
    (line,) = read_mistakes([*MODEL, "--training.skip-nan-inf=true"])
    assert line.endswith(RENAMED["training.skip_nan_inf"])


@pytest.mark.parametrize("kind", DECLINED)
@pytest.mark.parametrize("key", ["parallelism.{}_degree", "training.{}_degree", "{}"])
def test_parallelism_of_other_kinds_is_declined_with_the_reason(kind, key):
    (line,) = read_mistakes([*MODEL, f"--{key.format(kind)}=1"])
    assert DECLINED[kind] in line and "leave it out" in line
    assert {each for each in KEY.findall(line) if not each.startswith("parallelism.")} - {
        key.format(kind)
    } <= TABLE.schemas.keys()


def test_the_values_that_replace_a_removed_switch_are_accepted():
    assert '"future"' in RENAMED["future_encoder.enable"] and "max_skipped_steps = 1" in RENAMED["training.skip_nan_inf"]
    job = read_options([*MODEL, "--objective.name=future", "--training.max_skipped_steps=1"], 1)
    assert job.training.max_skipped_steps == 1
