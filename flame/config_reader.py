"""Read a run's options from a TOML file and the command line, name every mistake at once, and write them back as TOML."""

from __future__ import annotations

import difflib
import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import tomli
from pydantic import TypeAdapter, ValidationError

from flame.config import JobConfig, Source
from flame.config_conflicts import find_conflicts
from flame.errors import UserError

COMMAND_LINE = "command line"
CONFIG_FILE = "job.config_file"
LONGEST_SHOWN_VALUE = 100

SOURCES = "sources"
ANY_SOURCE = f"{SOURCES}.NAME"  # stands for each table [sources.*] in help and suggestions

# Options of other trainers that are known and declined: what a key speaks of, and why this trainer does not do it.
_DECLINED = {
    "tensor_parallel": "the layers of any architecture are taken whole",
    "expert_parallel": "the layers of any architecture are taken whole",
    "context_parallel": "the anti-causal pass needs whole documents on one rank",
    "pipeline_parallel": "the causal and the anti-causal pass of a step meet in one loss on each rank",
}

_SECTIONS: dict[str, type] = {
    ANY_SOURCE if name == SOURCES else name: Source if name == SOURCES else section
    for name, section in get_type_hints(JobConfig).items()
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(section) for name, section in _SECTIONS.items()}
_SCHEMAS: dict[str, dict[str, Any]] = {
    f"{name}.{key}": schema for name, adapter in _ADAPTERS.items() for key, schema in adapter.json_schema()["properties"].items()
}


@dataclass(frozen=True)
class _Setting:
    """One option as the user gave it: dotted key, converted value, the value as typed, and where it stands."""

    key: str
    value: Any
    shown: str
    source: str

    def __str__(self) -> str:
        return f"{self.key} = {self.shown} ({self.source})"


def read_config(argv: list[str], world_size: int) -> JobConfig:
    """Resolve the options of a run: defaults < TOML file (`--job.config_file`) < command line.

    Args:
        argv: command line without the program's name. `--help` or `-h` in it prints all options and exits with 0.
        world_size: processes of the run over all nodes.

    Raises:
        UserError: one line for each mistake in the file, on the command line and between options.
    """
    if "--help" in argv or "-h" in argv:
        print_help()
    typed, faults = _parse_command_line(argv)
    filed: list[_Setting] = []
    file_is_read = True
    for setting in typed:
        if setting.key == CONFIG_FILE and setting.value:
            try:
                filed = _read_file(setting.value)
            except (OSError, ValueError, RecursionError) as error:
                faults.append(f"{setting}: not a readable TOML file: {getattr(error, 'strerror', None) or error}")
                file_is_read = False

    config = JobConfig()
    is_valid: dict[str, bool] = {}
    for setting in [*filed, *typed]:
        fault = _apply(config, setting)
        is_valid[setting.key] = fault is None
        if fault:
            faults.append(fault)
    faults.extend(_find_unnamed_sources(config, is_valid))
    if file_is_read and is_valid.get(CONFIG_FILE, True):
        wrong_keys = [key for key, valid in is_valid.items() if not valid]
        conflicts = find_conflicts(config, world_size)
        faults.extend(line for line in conflicts if not any(_mentions(line, key) for key in wrong_keys))
    if faults:
        raise UserError(*faults)
    return config


def _find_unnamed_sources(config: JobConfig, given: dict[str, bool]) -> Iterator[str]:
    """A source whose corpus nobody has named is a slip of the pen in another one's name."""
    for name in config.sources:
        if f"{SOURCES}.{name}.dataset" not in given:
            others = difflib.get_close_matches(name, [other for other in config.sources if other != name], n=1)
            advice = f"did you mean {SOURCES}.{others[0]}?" if others else "name the corpus of this source"
            yield f"{SOURCES}.{name}.dataset is not set: {advice}"


def write_config(config: JobConfig, path: Path) -> None:
    """Write all options to `path` as TOML that `--job.config_file` reads back to an equal configuration.

    Options that are unset stand as comments, and so does `job.config_file`, which only the command line can give.
    """
    lines = []
    for section, options in _list_sections(config).items():
        lines.append(f"[{section}]")
        for option in fields(options):
            value = getattr(options, option.name)
            if value is None:
                lines.append(f"# {option.name} = unset")
            elif f"{section}.{option.name}" == CONFIG_FILE:
                lines.append(f"# {option.name} = {_format_toml(value)}")
            else:
                lines.append(f"{option.name} = {_format_toml(value)}")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def _list_sections(config: JobConfig) -> dict[str, Any]:
    """The tables of a configuration by name."""
    sections = {section.name: getattr(config, section.name) for section in fields(config)}
    sources = {f"{SOURCES}.{name}": source for name, source in sections.pop(SOURCES).items()}
    return sections | sources


