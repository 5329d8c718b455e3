"""All options there are, by dotted key: what each may be, and which one a wrong key stands for."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flame.config.schema import NAMED, JobConfig, list_core_sections, name_any
from flame.config.types import Section, get_declaration
from flame.errors import give_reason

JsonSchema = dict[str, Any]

HELP = ("--help", "-h")
PRINT_CONFIG = "--print-config"
ESTIMATE = "--estimate"
DRY_RUN = "--dry-run"
COMMANDS = (HELP[0], PRINT_CONFIG, ESTIMATE, DRY_RUN)
"""Words on the command line that are no options."""


class OptionTable:
    """The options of a run's sections.

    Args:
        extensions: sections of objectives and data sources, by name.
    """

    def __init__(self, extensions: Mapping[str, type[Section]]):
        self.extensions = dict(extensions)
        self.sections: dict[str, type[Section]] = {**list_core_sections(), **extensions}
        self.schemas: dict[str, JsonSchema] = {
            f"{name}.{key}": schema for name, kind in self.sections.items() for key, schema in _build_adapter(kind)[1].items()
        }

    def find(self, key: str) -> JsonSchema | None:
        """The JSON schema of an option, None for an unknown one."""
        section, _, name = key.rpartition(".")
        return self.schemas.get(f"{name_table(section)}.{name}")

    def set(self, job: JobConfig, key: str, value: Any) -> str | None:
        """Set a known option and return None, or leave it as it is and return what is allowed."""
        section, _, name = key.rpartition(".")
        limit = _find_broken_limit(value)
        if limit is None:
            try:
                adapter, _ = _build_adapter(self.sections[name_table(section)])
                adapter.validator.validate_assignment(self._get_section(job, section), name, value)
                return None
            except ValidationError:
                limit = ""
        return describe_allowed(self.schemas[f"{name_table(section)}.{name}"]) + limit

    def _get_section(self, job: JobConfig, section: str) -> Section:
        head, _, name = section.partition(".")
        if head in NAMED:
            return getattr(job, head).setdefault(name, NAMED[head]())
        return job.get(self.extensions[section]) if section in self.extensions else getattr(job, section)

    def suggest(self, name: str, otherwise: str = ", --help lists all", dashes: str = "") -> str:
        """End of a line about an unknown name: the options that it may stand for.

        Args:
            otherwise: said where there are none.
            dashes: written before options.
        """
        given, _, key = name.lstrip("-").rpartition(".")
        table = name_table(given)
        name = f"{table}.{key}".lstrip(".").replace("-", "_")
        if name in self.sections:
            return f", {name} is a section: its options are {dashes}{name}.key"
        if not given and (command := _find_command(name)):
            return f", did you mean {command}?"
        nearest = difflib.get_close_matches(name, self.schemas, n=1, cutoff=0.9) or self._find_by_key(name)
        if not nearest and not given and (likely := difflib.get_close_matches(name, self.sections, n=1, cutoff=0.8)):
            return f", did you mean the section {likely[0]}?"
        # A table of the user's, such as [sources.web], keeps its name.
        meant = [dashes + (f"{given}.{each.rpartition('.')[2]}" if each.startswith(f"{table}.") else each) for each in nearest]
        return f", did you mean {' or '.join(meant)}?" if meant else otherwise

    def _find_by_key(self, name: str) -> list[str]:
        """Options whose key is most like that of `name`. Its section may be missing or wrong and only decides between them."""
        section, _, key = name.rpartition(".")
        scores = {}
        for option in self.schemas:
            option_section, _, option_key = option.rpartition(".")
            likeness = difflib.SequenceMatcher(None, key, option_key).ratio()
            if likeness > 0.7:
                scores[option] = likeness + 0.5 * difflib.SequenceMatcher(None, section, option_section).ratio()
        return [option for option, score in scores.items() if score == max(scores.values())]


def _find_command(name: str) -> str | None:
    """The command that a word without a section stands for."""
    plain = {command.replace("-", ""): command for command in COMMANDS}
    nearest = difflib.get_close_matches(name.replace("_", ""), plain, n=1, cutoff=0.8)
    return plain[nearest[0]] if nearest else None


_BUILT: dict[type[Section], tuple[TypeAdapter[Any], dict[str, JsonSchema]]] = {}


def _build_adapter(kind: type[Section]) -> tuple[TypeAdapter[Any], dict[str, JsonSchema]]:
    """What checks the values of a section, and the JSON schema of each option; built once."""
    if kind not in _BUILT:
        adapter = TypeAdapter(kind)
        _BUILT[kind] = adapter, adapter.json_schema().get("properties", {})
    return _BUILT[kind]


def find_section_fault(kind: Any, base: type[Section]) -> str | None:
    """What keeps a class of the user's from being a table of options, to follow its name in a line; None for nothing."""
    if not (isinstance(kind, type) and issubclass(kind, base)):
        return f"is no class derived from {base.__module__}.{base.__name__}"
    if not is_dataclass(kind) or ("__annotations__" in vars(kind) and "__dataclass_fields__" not in vars(kind)):
        return "is no dataclass: write @dataclass(kw_only=True) above it"
    for each in fields(kind):
        if each.default is MISSING:
            return f"has no default for {each.name}: give it one"
    try:
        adapter, schemas = _build_adapter(kind)
        for name, schema in schemas.items():
            describe_allowed(schema)
            adapter.validator.validate_assignment(kind(), name, schema["default"])
    except Exception as error:  # whatever pydantic makes of a type
        reason = give_reason(error, 200)
        return f"has an option of an unsupported type, or a default of the wrong type ({type(error).__name__}: {reason})"
    return None


