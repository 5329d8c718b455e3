"""What the options are, in words: `--help`, `--print-config`, config.toml and docs/options.md."""

from __future__ import annotations

import json
import signal
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from flame.config.parse import CONFIG_FILE
from flame.config.schema import JobConfig
from flame.config.table import OptionTable, describe_allowed, format_toml, name_table
from flame.config.types import Section, get_declaration
from flame.errors import UserError

TOML_WIDTH = 110


@dataclass(frozen=True)
class OptionHelp:
    """One option in words."""

    name: str
    text: str
    allowed: str
    default: str


def describe_section(name: str, kind: type[Section], table: OptionTable) -> list[OptionHelp]:
    """The options of a section, in order."""
    import docstring_parser

    texts = {
        param.arg_name: param.description or ""
        for owner in reversed(kind.__mro__[:-1])
        for param in docstring_parser.parse_from_object(owner).params
    }
    options = []
    for each in fields(kind):  # type: ignore[arg-type]  # every section is a dataclass
        declaration, schema = get_declaration(each), table.schemas[f"{name}.{each.name}"]
        sentences = [" ".join(texts.get(each.name, "").split())]
        if declaration.applies:
            sentences.append(f"Has an effect only with {' and '.join(when.describe(name) for when in declaration.applies)}.")
        if declaration.fixed:
            sentences.append(
                "A resumed run must keep it." if declaration.fixed is True else "A resumed run must keep it if it is learned."
            )
        default = {"": "unset", None: "none"}.get(schema["default"]) or json.dumps(schema["default"]).strip('"')
        options.append(OptionHelp(each.name, " ".join(filter(None, sentences)), describe_allowed(schema), default))
    return options


def print_help(table: OptionTable, section: str | None = None) -> None:
    """Print every option, or those of one section, with help text, allowed values and default.

    Raises:
        UserError: there is no such section.
    """
    import tyro

    if section is not None and section not in table.sections:
        raise UserError(f"--help {section}: no such section; there are {', '.join(table.sections)}")
    # A reader that closes the pipe early (`--help | head`) is no error worth a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    chosen = {section: table.sections[section]} if section else table.sections
    sections = [
        (name.replace(".", "_"), Annotated[_build_for_tyro(name, kind, table), tyro.conf.arg(name=name)])
        for name, kind in chosen.items()
    ]
    text = (
        "The command line wins over the TOML file (--job.config_file).\n\n"
        "--help SECTION shows one section, --print-config such a file.\n"
        "--estimate says what the run needs, --dry-run makes a few steps and keeps none."
    )
    try:
        tyro.cli(
            make_dataclass("Options", sections, namespace={"__doc__": text}, kw_only=True),
            args=["--help"],
            prog="train.sh",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit:  # how tyro ends after its help
        return


def _build_for_tyro(name: str, kind: type[Section], table: OptionTable) -> type:
    """Copy a section for tyro, with our words for text, allowed values and default."""
    import tyro

    hints = get_type_hints(kind, include_extras=True)
    options = []
    for each in describe_section(name, kind, table):
        documented = tyro.conf.arg(help=each.text, metavar=f"({each.allowed})", help_behavior_hint=f"(default: {each.default})")
        default = table.schemas[f"{name}.{each.name}"]["default"]
        options.append((each.name, Annotated[hints[each.name], documented], field(default=default)))
    return make_dataclass(kind.__name__, options, kw_only=True)


def write_config(job: JobConfig, path: Path) -> None:
    """Write all options as TOML that `--job.config_file` reads back to an equal configuration.

    Options that are unset stand as comments, and so does `job.config_file`, which only the command line can give.
    """
    path.write_text("\n".join(_write_toml(job, None)), encoding="utf-8")


def render_commented(job: JobConfig, table: OptionTable) -> str:
    """The same, with the help text of each option above it."""
    return "\n".join(_write_toml(job, table))


def _write_toml(job: JobConfig, table: OptionTable | None) -> Iterable[str]:
    for section, options in job.list_sections():
        yield f"[{section}]"
        described = describe_section(name_table(section), type(options), table) if table is not None else []
        texts = {each.name: f"{each.text} Allowed: {each.allowed}." for each in described}
        for each in fields(options):  # type: ignore[arg-type]  # every section is a dataclass
            value: Any = getattr(options, each.name)
            if each.name in texts:
                yield from (f"# {line}" for line in textwrap.wrap(texts[each.name], TOML_WIDTH))
            if value is None or ((section, each.name) == ("training", "steps") and job.training.budget is not None):
                yield f"# {each.name} = unset"
            elif f"{section}.{each.name}" == CONFIG_FILE:
                yield f"# {each.name} = {format_toml(value)}"
            else:
                yield f"{each.name} = {format_toml(value)}"
        yield ""


def render_markdown(table: OptionTable) -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Every option of a run, as `bash train.sh --help` shows it. The command line (`--section.key value`) wins over the TOML",
        "file (`--job.config_file run.toml`), which wins over the defaults. `python -m flame.cli.options` writes this page.",
        "",
    ]
    for name, kind in table.sections.items():
        intro = " ".join((kind.__doc__ or "").split())
        lines += [f"## `[{name}]`", "", *([intro, ""] if not intro.startswith(f"{kind.__name__}(") else [])]
        lines += ["| option | what | allowed | default |", "|---|---|---|---|"]
        for each in describe_section(name, kind, table):
            cells = (f"`{each.name}`", each.text, each.allowed, f"`{each.default}`")
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)
