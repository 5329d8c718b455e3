"""What the sections of a configuration are made of: value types with their ranges, and what an option declares beside itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field as DataclassField
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from flame.config.schema import JobConfig

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

STRICT = ConfigDict(extra="forbid", strict=True)
_METADATA_KEY = "flame"


class Section:
    """Base of the dataclass behind a table of the TOML file.

    The docstring under a field is its help text. A section that an objective or a data source brings sets `section`.
    """

    __pydantic_config__ = STRICT
    section: ClassVar[str] = ""
    """Name of the table, such as "future_encoder"."""

    def find_conflicts(self, job: JobConfig, name: str) -> Iterator[str]:
        """Yield one line for each value that would compute something wrong beside the other options of the run.

        Types and ranges have been checked. Each line names the key, the value, what is allowed and what to do. An option that
        has no effect is no conflict: it says so by `applies` in `option`.

        Args:
            name: of this table, such as "training" or "sources.web".
        """
        return iter(())

    def find_model_conflicts(self, model_config: PretrainedConfig) -> Iterator[str]:
        """Yield one line for each reason why this model cannot be trained with these options. Asked of an objective's companions;
        the objective has a rule of its own."""
        return iter(())


@dataclass(frozen=True)
class When:
    """An option has an effect only where another has one of these values; without values, where it is neither 0 nor empty.

    Args:
        key: of the other option: "section.name", or the name alone for one of the same section.
        above: the other option is a number, and must be above this one.
    """

    key: str
    values: tuple[Any, ...] = ()
    above: int | None = None

    def resolve(self, section: str) -> str:
        """The key with its section."""
        return self.key if "." in self.key else f"{section}.{self.key}"

    def holds(self, value: Any) -> bool:
        """Whether the other option's value lets this one have an effect."""
        if self.above is not None:
            return value > self.above
        return value in self.values if self.values else bool(value)

    def describe(self, section: str) -> str:
        """Such as `training.loss_on = "answer"`."""
        key = self.resolve(section)
        if self.above is not None:
            return f"{key} above {self.above}"
        if not self.values:
            return f"{key} set"
        return f"{key} = " + " or ".join(f'"{value}"' if isinstance(value, str) else str(value).lower() for value in self.values)


@dataclass(frozen=True)
class Declaration:
    """What an option says of itself beside type, default and help text."""

    fixed: bool | Callable[[Any], bool] = False
    """Whether a resumed run must keep the value; or a function of the section that says so."""
    applies: tuple[When, ...] = ()
    """All must hold for the option to have an effect."""
    is_silent: bool = False
    """A change at a resume is not reported: it changes nothing that the run computes."""


def option(
    default: Any, *, fixed: bool | Callable[[Any], bool] = False, applies: When | tuple[When, ...] = (), is_silent: bool = False
) -> Any:
    """A field of a `Section` with its default and what it declares; see `Declaration`."""
    conditions = (applies,) if isinstance(applies, When) else applies
    return field(default=default, metadata={_METADATA_KEY: Declaration(fixed, conditions, is_silent)})


def get_declaration(of: DataclassField) -> Declaration:
    """What a field declares; nothing where it is a plain default."""
    return of.metadata.get(_METADATA_KEY, Declaration())


def list_fixed(options: Section) -> list[str]:
    """Names of the options of a section that a resumed run must keep. One without effect in its section is none of them."""
    found = []
    for each in fields(options):  # type: ignore[arg-type]  # every section is a dataclass
        declaration = get_declaration(each)
        is_fixed = declaration.fixed(options) if callable(declaration.fixed) else declaration.fixed
        own = [when for when in declaration.applies if "." not in when.key]
        if is_fixed and all(when.holds(getattr(options, when.key)) for when in own):
            found.append(each.name)
    return found
