"""The rules of all sections at once, and the options that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields

from flame.config.data import Corpus, find_mixture_conflicts
from flame.config.schema import JobConfig
from flame.config.types import get_declaration
from flame.errors import UserError

OWN_PACKAGE = __name__.partition(".")[0]


def find_conflicts(job: JobConfig) -> Iterator[str]:
    """Yield one line for each combination of options, or option and machine, that cannot run.

    Asks the sections that every run has. Objectives and data sources answer for theirs (`flame.trainer.options`).

    Args:
        job: options whose types and ranges are already checked.
    """
    for name, section in job.list_sections():
        if name not in job.extensions:
            yield from section.find_conflicts(job, name)
    yield from find_mixture_conflicts(job)


def call_rules(find: Callable[..., Iterator[str]], *arguments: object) -> Iterator[str]:
    """Yield the lines of a `find_conflicts` or `find_model_conflicts`, which may be a user's. One that fails is a line, too."""
    try:
        lines = list(find(*arguments))
    except UserError as error:
        yield from error.lines
    except Exception as error:
        if find.__module__.partition(".")[0] == OWN_PACKAGE:
            raise
        yield f"{find.__module__}: {find.__qualname__}() fails: {type(error).__name__}: {error}"
    else:
        yield from lines


def list_unused(job: JobConfig, idle_sections: Collection[str], used_by_corpus: dict[str, frozenset[str]]) -> list[str]:
    """Names of options that have been set and have no effect in this run, such as `future_encoder.temperature`.

    Args:
        idle_sections: extension sections that nothing in this run reads.
        used_by_corpus: by section, the options of `Corpus` that its data source reads.
    """
    values = {f"{name}.{key}": value for name, section in job.list_sections() for key, value in vars(section).items()}
    corpus_options = {each.name for each in fields(Corpus)} - {"dataset"}
    unused = []
    for name, section in job.list_sections():
        for each in fields(section):  # type: ignore[arg-type]  # every section is a dataclass
            if getattr(section, each.name) == each.default:
                continue
            holds = all(when.holds(values[when.resolve(name)]) for when in get_declaration(each).applies)
            is_read = each.name not in corpus_options or name not in used_by_corpus or each.name in used_by_corpus[name]
            if name in idle_sections or not holds or not is_read:
                unused.append(f"{name}.{each.name}")
    return unused