def print_help() -> NoReturn:
    """Print every option with its help text, allowed values and default, and exit with 0."""
    import tyro

    # A reader that closes the pipe early (`--help | head`) is no error worth a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sections = [
        (name.replace(".", "_"), Annotated[_document(name, section), tyro.conf.arg(name=name)])
        for name, section in _SECTIONS.items()
    ]
    description = "The command line wins over the TOML file (--job.config_file)."
    tyro.cli(
        make_dataclass("Options", sections, namespace={"__doc__": description}, kw_only=True),
        args=["--help"],
        prog="train.sh",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    raise AssertionError("tyro exits after --help")


def _document(name: str, section: type) -> type:
    """Copy `section` for tyro, with each docstring as one paragraph, and allowed values and default as we write them."""
    import docstring_parser
    import tyro

    texts = {
        param.arg_name: param.description or ""
        for owner in reversed(section.__mro__[:-1])
        for param in docstring_parser.parse_from_object(owner).params
    }
    options = []
    for option, hint in get_type_hints(section, include_extras=True).items():
        schema = _SCHEMAS[f"{name}.{option}"]
        default = {"": "unset", None: "none"}.get(schema["default"]) or json.dumps(schema["default"]).strip('"')
        documented = tyro.conf.arg(
            help=" ".join(texts[option].split()),
            metavar=f"({_describe_allowed(schema)})",
            help_behavior_hint=f"(default: {default})",
        )
        options.append((option, Annotated[hint, documented], field(default=schema["default"])))
    return make_dataclass(section.__name__, options, kw_only=True)


def _parse_command_line(argv: list[str]) -> tuple[list[_Setting], list[str]]:
    """Split the command line into settings of known options and lines about all that is none."""
    settings: list[_Setting] = []
    faults: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not token.startswith("--") or token == "--":
            advice = _suggest(token.partition("=")[0], otherwise=", options are written --section.key value")
            faults.append(f"{_show_text(token)} ({COMMAND_LINE}): stray argument{advice}")
            continue
        key, equals, text = token.removeprefix("--").partition("=")
        given: str | None = text if equals else None
        # A value may begin with one dash (-1), an option begins with two.
        if given is None and position < len(argv) and not argv[position].startswith("--"):
            given = argv[position]
            position += 1
        schema = _find_schema(key)
        if schema is None:
            value = "" if given is None else f" = {_show_text(given)}"
            faults.append(f"{_show_text(key)}{value} ({COMMAND_LINE}): {_explain_unknown(key)}")
        elif given is not None:
            settings.append(_Setting(key, _convert(given, schema), _show_text(given), COMMAND_LINE))
        elif schema.get("type") == "boolean":
            settings.append(_Setting(key, True, "true", COMMAND_LINE))
        else:
            # No option takes a tuple, so `_apply` refuses it like any wrong value.
            settings.append(_Setting(key, (), "(value missing)", COMMAND_LINE))
    for key, count in Counter(setting.key for setting in settings).items():
        if count > 1:
            values = ", ".join(setting.shown for setting in settings if setting.key == key)
            faults.append(f"{key} ({COMMAND_LINE}): given {count} times ({values}), give it once")
    return settings, faults


def _convert(text: str, schema: dict[str, Any]) -> Any:
    """Turn a word from the command line into the option's type. What is not of that type stays text, for `_apply` to refuse."""
    types = _list_types(schema)
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


def _read_file(path: str) -> list[_Setting]:
    """List the settings of a TOML file.

    Raises:
        OSError, ValueError, RecursionError: the file cannot be read as TOML; the message names the line where there is one.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode()
        tree = tomli.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"not UTF-8 (at line {line})") from None
    except tomli.TOMLDecodeError as error:
        line = text.count("\n") + 1
        raise ValueError(str(error).replace("at end of document", f"at line {line}, the end")) from None
    settings: list[_Setting] = []
    tables = [(_show_key(section), options) for section, options in tree.items() if section != SOURCES]
    sources = tree.get(SOURCES, {})
    if isinstance(sources, dict):
        tables += [(f"{SOURCES}.{_show_key(name)}", options) for name, options in sources.items()]
    else:
        tables.append((SOURCES, sources))
    for section, options in tables:
        if isinstance(options, dict) and (options or section in _SECTIONS):
            named = {f"{section}.{_show_key(key)}": value for key, value in options.items()}
        else:
            named = {section: options}
        settings.extend(_Setting(key, value, _shorten(_format_toml(value)), path) for key, value in named.items())
    return settings


def _apply(config: JobConfig, setting: _Setting) -> str | None:
    """Set the option in `config` and return None, or leave it as it is and return the line that says why."""
    schema = _find_schema(setting.key)
    if setting.value == {} and _name_section(setting.key) == ANY_SOURCE:
        return f"{setting}: an empty source, give at least its dataset"
    if schema is None:
        return f"{setting}: {_explain_unknown(setting.key)}"
    if setting.key == CONFIG_FILE and setting.source != COMMAND_LINE:
        return f"{setting}: allowed only on the command line"
    section, _, key = setting.key.rpartition(".")
    limit = _find_broken_limit(setting.value)
    if limit is None:
        try:
            _ADAPTERS[_name_section(section)].validator.validate_assignment(_get_section(config, section), key, setting.value)
        except ValidationError:
            limit = ""
    return None if limit is None else f"{setting}: allowed is {_describe_allowed(schema)}{limit}"


def _find_schema(key: str) -> dict[str, Any] | None:
    """The JSON schema of an option, None for an unknown one."""
    section, _, option = key.rpartition(".")
    return _SCHEMAS.get(f"{_name_section(section)}.{option}")


def _name_section(section: str) -> str:
    """Any table `sources.web` is known as `sources.NAME`. Names are bare TOML keys."""
    return ANY_SOURCE if re.fullmatch(rf"{SOURCES}\.[A-Za-z0-9_-]+", section) else section


def _get_section(config: JobConfig, section: str) -> Any:
    head, _, name = section.partition(".")
    return config.sources.setdefault(name, Source()) if head == SOURCES else getattr(config, section)


def _find_broken_limit(value: Any) -> str | None:
    """What keeps a value from being written as TOML, or None."""
    if isinstance(value, int) and value.bit_length() > 63:
        return ", of at most 64 bits"
    if isinstance(value, str) and value != value.encode(errors="replace").decode():
        return ", in UTF-8"
    return None


def _list_types(schema: dict[str, Any]) -> set[str]:
    return {branch["type"] for branch in schema.get("anyOf", [schema])}


def _describe_allowed(schema: dict[str, Any]) -> str:
    """Say what an option may be, such as "a number >= 0 and < 1", from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(_describe_allowed, schema["anyOf"]))
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if choices:
        return " or ".join(map(_format_toml, choices))
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[limit]:.10g}" for limit, sign in limits.items() if limit in schema)
    nouns = {"integer": "an integer", "number": "a finite number", "boolean": "true or false", "string": "text", "null": "none"}
    return f"{nouns[schema['type']]} {bounds}".rstrip()


