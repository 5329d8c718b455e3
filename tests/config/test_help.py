"""`--help`, `--print-config` and docs/options.md name every option, and nothing slow is loaded for them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import tomli

from flame.cli.options import main as print_options
from flame.config.help import TOML_WIDTH, describe_section, render_commented, write_config
from flame.config.schema import NAMED, name_any
from flame.trainer.options import read_options
from tests.support.options import MODEL, TABLE, list_values, read_mistakes
from tests.support.paths import REPO

KEYS = list(TABLE.schemas)
PATHSTAR = ["--training.dataset=pathstar", "--training.dataset_name=5x5"]
SLOW = {"torch", "transformers", "datasets", "triton"}


def run_to_end(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line prints that ends the process with 0."""
    with pytest.raises(SystemExit) as caught:
        read_options(argv, 1)
    shown = capsys.readouterr()
    assert caught.value.code == 0 and shown.err == ""
    return shown.out


def join_lines(text: str) -> str:
    """Without the frame, and on one line."""
    return " ".join(text.replace("│", " ").split())


def list_shown(text: str) -> list[str]:
    """Options in the order in which help shows them."""
    return [word[2:] for word in text.split() if word.startswith("--") and word[2:] in KEYS]


@pytest.mark.parametrize("argv", [["--training.steps", "wrong", "--help", "--nonsense"], ["stray", "-h"]], ids=["long", "short"])
def test_help_lists_every_option_and_does_nothing_else(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run_to_end(argv, capsys)
    assert list_shown(shown) == KEYS
    assert max(map(len, shown.splitlines())) <= 80
    text = join_lines(shown)
    assert "--optimizer.beta1 (a finite number >= 0 and < 1) Decay of the first moment. (default: 0.9)" in text
    assert "--training.compile (true or false) Compile each" in text
    assert "it and on the seed, not on the number of ranks or workers. A resumed run must keep it. (default: 192)" in text
    assert "Has an effect only with training.loss_on = " in text


@pytest.mark.parametrize("section", TABLE.sections)
def test_help_of_a_section_lists_its_options_alone(section, capsys):
    shown = run_to_end(["--help", section], capsys)
    assert list_shown(shown) == [f"{section}.{each.name}" for each in fields(TABLE.sections[section])]


@pytest.mark.parametrize("words", [["--help", "nonsense"], ["--help=nonsense"], ["--help="], ["-h", "training.steps"]], ids=str)
def test_help_of_no_section_is_one_line_that_names_them_all(words):
    (line,) = read_mistakes(words)
    assert all(section in line for section in TABLE.sections)


def test_help_of_a_section_may_be_written_with_an_equals_sign(capsys):
    assert run_to_end(["--help=mtp"], capsys) == run_to_end(["--help", "mtp"], capsys)


def test_every_option_has_a_help_text():
    """A field without a docstring would be listed with no word on what it does."""
    assert not [
        f"{name}.{each.name}"
        for name, kind in TABLE.sections.items()
        for each in describe_section(name, kind, TABLE)
        if not each.text
    ]


def test_the_printed_configuration_without_a_file_holds_the_defaults(folder, capsys):
    (folder / "printed.toml").write_text(run_to_end(["--print-config"], capsys))
    printed = list_values(read_options(["--job.config_file=printed.toml", *MODEL], 1))
    expected = list_values(read_options(MODEL, 1))
    assert printed | {"job": expected["job"]} == expected


def test_the_printed_configuration_of_a_file_reads_back(folder, capsys):
    """Also what the command line has changed, and a mixture."""
    (folder / "run.toml").write_text(
        '[job]\ndescription = "a \\"quoted\\" \\n line"\n[sources.web]\ndataset = "json"\ndata_files = "rows.jsonl"\n'
        '[sources.code]\ndataset = "stdlib"\nweight = 2.5\n[mtp]\ntokens = 3\n[lr_scheduler]\ndecay_ratio = 0.25\n'
    )
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    argv = ["--job.config_file=run.toml", *MODEL, "--training.max_norm=inf", "--objective.name=mtp"]
    (folder / "printed.toml").write_text(run_to_end([*argv, "--print-config"], capsys))
    printed, expected = (list_values(read_options(words, 1)) for words in (["--job.config_file=printed.toml"], argv))
    assert printed["job"].pop("config_file") == "printed.toml" and expected["job"].pop("config_file") == "run.toml"
    assert printed == expected


def test_the_printed_configuration_shows_every_option_below_its_help(folder, capsys):
    text = run_to_end(["--print-config", *(f"--{head}.web.dataset=stdlib" for head in NAMED)], capsys)
    tables = tomli.loads(text)
    assert set(tables) == {*NAMED, *TABLE.sections} - set(map(name_any, NAMED))
    assert all(set(tables[head]) == {"web"} for head in NAMED)
    lines = iter(text.splitlines())
    for section, kind in TABLE.sections.items():
        assert next(lines) == f"[{section.replace('NAME', 'web')}]"
        for each in describe_section(section, kind, TABLE):
            for line in textwrap.wrap(f"{each.text} Allowed: {each.allowed}.", TOML_WIDTH):
                assert next(lines) == f"# {line}"
            assert next(lines).removeprefix("# ").startswith(f"{each.name} = ")
        assert next(lines) == ""


def test_a_mistake_beside_print_config_is_a_line():
    assert len(read_mistakes(["--print-config", "--training.steps=0", "stray", "--no.such=1"])) == 3


def test_a_written_configuration_shows_every_option(folder):
    job = read_options(MODEL, 1)
    list_values(job)  # fills in the sections that nobody has asked for
    write_config(job, folder / "resolved.toml")
    lines = (folder / "resolved.toml").read_text().splitlines()
    shown = [line.removeprefix("# ").split(" = ")[0] for line in lines if " = " in line]
    assert shown == [key.rpartition(".")[2] for key in KEYS if not key.startswith(tuple(NAMED))]
    assert "# decay_ratio = unset" in lines


def test_comments_change_nothing(folder):
    job = read_options(MODEL, 1)
    write_config(job, folder / "resolved.toml")
    assert tomli.loads(render_commented(job, TABLE)) == tomli.loads((folder / "resolved.toml").read_text())


def test_the_page_of_options_is_up_to_date(capsys):
    assert print_options([]) == 0
    assert capsys.readouterr().out == (REPO / "docs" / "options.md").read_text(), "python -m flame.cli.options > docs/options.md"


LOADED = """
import sys
try:
    from flame.trainer.options import read_options
    read_options(sys.argv[1:], 1)
finally:
    print("loaded", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("words", "failure"),
    [
        (["--training.steps=0", "--optimizer.eps=1", "--zzz=1"], "UserError"),
        (
            [
                *MODEL,
                "--objective.name=future",
                "--training.dataset=pathstar",
                "--training.dataset_name=5x5",
                "--model.tokenizer_path=pathstar",
            ],
            "",
        ),
        (["--help"], ""),
        (["--print-config"], ""),
    ],
    ids=["mistakes", "none", "help", "print-config"],
)
def test_options_are_checked_before_anything_slow_is_loaded(folder: Path, words, failure):
    command = [sys.executable, "-c", LOADED, *words]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=60)
    assert failure in done.stderr and (done.returncode == 0) == (not failure), done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert loaded[0] == "loaded" and not SLOW & set(loaded)
