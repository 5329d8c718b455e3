"""What `trainer.json` has to hold: the type and range of each value that a resume relies on."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from annotated_types import Len
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from flame.config.types import NonNegativeInt, PositiveInt

TOLERANT = with_config(ConfigDict(strict=True, extra="allow"))

Cursor = Annotated[list[NonNegativeInt], Len(4, 4)]
StreamName = Annotated[str, Field(pattern=r"^stream-\d+$")]
Options = dict[str, dict[str, Any]]


@TOLERANT
class SourceFields(TypedDict):
    """The position in one source."""

    num_units: NonNegativeInt | None
    cursors: dict[StreamName, Cursor]
    content: NotRequired[dict[str, Any]]
    former_names: NotRequired[list[Annotated[list[Any], Len(2, 2)]]]


@TOLERANT
class DataFields(TypedDict):
    """The position in the data."""

    num_streams: PositiveInt
    seed: NonNegativeInt
    next_sequence: NonNegativeInt
    sources: dict[str, SourceFields]


@TOLERANT
class CounterFields(TypedDict):
    """Totals of the run."""

    tokens_seen: NonNegativeInt
    bad_rows: NonNegativeInt
    skipped_steps: NonNegativeInt
    skipped_in_a_row: NonNegativeInt
    skipped_aux: NonNegativeInt
    skipped_aux_in_a_row: NonNegativeInt
    tokens_by_source: dict[str, NonNegativeInt]


@TOLERANT
class TrainedObjective(TypedDict):
    """The objective."""

    name: str
    exported: list[str]
    task: NotRequired[dict[str, Any]]


@TOLERANT
class RunOptions(TypedDict):
    """Sections of the options that a resume reads. The others are compared, and may hold anything."""

    training: dict[str, Any]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    checkpoint: dict[str, Any]


@TOLERANT
class CommonFields(TypedDict):
    """What the checkpoint of a run has, and a converted model."""

    step: NonNegativeInt
    world_size: PositiveInt
    files: dict[str, NonNegativeInt]
    digests: NotRequired[dict[str, str]]
    config: Options


@TOLERANT
class RunFields(CommonFields):
    """What the checkpoint of a run has beside it."""

    validated_step: NonNegativeInt
    evaluated_step: NotRequired[NonNegativeInt]
    counters: CounterFields
    data: DataFields
    service_ids: dict[str, str]
    generation: dict[str, Any]
    model_config: dict[str, Any]
    tokenizer_fingerprint: str
    objective: TrainedObjective | None


_COMMON, _RUN, _OPTIONS = TypeAdapter(CommonFields), TypeAdapter(RunFields), TypeAdapter(RunOptions)


def check_fields(state: dict[str, Any], *, is_signed: bool) -> str | None:
    """The first value that cannot be, in one line; None if there is none.

    Args:
        state: `trainer.json` of a run, of this format or another, or of a converted model, which has no options.
        is_signed: it is as it was written, by its digest.
    """
    fault = _find_fault(_COMMON, state)
    if fault is not None or is_signed or not state["config"] or "format" not in state:
        return fault
    fault = _find_fault(_RUN, state) or _find_fault(_OPTIONS, state["config"], ("config",))
    if fault is None:
        streams, tokens = state["data"]["num_streams"], state["counters"]["tokens_by_source"]
        if lost := [name for name, count in tokens.items() if count and name not in state["data"]["sources"]]:
            return f"data.sources.{lost[0]}: Field required"
        for name, source in state["data"]["sources"].items():
            if name not in tokens:
                return f"counters.tokens_by_source.{name}: Field required"
            for stream in source["cursors"]:
                if int(stream.removeprefix("stream-")) >= streams:
                    return f"data.sources.{name}.cursors.{stream}: there are {streams} streams"
    return fault


def _find_fault(adapter: TypeAdapter[Any], value: Any, inside: tuple[str, ...] = ()) -> str | None:
    try:
        adapter.validate_python(value)
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, (*inside, *first['loc'])))}: {first['msg']}"
