"""Options of a TOML file and a command line become values, and each mistake in them one line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame.config.help import write_config
from flame.config.schema import NAMED, JobConfig, Source
from flame.config.table import HELP, list_types
from flame.errors import UserError
from flame.objectives.future.options import FutureOptions
from flame.trainer.options import list_idle_options, read_options
from tests.support.options import MODEL, TABLE, list_values, read_mistakes
from tests.support.paths import REPO

KEYS = [key for key in TABLE.schemas if not key.startswith(tuple(NAMED))]


def _is_finite(key: str) -> bool:
    schema = TABLE.schemas[key]
    return "number" in list_types(schema) and "allows_infinity" not in schema


TINY = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


BAD_COMMAND_LINES = {
    "typo in key": (
        ["--training.stepz", "5"],
        ["training.stepz = 5 (command line): no such option, did you mean training.steps?"],
    ),
    "typo in section": (
        ["--trainin.steps=5"],
        ["trainin.steps = 5 (command line): no such option, did you mean training.steps?"],
    ),
    "wrong section": (
        ["--training.beta_1", "5", "--optimizer.decay_type", "sqrt"],
        [
            "training.beta_1 = 5 (command line): no such option, did you mean optimizer.beta1?",
            "optimizer.decay_type = sqrt (command line): no such option, did you mean lr_scheduler.decay_type?",
        ],
    ),
    "no section": (["--lr", "1"], ["lr = 1 (command line): no such option, did you mean optimizer.lr?"]),
    "no section, in several": (
        ["--warmup_steps=1"],
        [
            "warmup_steps = 1 (command line): no such option, did you mean lr_scheduler.warmup_steps or objective.warmup_steps "
            "or future_predictor.warmup_steps?"
        ],
    ),
    "hyphens": (
        ["--training.seq-len", "64"],
        ["training.seq-len = 64 (command line): no such option, did you mean training.seq_len?"],
    ),
    "nothing near": (["--zzzz"], ["zzzz (command line): no such option, --help lists all"]),
    "empty name": (["--=3"], ['"" = 3 (command line): no such option, --help lists all']),
    "text for int": (["--training.steps", "many"], ["training.steps = many (command line): allowed is an integer > 0"]),
    "float for int": (["--training.steps", "1e3"], ["training.steps = 1e3 (command line): allowed is an integer > 0"]),
    "int out of range": (["--training.steps", "0"], ["training.steps = 0 (command line): allowed is an integer > 0"]),
    "negative int": (["--training.num_workers", "-1"], ["training.num_workers = -1 (command line): allowed is an integer >= 0"]),
    "int below -1": (
        ["--training.data_parallel_shard_degree=-2"],
        ["training.data_parallel_shard_degree = -2 (command line): allowed is an integer >= -1"],
    ),
    "int too long": (
        ["--training.steps", "9223372036854775808"],
        ["training.steps = 9223372036854775808 (command line): allowed is an integer > 0, of at most 64 bits"],
    ),
    "text for float": (["--optimizer.lr", "fast"], ["optimizer.lr = fast (command line): allowed is a finite number > 0"]),
    "float out of range": (
        ["--optimizer.beta1", "1"],
        ["optimizer.beta1 = 1 (command line): allowed is a finite number >= 0 and < 1"],
    ),
    "nan": (
        ["--lr_scheduler.lr_min", "nan"],
        ["lr_scheduler.lr_min = nan (command line): allowed is a finite number >= 0 and <= 1"],
    ),
    "none for float": (
        ["--lr_scheduler.lr_min=none"],
        ["lr_scheduler.lr_min = none (command line): allowed is a finite number >= 0 and <= 1"],
    ),
    "optional": (
        ["--lr_scheduler.decay_ratio", "some"],
        ["lr_scheduler.decay_ratio = some (command line): allowed is a finite number >= 0 and <= 1 or none"],
    ),
    "int for bool": (["--training.compile", "1"], ["training.compile = 1 (command line): allowed is true or false"]),
    "other case for bool": (["--training.compile", "True"], ["training.compile = True (command line): allowed is true or false"]),
    "not a choice": (
        ["--lr_scheduler.decay_type", "cosin"],
        ['lr_scheduler.decay_type = cosin (command line): allowed is "linear" or "sqrt" or "cosine"'],
    ),
    "not UTF-8": (
        ["--job.description", "\udc80"],
        ['job.description = "\\udc80" (command line): allowed is text, in UTF-8'],
    ),
    "no value at the end": (["--training.steps"], ["training.steps = (value missing) (command line): allowed is an integer > 0"]),
    "no value before a flag": (
        ["--job.description", "--training.compile"],
        ["job.description = (value missing) (command line): allowed is text"],
    ),
    "empty value": (["--training.steps="], ['training.steps = "" (command line): allowed is an integer > 0']),
    "value of several lines": (
        ["--training.steps", "a\nb"],
        ['training.steps = "a\\nb" (command line): allowed is an integer > 0'],
    ),
    "given twice, the last wrong": (
        ["--training.steps", "200", "--training.steps=0"],
        ["training.steps = 0 (command line): allowed is an integer > 0"],
    ),
    "positional": (
        ["now", "--training.compile", "true", "again"],
        [
            "now (command line): stray argument, options are written --section.key value",
            "again (command line): stray argument, options are written --section.key value",
        ],
    ),
    "positional near an option": (
        ["training.steps=5"],
        ["training.steps=5 (command line): stray argument, did you mean --training.steps?"],
    ),
    "one dash": (["-lr=3"], ["-lr=3 (command line): stray argument, did you mean --optimizer.lr?"]),
    "one dash, and a value": (
        ["-training.steps", "3", "-lr", "--training.compile"],
        [
            "-training.steps (command line): stray argument, did you mean --training.steps?",
            "-lr (command line): stray argument, did you mean --optimizer.lr?",
        ],
    ),
    "one dash before a section": (
        ["-training"],
        ["-training (command line): stray argument, training is a section: its options are --training.key"],
    ),
    "a file under another name": (
        ["--config", "cont.toml", "--training.stepz=1"],
        [
            "config = cont.toml (command line): no such option, did you mean --job.config_file cont.toml?",
            "training.stepz = 1 (command line): no such option, did you mean training.steps?",
        ],
    ),
    "a file without its option": (
        ["a b.toml", "--sources.web.weight=2"],
        ['"a b.toml" (command line): stray argument, did you mean --job.config_file "a b.toml"?'],
    ),
    "a file after an equals sign": (
        ["job.config_file=run.toml"],
        ["job.config_file=run.toml (command line): stray argument, did you mean --job.config_file run.toml?"],
    ),
    "two files": (
        ["--job.config_file", "none.toml", "other.toml"],
        [
            "job.config_file = none.toml (command line): not a readable TOML file: No such file or directory",
            "other.toml (command line): stray argument, options are written --section.key value",
        ],
    ),
    "a command": (["--dryrun"], ["dryrun (command line): no such option, did you mean --dry-run?"]),
    "a command with a value": (["--estimate=8"], ["estimate = 8 (command line): no such option, did you mean --estimate?"]),
    "a command without dashes": (["print_config"], ["print_config (command line): stray argument, did you mean --print-config?"]),
    "two dashes": (["--"], ["-- (command line): stray argument, options are written --section.key value"]),
    "no such file": (
        ["--job.config_file", "none.toml"],
        ["job.config_file = none.toml (command line): not a readable TOML file: No such file or directory"],
    ),
    "file is a folder": (
        ["--job.config_file", "."],
        ["job.config_file = . (command line): not a readable TOML file: Is a directory"],
    ),
    "conflict": (
        ["--training.context_len", "9000"],
        [
            "training.context_len = 9000 is more than training.seq_len = 8192: "
            "a chunk of a document must fit in a packed sequence; lower the one or raise the other"
        ],
    ),
    "more tokens than a document has": (
        ["--objective.name", "mtp", "--mtp.tokens", "8", "--training.context_len", "8"],
        [
            "mtp.tokens = 8 leaves the last head no token to predict: it must be less than training.context_len = 8",
        ],
    ),
    "an empty bag": (
        ["--objective.name", "fsp_bow", "--fsp_bow.window", "1"],
        [
            "fsp_bow.window = 1: the bag holds the tokens after the next one, up to that many ahead: set it to 2 or more, or to "
            "0 for all up to the end of the document"
        ],
    ),
    "conflict with the machine": (
        ["--training.data_parallel_shard_degree", "0"],
        ["training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more"],
    ),
    "unknown name beside a conflict": (
        ["--training.x.y", "1", "--training.data_parallel_shard_degree=0"],
        [
            "training.x.y = 1 (command line): no such option, --help lists all",
            "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more",
        ],
    ),
    "wrong value in a conflict": (
        ["--training.seq_len=1k", "--training.context_len", "9000", "--training.data_parallel_shard_degree=0"],
        [
            "training.seq_len = 1k (command line): allowed is an integer > 0",
            "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more",
        ],
    ),
    "several at once": (
        [
            "go",
            "--lrr",
            "1",
            "--training.steps",
            "--optimizer.lr",
            "-1",
            "--training.compile=maybe",
            "--training.num_streams",
            "7",
        ],
        [
            "go (command line): stray argument, options are written --section.key value",
            "lrr = 1 (command line): no such option, did you mean optimizer.lr?",
            "training.steps = (value missing) (command line): allowed is an integer > 0",
            "optimizer.lr = -1 (command line): allowed is a finite number > 0",
            "training.compile = maybe (command line): allowed is true or false",
            "training.num_streams = 7 is not a multiple of ranks x workers = 2 x 1: "
            "a run with 7 streams goes on with 1 or 7 ranks; for a new run set num_streams to a multiple of 2, such as 14, "
            "which also serves 1, 7 and 14 ranks",
        ],
    ),
}


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_names_each_mistake_on_the_command_line(case: str, folder: Path) -> None:
    argv, lines = BAD_COMMAND_LINES[case]
    world_size = 2 if case == "several at once" else 1
    assert read_mistakes([*MODEL, *argv], world_size) == lines


BAD_FILES = {
    "typo in key": (
        "[optimizer]\nlearning_rate = 1",
        ["optimizer.learning_rate = 1 (run.toml): no such option, --help lists all"],
    ),
    "typo in section": ("[optimiser]\nlr = 1.0", ["optimiser.lr = 1.0 (run.toml): no such option, did you mean optimizer.lr?"]),
    "no section": ("lr = 1.0", ["lr = 1.0 (run.toml): no such option, did you mean optimizer.lr?"]),
    "quoted section and key": (
        '"optimizer.lr" = 1.0',
        ['"optimizer.lr" = 1.0 (run.toml): no such option, did you mean optimizer.lr?'],
    ),
    "empty unknown section": ("[empty]", ["empty = {} (run.toml): no such option, --help lists all"]),
    "value for a section": (
        "training = 3",
        ["training = 3 (run.toml): no such option, training is a section: its options are training.key"],
    ),
    "table for a value": ("[training.steps]\na = 1", ['training.steps = {"a": 1} (run.toml): allowed is an integer > 0']),
    "date for text": ("[job]\ndescription = 2020-01-01", ['job.description = "2020-01-01" (run.toml): allowed is text']),
    "int for text": ("[job]\ndescription = 3", ["job.description = 3 (run.toml): allowed is text"]),
    "text for int": ('[training]\nsteps = "9"', ['training.steps = "9" (run.toml): allowed is an integer > 0']),
    "float for int": ("[training]\nsteps = 9.0", ["training.steps = 9.0 (run.toml): allowed is an integer > 0"]),
    "bool for int": ("[training]\nsteps = true", ["training.steps = true (run.toml): allowed is an integer > 0"]),
    "bool for float": ("[optimizer]\nlr = true", ["optimizer.lr = true (run.toml): allowed is a finite number > 0"]),
    "inf for float": ("[optimizer]\nlr = inf", ["optimizer.lr = inf (run.toml): allowed is a finite number > 0"]),
    "int for bool": ("[training]\ncompile = 1", ["training.compile = 1 (run.toml): allowed is true or false"]),
    "text for bool": ('[training]\ncompile = "true"', ['training.compile = "true" (run.toml): allowed is true or false']),
    "list for choice": (
        '[activation_checkpoint]\nmode = ["full"]',
        ['activation_checkpoint.mode = ["full"] (run.toml): allowed is "none" or "pointwise" or "selective" or "full"'],
    ),
    "file names a file": ('[job]\nconfig_file = "a"', ['job.config_file = "a" (run.toml): allowed only on the command line']),
    "long value": (
        "[training]\nsteps = [" + "1, " * 99 + "]",
        [f"training.steps = [{'1, ' * 33}... (run.toml): allowed is an integer > 0"],
    ),
    "several at once": (
        "lr = 1\n[training]\nsteps = 0\nsed = 3\ncontext_len = 9000",
        [
            "lr = 1 (run.toml): no such option, did you mean optimizer.lr?",
            "training.steps = 0 (run.toml): allowed is an integer > 0",
            "training.sed = 3 (run.toml): no such option, did you mean training.seed?",
            "training.context_len = 9000 is more than training.seq_len = 8192: "
            "a chunk of a document must fit in a packed sequence; lower the one or raise the other",
        ],
    ),
    "not TOML": (
        "[training]\nsteps = 3\nseed 4\n",
        [
            "job.config_file = run.toml (command line): not a readable TOML file: "
            "Expected '=' after a key in a key/value pair (at line 3, column 6)"
        ],
    ),
    "unfinished TOML": (
        "[training]\nsteps =",
        ["job.config_file = run.toml (command line): not a readable TOML file: Invalid value (at line 2, the end)"],
    ),
    "key twice": (
        "[training]\nsteps = 3\nsteps = 4\n",
        ["job.config_file = run.toml (command line): not a readable TOML file: Cannot overwrite a value (at line 3, column 10)"],
    ),
    "not UTF-8": ("# \n# \udcff", ["job.config_file = run.toml (command line): not a readable TOML file: not UTF-8 (at line 2)"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_names_each_mistake_in_the_file(case: str, folder: Path) -> None:
    toml, lines = BAD_FILES[case]
    (folder / "run.toml").write_bytes(toml.encode(errors="surrogateescape"))
    assert read_mistakes(["--job.config_file", "run.toml", *MODEL]) == lines


def test_an_unreadable_file_is_not_followed_by_what_it_may_have_set(folder: Path) -> None:
    """Without the file there is no telling whether model.config is set."""
    assert len(read_mistakes(["--job.config_file", "none.toml"])) == 1


def test_a_mistake_in_the_file_is_named_though_overridden(folder: Path) -> None:
    (folder / "run.toml").write_text('[training]\ndata_parallel_shard_degree = "all"\n')
    lines = read_mistakes(["--job.config_file", "run.toml", *MODEL, "--training.data_parallel_shard_degree", "0"])
    assert lines == [
        'training.data_parallel_shard_degree = "all" (run.toml): allowed is an integer >= -1',
        "training.data_parallel_shard_degree = 0: allowed are -1 (all remaining ranks) and 1 or more",
    ]


def test_a_missing_value_is_not_followed_by_what_it_may_have_set(folder: Path) -> None:
    assert read_mistakes(["--job.config_file"]) == ["job.config_file = (value missing) (command line): allowed is text"]
    assert read_mistakes(["--model.config", *MODEL[2:]]) == ["model.config = (value missing) (command line): allowed is text"]
    assert len(read_mistakes([*MODEL, "--lr_scheduler.decay_ratio"])) == 1


@pytest.mark.parametrize("value", ["", "**x", "~nobody/x", "a" * 300, "a\0b", "a\nb"])
def test_texts_that_cannot_be_paths_are_mistakes_of_one_line(value: str, folder: Path) -> None:
    argv = ["--training.dataset=text", f"--training.data_files={value}", f"--model.config=./{value}.json"]
    lines = read_mistakes([*argv, "--model.tokenizer_path=bytes"])
    assert len(lines) == 2
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("key", [key for key in KEYS if _is_finite(key)])
def test_no_number_may_be_infinite(key: str, folder: Path) -> None:
    (line,) = read_mistakes([*MODEL, f"--{key}=inf"])
    assert line.startswith(f"{key} = inf (command line): allowed is a finite number")


def test_command_line_wins_over_file_wins_over_default(folder: Path) -> None:
    (folder / "run.toml").write_text('[model]\nconfig = "m.json"\ntokenizer_path = "bytes"\n[training]\nsteps = 200\nseed = 1\n')
    config = read_options(["--job.config_file", "run.toml", "--training.seed=2"], 1)
    assert (config.training.seed, config.training.steps, config.training.seq_len) == (2, 200, 8192)
    config.training.seed, config.training.steps = 42, 1000
    config.job.config_file, config.model.config, config.model.tokenizer_path = "", "", ""
    assert config == JobConfig()


def test_words_become_values_of_the_options_type(folder: Path) -> None:
    argv = "--job.description 10 --training.compile --checkpoint.export_hf false --optimizer.lr 3 --optimizer.weight_decay=1e-4"
    argv += " --training.data_parallel_shard_degree -1 --lr_scheduler.decay_ratio none --job.dump_folder -x --training.seed=7"
    config = read_options([*MODEL, *argv.split(), "--metrics.enable_wandb"], 1)
    found = (
        config.job.description,
        config.training.compile,
        config.checkpoint.export_hf,
        config.optimizer.lr,
        config.optimizer.weight_decay,
        config.training.data_parallel_shard_degree,
        config.lr_scheduler.decay_ratio,
        config.job.dump_folder,
        config.training.seed,
        config.metrics.enable_wandb,
    )
    assert repr(found) == repr(("10", True, False, 3.0, 1e-4, -1, None, "-x", 7, True))
    assert repr(read_options([*MODEL, "--lr_scheduler.decay_ratio", "1"], 1).lr_scheduler.decay_ratio) == "1.0"


@pytest.mark.parametrize("first", ["200", "wrong"])
def test_of_a_flag_given_twice_the_last_wins(first: str, folder: Path) -> None:
    words = ["--training.steps", first, "--training.steps=300"]
    (folder / "run.toml").write_text("[training]\nsteps = 100\n")
    assert read_options([*MODEL, *words], 1).training.steps == 300
    assert read_options([*words, *MODEL, "--job.config_file=run.toml"], 1).training.steps == 300


def test_of_two_files_the_last_is_read(folder: Path) -> None:
    (folder / "one.toml").write_text("[training]\nsteps = 1\nno_such = 2\n")
    (folder / "two.toml").write_text("[training]\nseed = 2\n")
    training = read_options([*MODEL, "--job.config_file=one.toml", "--job.config_file=two.toml"], 1).training
    assert (training.steps, training.seed) == (1000, 2)


@pytest.mark.parametrize("value", ["0", "inf", "0.0", "1e400", "2"])
def test_gradients_may_be_clipped_to_any_norm_or_not_at_all(value: str, folder: Path) -> None:
    assert read_options([*MODEL, f"--training.max_norm={value}"], 1).training.max_norm == float(value)


@pytest.mark.parametrize("value", ["-1", "-inf", "nan", "none"])
def test_other_norms_are_refused(value: str, folder: Path) -> None:
    (line,) = read_mistakes([*MODEL, f"--training.max_norm={value}"])
    assert line.startswith(f"training.max_norm = {value} (command line): allowed is a number, inf included, >= 0")


def test_options_of_one_run_do_not_reach_the_next(folder: Path) -> None:
    read_options([*MODEL, "--training.seed", "7"], 1)
    assert read_options(MODEL, 1).training.seed == 42


# Text without lone surrogates, and with every control character.
TEXTS = st.text(st.characters(codec="utf-8"))


@TINY
@given(
    description=TEXTS,
    separator=TEXTS,
    dataset=st.from_regex(r"[a-z]{2,9}/[a-z]{2,9}", fullmatch=True),
    objective=st.sampled_from([None, "next_token", "future", "mtp"]),
    max_norm=st.floats(min_value=0),
    temperature=st.floats(0, 1, exclude_min=True),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    decay_ratio=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
    compile=st.booleans(),
    mode=st.sampled_from(["none", "pointwise", "selective", "full"]),
)
def test_a_written_configuration_reads_back(folder: Path, mode: Any, **values: Any) -> None:
    config = read_options(MODEL, 1)
    config.job.description, config.training.dataset = values["description"], values["dataset"]
    config.training.answer_separator, config.training.max_norm = values["separator"], values["max_norm"]
    config.objective.name = values["objective"]
    config.get(FutureOptions).temperature = values["temperature"]
    config.optimizer.lr, config.lr_scheduler.decay_ratio = values["lr"], values["decay_ratio"]
    config.training.seed, config.activation_checkpoint.mode = values["seed"], mode
    config.training.compile = values["compile"] or mode in ("pointwise", "selective")
    config.job.config_file = "other\n.toml"
    write_config(config, folder / "resolved.toml")
    back = read_options(["--job.config_file", "resolved.toml"], 1)
    assert list_values(back) == list_values(replace(config, job=replace(config.job, config_file="resolved.toml")))
    assert math.copysign(1, back.lr_scheduler.decay_ratio or 0) == math.copysign(1, config.lr_scheduler.decay_ratio or 0)


def test_every_control_character_survives(folder: Path) -> None:
    config = read_options(MODEL, 1)
    config.job.description = "".join(map(chr, range(256))) + "\u2028\ufeff\U0001f600"
    write_config(config, folder / "resolved.toml")
    assert read_options(["--job.config_file", "resolved.toml"], 1).job.description == config.job.description


RUNS = sorted(set(REPO.glob("configs/*.toml")) - set(REPO.glob("configs/compare_*.toml")))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert read_options(["--job.config_file", str(path)], 1).job.config_file == str(path)


FLAGS = st.sampled_from(KEYS).map("--{}".format)
WORDS = st.one_of(
    FLAGS,
    st.tuples(FLAGS, st.text(max_size=8)).map("=".join),
    st.sampled_from(
        ["-1", "--", "none", "true", "1e400", "m.json", "-", "--x.y", "text", "bytes", "9" * 5000, "a" * 300, "\0", "\udcff"]
    ),
    st.text(max_size=8).filter(lambda word: word.partition("=")[0] not in HELP),
)


@TINY
@given(argv=st.lists(WORDS, max_size=12), world_size=st.integers(1, 64))
def test_junk_is_a_mistake_and_no_crash(folder: Path, argv: list[str], world_size: int) -> None:
    try:
        read_options(argv, world_size)
    except UserError as error:
        assert error.lines
        assert not any("\n" in line for line in error.lines)


@pytest.mark.parametrize("key", ["profiling.trace_steps", "profiling.memory_steps", "profiling.ranks"])
def test_numbers_of_thousands_of_digits_are_a_mistake_and_no_crash(key: str) -> None:
    """Python does not read them."""
    with pytest.raises(UserError) as caught:
        read_options([f"--{key}={'9' * 5000}", "--model.config=m.json"], 1)
    assert any(line.startswith(key) for line in caught.value.lines)


TEXT_SAMPLES = (
    "x",
    "bytes",
    "json",
    "text",
    "tokens",
    "pathstar",
    "siblings",
    "owner/name",
    "a/b/c",
    "m.json",
    "no.py",
    "\u0661",
)
PATH_SAMPLES = (".", "..", "/", "~no_such_user/x", "*", "[", ",", ",,", "rows.jsonl", "step-3", "5x5", "0x0")
NUMBER_SAMPLES = ("none", "nan", "inf", "-inf", "-1", "0", "1", "2", "7", "1e400", "true", "false")
OBJECTIVES = ("future", "mtp", "mtp_sequential", "top", "fsp_bow", "fsp_revlm", "nitp", "nextlat", "regret", "stp")
CHOICE_SAMPLES = (*OBJECTIVES, "next_token", "local", "infonce", "Muon", "bfloat16", "fp8", "async")
SAMPLES = (*TEXT_SAMPLES, *PATH_SAMPLES, *NUMBER_SAMPLES, *CHOICE_SAMPLES)
CHANGES = st.dictionaries(st.sampled_from([*TABLE.schemas]), st.sampled_from(SAMPLES), min_size=1, max_size=3)


@settings(TINY, max_examples=300)
@given(values=CHANGES, world_size=st.integers(1, 4))
def test_any_values_are_mistakes_of_a_line_each_or_a_run_that_reads_back(
    folder: Path, values: dict[str, str], world_size: int
) -> None:
    try:
        job = read_options([*MODEL, *(f"--{key}={value}" for key, value in values.items())], world_size)
    except UserError as error:
        assert error.lines and all(line.isprintable() for line in error.lines)
        assert len(set(error.lines)) == len(error.lines)
        return
    assert set(list_idle_options(job)) <= set(values)
    write_config(job, folder / "resolved.toml")
    back, job.job.config_file = read_options(["--job.config_file=resolved.toml"], world_size), "resolved.toml"
    assert list_values(back) == list_values(job)


@TINY
@given(
    content=st.binary(max_size=20)
    | st.lists(st.sampled_from(["[training]", "[[training]]", "steps=", "seed=", "1", '"a"', "{}", "\n"]))
)
def test_junk_files_are_mistakes_and_no_crash(folder: Path, content: bytes | list[str]) -> None:
    (folder / "run.toml").write_bytes(content if isinstance(content, bytes) else "".join(content).encode())
    try:
        read_options(["--job.config_file", "run.toml", *MODEL], 1)
    except UserError as error:
        assert not any("\n" in line for line in error.lines)


@pytest.mark.parametrize("toml", ["x = " + "[" * 100000, "x = " + "9" * 5000, "x = 0x" + "f" * 5000])
def test_extreme_files_are_mistakes(toml: str, folder: Path) -> None:
    (folder / "run.toml").write_text(toml)
    assert len(read_mistakes(["--job.config_file", "run.toml", *MODEL])) == 1


def test_sources_are_tables_and_options(folder: Path) -> None:
    (folder / "mix.toml").write_text(
        '[sources.web]\ndataset = "text"\ndata_files = "m.json"\nweight = 3\n[sources.code]\ndataset = "stdlib"\nweight = 1.5\n'
    )
    config = read_options([*MODEL, "--job.config_file", "mix.toml", "--sources.code.weight", "0.5"], 1)
    assert config.sources == {"web": Source(dataset="text", data_files="m.json", weight=3.0), "code": Source(weight=0.5)}
    assert list(config.corpora) == ["sources.code", "sources.web"]
    write_config(config, folder / "again.toml")
    assert read_options(["--job.config_file", "again.toml"], 1).sources == config.sources


def test_mistakes_in_sources_are_named(folder: Path) -> None:
    (folder / "mix.toml").write_text(
        '[sources.web]\nwieght = 3\ndataset = "tokens"\ntext_column = "body"\n[sources.none]\n[sources."a b"]\nweight = 1\n'
    )
    options = ["--sources.x.weight", "-1", "--training.dataset", "json", "--sources.wbe.weight=2"]
    options += ["--sources.code.streaming", "--sources.code.dataset=stdlib", "--sources.code.weight=1e-9"]
    assert read_mistakes([*MODEL, "--job.config_file", "mix.toml", *options]) == [
        "sources.web.wieght = 3 (mix.toml): no such option, did you mean sources.web.weight?",
        "sources.none = {} (mix.toml): an empty source, give at least its dataset",
        'sources."a b".weight = 1 (mix.toml): no such option, did you mean sources.NAME.weight?',
        "sources.x.weight = -1 (command line): allowed is a finite number >= 0",
        "sources.x.dataset is not set: name the corpus of this source",
        "sources.wbe.dataset is not set: did you mean sources.web?",
        'training.dataset = "json" beside [sources.NAME]: move it into a source of its own',
        "sources.code.weight = 1e-09 is less than a millionth of the largest, 2: raise it, or set it to 0 to draw nothing",
        'sources.web.dataset = "tokens" needs sources.web.data_files (a folder of flame-preprocess, or token files)',
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sources.my-web.wieght", "sources.my-web.weight"),
        ("sources.web.num-documents", "held_out.NAME.num_documents"),
        ("held_out.books.datset", "held_out.books.dataset"),
        ("source.web.weight", "sources.NAME.weight"),
    ],
)
def test_a_slip_in_a_named_table_is_put_right_there(folder: Path, key: str, meant: str) -> None:
    assert f"{key} = 3 (command line): no such option, did you mean {meant}?" in read_mistakes([*MODEL, f"--{key}=3"])


@pytest.mark.parametrize("words", [["--config", "run.toml"], ["run.toml"], ["--job.config", "run.toml"]])
def test_a_file_that_is_not_read_is_the_only_mistake(folder: Path, words: list[str]) -> None:
    """No line says that what is in it is not set."""
    (line,) = read_mistakes(words)
    assert line.endswith(", did you mean --job.config_file run.toml?")


def test_two_commands_are_a_mistake(folder: Path) -> None:
    assert read_mistakes([*MODEL, "--dry-run", "--estimate", "8"]) == ["--estimate and --dry-run are commands: give one of them"]
    assert read_mistakes([*MODEL, "--dry-run", "--print-config", "--estimate"]) == [
        "--print-config and --estimate and --dry-run are commands: give one of them"
    ]


@pytest.mark.parametrize(("value", "line"), [("compile = True", 2), ("dataset = json", 2), ("steps = None", 2)])
def test_a_value_that_is_no_toml_says_what_is(folder: Path, value: str, line: int) -> None:
    (folder / "run.toml").write_text(f"[training]\n{value}\n")
    (mistake,) = read_mistakes(["--job.config_file", "run.toml"])
    assert f"Invalid value (at line {line}, column " in mistake and mistake.endswith(
        "): texts need quotes, booleans are true and false"
    )


def test_validation_needs_held_out_documents(folder: Path) -> None:
    (line,) = read_mistakes([*MODEL, "--validation.interval", "5"])
    assert line.startswith("validation.interval = 5 without held-out documents: set validation.dataset, or")
    (line,) = read_mistakes([*MODEL, "--validation.dataset", "stdlib", "--validation.holdout_every", "9"])
    assert "both name a held-out set" in line
    (line,) = read_mistakes([*MODEL, "--validation.holdout_every", "1"])
    assert "leaves nothing to train on" in line
    assert read_options([*MODEL, "--validation.interval", "5", "--validation.holdout_every", "9"], 1).validation.interval == 5


def test_an_empty_section_is_no_mistake(folder: Path) -> None:
    (folder / "empty.toml").write_text("[metrics]\n# log_freq = 1\n")
    assert read_options([*MODEL, "--job.config_file", "empty.toml"], 1).metrics == JobConfig().metrics


def test_a_file_is_no_run_folder(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "run").mkdir()
    (folder / "run" / "checkpoint").touch()
    assert read_mistakes([*MODEL, "--job.dump_folder", "file"]) == [
        'job.dump_folder = "file": "file" is not a folder; choose another name'
    ]
    assert read_mistakes([*MODEL, "--job.dump_folder", "run"]) == [
        'job.dump_folder = "run": "run/checkpoint" is not a folder; choose another name'
    ]


def test_a_temperature_below_the_learnable_ones_is_refused(folder: Path) -> None:
    options = ["--objective.name=future", "--future_encoder.temperature=0.005", "--future_encoder.learnable_temperature"]
    (line,) = read_mistakes([*MODEL, *options])
    assert line.startswith("future_encoder.temperature = 0.005 is below 0.01, the lowest that")
    assert read_options([*MODEL, *options[:-1]], 1).get(FutureOptions).temperature == 0.005


@pytest.mark.parametrize(
    ("ranks", "options", "advice"),
    [
        (
            56,
            [],
            "a run with 192 streams goes on with 8, 12, 16, 24, 32, 48, 64 or 96 ranks; for a new run set num_streams to a ",
        ),
        (7, ["--training.num_streams=6"], "1, 2, 3 or 6 ranks; for a new run set num_streams to a multiple of 7, such as 42, "),
        (64, ["--training.num_workers=2"], "set training.num_workers to 1 or 3"),
        (6, ["--training.num_workers=7"], "set training.num_workers to 1, 2, 4, 8, 16 or 32"),
    ],
)
def test_the_numbers_of_ranks_that_can_go_on_are_named(folder: Path, ranks, options, advice):
    (line,) = read_mistakes([*MODEL, *options], world_size=ranks)
    assert advice in line