def find_unknown_conditions(name: str, sections: Mapping[str, type[Section]]) -> list[str]:
    """One line for each option of a user's section whose `applies` names an option that does not exist.

    Args:
        name: of the section.
        sections: all sections by name.
    """
    lines = []
    for each in fields(sections[name]):  # type: ignore[arg-type]  # every section is a dataclass
        for when in get_declaration(each).applies:
            section, _, option = when.resolve(name).rpartition(".")
            if section not in sections or option not in {other.name for other in fields(sections[section])}:  # type: ignore[arg-type]
                lines.append(f'{name}.{each.name} applies When("{when.key}"), which is no option: name one as "section.option"')
    return lines


def name_table(section: str) -> str:
    """Any table `sources.web` is known as `sources.NAME`. Names are bare TOML keys."""
    head, _, name = section.partition(".")
    return name_any(head) if head in NAMED and re.fullmatch(r"[A-Za-z0-9_-]+", name) else section


def _find_broken_limit(value: Any) -> str | None:
    """What keeps a value from being written as TOML, or None."""
    if isinstance(value, int) and value.bit_length() > 63:
        return ", of at most 64 bits"
    if isinstance(value, str) and value != value.encode(errors="replace").decode():
        return ", in UTF-8"
    return None


def list_types(schema: JsonSchema) -> set[str]:
    """JSON types that an option takes."""
    if "anyOf" in schema:
        return {name for branch in schema["anyOf"] for name in list_types(branch)}
    if "type" in schema:
        return {schema["type"]}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {names[type(value)] for value in schema.get("enum", [schema.get("const")])}


def describe_allowed(schema: JsonSchema) -> str:
    """Say what an option may be, such as "a number >= 0 and < 1"."""
    if "anyOf" in schema:
        return " or ".join(map(describe_allowed, schema["anyOf"]))
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if choices:
        return " or ".join(map(format_toml, choices))
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[limit]:.10g}" for limit, sign in limits.items() if limit in schema)
    nouns = {"integer": "an integer", "number": "a finite number", "boolean": "true or false", "string": "text", "null": "none"}
    noun = "a number, inf included," if schema.get("allows_infinity") else nouns[schema["type"]]
    return f"{noun} {bounds}".rstrip()


def format_toml(value: Any) -> str:
    """A scalar as TOML. JSON's strings and numbers are TOML's, but for a bare DEL and infinity. Others, for show, as JSON."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