def _explain_unknown(key: str) -> str:
    """What is to be said of an option that does not exist."""
    for kind, reason in _DECLINED.items():
        if kind in key.rpartition(".")[2].replace("-", "_"):
            return (
                f"{kind.replace('_', ' ')} training is not supported, since {reason}: leave it out, even at 1; large models fit "
                "by training.data_parallel_shard_degree, activation_checkpoint.mode and training.cpu_offload"
            )
    return f"no such option{_suggest(key)}"


def _suggest(name: str, otherwise: str = ", --help lists all") -> str:
    """End of a line about an unknown name: the options that it may stand for."""
    name = name.lstrip("-").replace("-", "_")
    if name in _SECTIONS:
        return f", {name} is a section: its options are {name}.key"
    nearest = difflib.get_close_matches(name, _SCHEMAS, n=1, cutoff=0.9) or _find_by_key(name)
    return f", did you mean {' or '.join(nearest)}?" if nearest else otherwise


def _find_by_key(name: str) -> list[str]:
    """Options whose key is most like that of `name`; its section, which may be missing or wrong, only decides between them."""
    section, _, key = name.rpartition(".")
    scores = {}
    for option in _SCHEMAS:
        option_section, _, option_key = option.rpartition(".")
        key_likeness = difflib.SequenceMatcher(None, key, option_key).ratio()
        if key_likeness > 0.7:
            scores[option] = key_likeness + 0.5 * difflib.SequenceMatcher(None, section, option_section).ratio()
    return [option for option, score in scores.items() if score == max(scores.values())]


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


def _format_toml(value: Any) -> str:
    """A scalar as TOML. JSON's strings and numbers are TOML's, but for a bare DEL. Other values, for show, as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
