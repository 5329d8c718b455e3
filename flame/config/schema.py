"""All options of a run: one dataclass for each table of the TOML file.

Precedence: the defaults of the sections < the TOML file (`--job.config_file`) < the command line (`--section.key value`). What
an option needs stands beside it: its type and range, whether a resume may change it, when it has an effect (`types.option`), and
what must hold between it and others (`Section.find_conflicts`). `flame.config.parse` reads, `flame.config.check` applies the
rules, `flame.config.help` describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from flame.config.data import Corpus, Source, Validation
from flame.config.evaluation import Evaluation, HeldOut
from flame.config.locations import Start, find_beside_weights, find_start
from flame.config.profiling import Profiling
from flame.config.run import CHECKPOINT_FOLDER, Checkpoint, Comm, Job, Metrics, Model, ObjectiveChoice
from flame.config.training import ActivationCheckpoint, Experimental, LRScheduler, Optimizer, Training
from flame.config.types import Section

S = TypeVar("S", bound=Section)

SOURCES, HELD_OUT = "sources", "held_out"
NAMED: dict[str, type[Corpus]] = {SOURCES: Source, HELD_OUT: HeldOut}
"""Tables of tables, whose names the user gives: `[sources.web]`."""


def name_any(head: str) -> str:
    """Stands for each table `[sources.*]` in help and suggestions: `sources.NAME`."""
    return f"{head}.NAME"


@dataclass(kw_only=True)
class JobConfig:
    """All options of a run."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    sources: dict[str, Source] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    experimental: Experimental = field(default_factory=Experimental)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    held_out: dict[str, HeldOut] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    extensions: dict[str, Section] = field(default_factory=dict)
    """Sections of objectives and data sources, by name."""
    world_size: int = 1
    """Processes of the run over all machines. No option: the launcher says it."""
    is_dry_run: bool = field(default=False, compare=False)
    """Whether `--dry-run` was given. No option."""
    typed: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Keys that the file or the command line has set. No option."""

    NO_SECTIONS: ClassVar = ("extensions", "world_size", "is_dry_run", "typed")

    def get(self, kind: type[S]) -> S:
        """The section that an objective or a data source has declared; defaults where nobody has set one of its options."""
        found = self.extensions.setdefault(kind.section, kind())
        assert isinstance(found, kind), f"two sections are called {kind.section}"
        return found

    @property
    def corpora(self) -> dict[str, Source]:
        """What is trained on, by option section ("training", or "sources.NAME" in the order of names)."""
        if self.sources:
            return {f"{SOURCES}.{name}": self.sources[name] for name in sorted(self.sources)}
        chosen = {each.name: getattr(self.training, each.name) for each in fields(Corpus)}
        return {"training": Source(**chosen)}

    @property
    def read_corpora(self) -> dict[str, Corpus]:
        """What is read: `corpora`, the validation's own, and `held_out_corpora`."""
        own: dict[str, Corpus] = {"validation": self.validation} if self.validation.dataset and self.validation.interval else {}
        return {**self.corpora, **own, **self.held_out_corpora}

    @property
    def held_out_corpora(self) -> dict[str, HeldOut]:
        """What is evaluated, by option section ("held_out.NAME")."""
        read = self.held_out if self.evaluation.interval else {}
        return {f"{HELD_OUT}.{name}": held_out for name, held_out in read.items()}

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.job.dump_folder) / CHECKPOINT_FOLDER

    @property
    def branch_folder(self) -> Path | None:
        """The checkpoint that `checkpoint.branch_from` names; None without it."""
        return Path(self.checkpoint.branch_from).expanduser() if self.checkpoint.branch_from else None

    @property
    def schedule_steps(self) -> int:
        """Steps that learning rate and loss weight are scheduled over."""
        return self.lr_scheduler.total_steps or self.training.steps

    @property
    def start(self) -> Start:
        """What the run starts from: an option and its value, or its own newest checkpoint where that is no folder here."""
        return find_start(self.checkpoint.branch_from, self.checkpoint.initial_load_path, self.checkpoint_folder)

    @property
    def model_source(self) -> str:
        """What `model.config` names or, where that is empty, what comes with `start`; empty without that."""
        return self.model.config or find_beside_weights(self.start.path)

    @property
    def model_key(self) -> str:
        """The option that `model_source` goes by."""
        return "model.config" if self.model.config else self.start.key

    @property
    def tokenizer_source(self) -> str:
        """As `model_source`, for `model.tokenizer_path`."""
        return self.model.tokenizer_path or find_beside_weights(self.start.path)

    def list_sections(self) -> Iterator[tuple[str, Section]]:
        """Each table by name, in the order of the file."""
        for each in fields(self):
            if each.name in NAMED:
                yield from ((f"{each.name}.{name}", table) for name, table in getattr(self, each.name).items())
            elif each.name not in self.NO_SECTIONS:
                yield each.name, getattr(self, each.name)
        yield from self.extensions.items()

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values: by section, and by source within "sources"."""
        plain: dict[str, Any] = {}
        for name, section in self.list_sections():
            head, _, source = name.partition(".")
            if source:
                plain.setdefault(head, {})[source] = asdict(section)  # type: ignore[call-overload]  # every section is a dataclass
            else:
                plain[name] = asdict(section)  # type: ignore[call-overload]
        return plain


def list_core_sections() -> dict[str, type[Section]]:
    """The sections that every run has, by name; `name_any` for tables that the user names."""
    hints = get_type_hints(JobConfig)
    return {
        name_any(name) if name in NAMED else name: NAMED.get(name, kind)
        for name, kind in hints.items()
        if name in NAMED or (isinstance(kind, type) and issubclass(kind, Section))
    }
