"""Read a run's options from a TOML file and the command line, and name every mistake at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flame.config.renamed import explain_absence
from flame.config.schema import NAMED, JobConfig, name_any
from flame.config.table import OptionTable, format_toml, list_types, name_table
from flame.config.toml_file import read_toml
from flame.config.training import LENGTHS, Training
from flame.config.types import Section
from flame.errors import UserError

COMMAND_LINE = "command line"
JOB = "job"
CONFIG_FILE = f"{JOB}.config_file"
OBJECTIVE_NAME = "objective.name"
NO_OPTION = ", options are written --section.key value"
LONGEST_SHOWN_VALUE = 100


FindExtensions = Callable[[Mapping[str, Any]], tuple[dict[str, type[Section]], list[str]]]
"""(values as typed, by key) -> the sections of objectives and data sources, by name, and a line for each fault."""
FindConflicts = Callable[[JobConfig], Iterator[str]]


@dataclass(frozen=True)
class _Setting:
    """One option as the user gave it: dotted key, value, the value as typed, and where it stands."""

    key: str
    value: Any
    shown: str
    source: str

    def __str__(self) -> str:
        return f"{self.key or json.dumps(self.key)} = {self.shown} ({self.source})"


def parse_config(
    argv: list[str], world_size: int, find_extensions: FindExtensions, find_conflicts: FindConflicts
) -> tuple[JobConfig, OptionTable]:
    """Resolve the options of a run: defaults < TOML file (`--job.config_file`) < command line, where the last one wins.

    Args:
        argv: command line without the program's name.
        world_size: processes of the run over all machines.
        find_extensions: says which sections there are beside the ones that every run has.
        find_conflicts: yields one line for each rule that is broken.

    Raises:
        UserError: one line for each mistake in the file, on the command line and between options.
    """
    words, strays = _split_words(argv)
    filed, faults = _read_named_file(words)
    typed = {setting.key: setting.value for setting in [*filed, *words]}
    extensions, extension_faults = find_extensions(typed)
    table = OptionTable(extensions)
    meant_files = [] if CONFIG_FILE in typed else _find_meant_files(words, strays, table)
    is_complete = not (faults or meant_files)  # of what another file says nothing is known
    faults += extension_faults
    faults += [
        f"{_show_text(word)} ({COMMAND_LINE}): stray argument"
        + (_suggest_file(path) if (path := _find_path(word)) in meant_files else _suggest_option(word, table))
        for word in strays
    ]

    job = JobConfig(world_size=world_size)
    is_valid: dict[str, bool] = {}
    for setting in [*filed, *(_convert(word, table) for word in words)]:
        fault = _apply(job, setting, table, meant_files, typed.get(OBJECTIVE_NAME))
        is_valid[setting.key] = fault is None
        if fault:
            faults.append(fault)
    job.typed = frozenset(is_valid) - _replace_lengths(job, [word.key for word in words])
    if is_complete and is_valid.get(CONFIG_FILE, True):
        for head in NAMED:
            faults.extend(_find_unnamed_corpora(head, getattr(job, head), is_valid))
        wrong_keys = [key for key, valid in is_valid.items() if not valid]
        faults.extend(line for line in find_conflicts(job) if not any(_mentions(line, key) for key in wrong_keys))
    if faults:
        raise UserError(*dict.fromkeys(faults))  # a file that cannot be loaded is met twice
    return job, table


def list_typed(argv: list[str]) -> dict[str, Any]:
    """What the file and the command line set, right or wrong, by key."""
    words, _ = _split_words(argv)
    return {setting.key: setting.value for setting in [*_read_named_file(words)[0], *words]}


def _split_words(argv: list[str]) -> tuple[list[_Setting], list[str]]:
    """The settings on a command line, of each key the last, as text (None for a flag without a value); and all that is none."""
    settings: dict[str, _Setting] = {}
    strays = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not token.startswith("--") or token == "--":
            if re.fullmatch(r"-[A-Za-z][^=]*", token) and position < len(argv) and not argv[position].startswith("-"):
                # It is meant as an option, and this is its value. A file says more than a slip in its option.
                token = argv[position] if _is_toml(argv[position]) else token
                position += 1
            strays.append(token)
            continue
        key, equals, text = token.removeprefix("--").partition("=")
        given: str | None = text if equals else None
        # A value may begin with one dash (-1), an option begins with two.
        if given is None and position < len(argv) and not argv[position].startswith("--"):
            given = argv[position]
            position += 1
        settings.pop(key, None)
        settings[key] = _Setting(key, given, "" if given is None else _show_text(given), COMMAND_LINE)
    return list(settings.values()), strays


def _find_meant_files(words: list[_Setting], strays: list[str], table: OptionTable) -> list[str]:
    """TOML files that stand under no option, or under one that there is not."""
    found = [word.value for word in words if word.key.rpartition(".")[0] in ("", JOB) and table.find(word.key) is None]
    return [value for value in (*map(_find_path, strays), *found) if value is not None and _is_toml(value)]


def _find_path(stray: str) -> str:
    """What stands for a file in a stray word such as `run.toml`, `config_file=run.toml` or `-c=run.toml`."""
    key, _, value = stray.lstrip("-").partition("=")
    return value if value and (len(key) == 1 or "config" in key) else stray


def _suggest_option(stray: str, table: OptionTable) -> str:
    return table.suggest(stray.partition("=")[0], NO_OPTION, dashes="--")


def _suggest_file(path: str) -> str:
    return f", did you mean --{CONFIG_FILE} {_show_text(path)}?"


def _is_toml(text: str) -> bool:
    return text.endswith(".toml") and "=" not in text


def _convert(word: _Setting, table: OptionTable) -> _Setting:
    """A setting from the command line with a value of the option's type. What is not of that type stays text, to be refused."""
    schema = table.find(word.key)
    if schema is None:
        return word
    types = list_types(schema)
    if word.value is None:
        # No option takes a tuple, so a missing value is refused like any wrong one.
        value, shown = (True, "true") if types == {"boolean"} else ((), "(value missing)")
        return _Setting(word.key, value, shown, COMMAND_LINE)
    return _Setting(word.key, _convert_text(word.value, types), word.shown, COMMAND_LINE)


def _convert_text(text: str, types: set[str]) -> Any:
    if "null" in types and text == "none":
        return None
    try:
        if "integer" in types:
            return int(text)
        if "number" in types:
            return float(text)
    except ValueError:
        return text
    return {"true": True, "false": False}.get(text, text) if "boolean" in types else text


def _read_named_file(words: list[_Setting]) -> tuple[list[_Setting], list[str]]:
    """The settings of the TOML file that the command line names, or the line that says why it cannot be read."""
    for word in words:
        if word.key == CONFIG_FILE and word.value:
            try:
                return _read_file(word.value), []
            except (OSError, ValueError, RecursionError) as error:
                return [], [f"{word}: not a readable TOML file: {getattr(error, 'strerror', None) or error}"]
    return [], []


def _read_file(path: str) -> list[_Setting]:
    """List the settings of a TOML file.

    Raises:
        OSError, ValueError, RecursionError: the file cannot be read as TOML; the message names the line where there is one.
    """
    tree = read_toml(path)
    tables = [(_show_key(section), options) for section, options in tree.items() if section not in NAMED]
    for head in NAMED:
        named = tree.get(head, {})
        if isinstance(named, dict):
            tables += [(f"{head}.{_show_key(name)}", options) for name, options in named.items()]
        else:
            tables.append((head, named))
    settings: list[_Setting] = []
    for section, options in tables:
        if isinstance(options, dict) and options:
            named = {f"{section}.{_show_key(key)}": value for key, value in options.items()}
        else:
            named = {section: options}
        settings.extend(_Setting(key, value, _shorten(format_toml(value)), path) for key, value in named.items())
    return settings


def _apply(job: JobConfig, setting: _Setting, table: OptionTable, meant_files: Collection[str], objective: Any) -> str | None:
    """Set the option in `job` and return None, or leave it as it is and return the line that says why.

    Args:
        meant_files: of `_find_meant_files`.
        objective: `objective.name` as typed.
    """
    if setting.value == {} and name_table(setting.key) in table.sections:
        is_corpus = name_table(setting.key) in map(name_any, NAMED)
        return f"{setting}: an empty source, give at least its dataset" if is_corpus else None
    if table.find(setting.key) is None:
        shown = setting if setting.shown else f"{_show_text(setting.key)} ({setting.source})"
        advice = _suggest_file(setting.value) if setting.value in meant_files else table.suggest(setting.key)
        return f"{shown}: {explain_absence(setting.key, objective, table.schemas) or 'no such option' + advice}"
    if setting.key == CONFIG_FILE and setting.source != COMMAND_LINE:
        return f"{setting}: allowed only on the command line"
    allowed = table.set(job, setting.key, setting.value)
    return None if allowed is None else f"{setting}: allowed is {allowed}"


def _replace_lengths(job: JobConfig, on_command_line: Collection[str]) -> set[str]:
    """Unset what the file says of how long to train, if the command line says it, too; return the keys."""
    given = [name for name in LENGTHS if f"training.{name}" in on_command_line and getattr(job.training, name) is not None]
    replaced = set(LENGTHS) - set(given) if given else set()
    for name in replaced:
        setattr(job.training, name, getattr(Training, name))
    return {f"training.{name}" for name in replaced}


def _find_unnamed_corpora(head: str, tables: Collection[str], given: Mapping[str, bool]) -> Iterator[str]:
    """A table whose corpus nobody has named is a slip of the pen in another one's name."""
    for name in tables:
        if f"{head}.{name}.dataset" not in given:
            others = difflib.get_close_matches(name, [other for other in tables if other != name], n=1)
            advice = f"did you mean {head}.{others[0]}?" if others else "name the corpus of this source"
            yield f"{head}.{name}.dataset is not set: {advice}"


def _mentions(line: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w])", line) is not None


def _show_text(text: str) -> str:
    """A word from the command line, quoted where it would not stand out as one."""
    is_plain = text.isprintable() and text and " " not in text
    return _shorten(text if is_plain else json.dumps(text))


def _show_key(key: str) -> str:
    """A key as TOML writes it: a quoted `"a.b"` is not section a, key b."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN_VALUE else f"{text[:LONGEST_SHOWN_VALUE]}..."
