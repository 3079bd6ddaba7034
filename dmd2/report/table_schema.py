"""The schema of table files and of the metric records that fill them. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from dmd2.config import Model
from dmd2.errors import suggestion
from dmd2.report.columns import COLUMNS, OF_CLASSES, PaperMetric

FLOOR = "floor"  # `measure: floor` is the score of the real images themselves
TRAINING = ("train_cpu_s", "train_wall_s", "gpu_s")  # training cost in a model's record, in seconds
Entry = Annotated[str, Field(pattern=r"^(floor|[A-Za-z0-9_-]+/[A-Za-z0-9_-]+)$")]


class PaperData(Model):
    """The data of the paper's numbers."""

    presets: tuple[str, ...] = Field((), description="presets on the paper's own data")
    description: str


class Row(Model):
    """One row: a method with the paper's numbers, and the model of this project that is measured for it."""

    id: str
    group: str
    method: str
    nfe: int | None = Field(None, gt=0, description="forward passes, as the paper counts them")
    paper: dict[PaperMetric, float] = Field(default_factory=dict)
    ticks: tuple[str, ...] = ()
    measure: Entry | None = Field(None, description="MODEL/SAMPLER, or floor")
    seeds: tuple[int, ...] = Field((), description="training seeds to average over; none: the run's own")
    instead: dict[str, Entry] = Field({}, description="presets on which another entry is measured")
    only: tuple[str, ...] = Field((), description="presets that have this row; none: all")
    measured_on: tuple[str, ...] = Field((), description="presets that measure this row, which others quote; none: all")
    pending: str | None = Field(None, description="why this project cannot measure the row yet")
    panel: str | None = Field(None, description="title of the row's samples in the side-by-side sheet; none: not shown")

    @model_validator(mode="after")
    def _measured_or_pending(self) -> Self:
        if self.measure and self.pending:
            raise ValueError("set `measure` or `pending`, not both")
        if self.instead and not self.measure:
            raise ValueError("`instead` needs `measure`, which it replaces on some presets")
        if self.seeds and (not self.measure or self.measure == FLOOR or self.measure.startswith("teacher/")):
            raise ValueError("`seeds` needs `measure: RUN/SAMPLER`, a run to train with them")
        if self.panel and (not self.measure or self.measure == FLOOR):
            raise ValueError("`panel` needs `measure: MODEL/SAMPLER`, whose samples it shows")
        return self

    def entry(self, preset: str | None) -> str | None:
        """The entry measured for the row on `preset`: MODEL/SAMPLER, `floor` or None; without seeds, see `entries`."""
        if self.measured_on and preset not in self.measured_on:
            return None
        return self.instead.get(preset or "", self.measure)

    def entries(self, preset: str | None, further: Sequence[int] = ()) -> list[str]:
        """The entries whose metrics the row averages: one per training seed.

        `further` seeds are beside the run's own; rows of a teacher, of the floor and with `seeds` have none.
        """
        entry = self.entry(preset)
        if entry is None or entry == FLOOR or entry.startswith("teacher/"):
            return [entry] if entry else []
        model, sampler = entry.split("/")
        seeded = [f"{model}_seed{seed}/{sampler}" for seed in self.seeds or further]
        return seeded if self.seeds else [entry, *seeded]


class Table(Model):
    """The content of `workflow/tables/tableN.yaml`."""

    number: int | None = Field(None, gt=0, description="in the paper; none: our own, built only on request")
    title: str
    preset: str | None = Field(None, description="default preset of the table; none: all rows are quoted")
    paper_data: PaperData | None = None
    ticks: tuple[str, ...] = Field((), description="yes/no columns")
    measured: tuple[str, ...] = Field(OF_CLASSES, min_length=1, description="keys of columns.COLUMNS, in their order")
    seeds: dict[str, tuple[int, ...]] = Field(
        {}, description="presets on which rows of students average over these training seeds and the run's own"
    )
    compute: bool = Field(False, description="whether the Markdown shows the training cost of each row")
    rows: tuple[Row, ...] = Field(min_length=1)

    @field_validator("measured")
    @classmethod
    def _columns_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in COLUMNS]:
            raise ValueError(f"no column {unknown[0]!r}; {suggestion(unknown[0], COLUMNS)}")
        if len(set(names)) < len(names) or "fid" not in names:
            raise ValueError("a column is listed twice, or `fid` is not listed")
        return names

    @model_validator(mode="after")
    def _rows_belong_here(self) -> Self:
        if self.preset is None and (measured := [row.id for row in self.rows if row.measure]):
            raise ValueError(f"row {measured[0]} is measured, but the table has no `preset` to measure it on")
        if (self.number is None) != (self.paper_data is None):
            raise ValueError("a table of the paper has `number` and `paper_data`, another has neither")
        seen = set()
        for row in self.rows:
            if self.number is not None and not row.id.startswith(f"t{self.number}."):
                raise ValueError(f"row id {row.id!r} does not start with t{self.number}.")
            if row.id in seen:
                raise ValueError(f"row id {row.id!r} is listed twice")
            if unknown := set(row.ticks) - set(self.ticks):
                raise ValueError(f"row {row.id}: ticks {sorted(unknown)} are not among the table's {list(self.ticks)}")
            seen.add(row.id)
        return self

    def paper_metrics(self) -> list[str]:
        """The metrics that any row quotes."""
        return [metric for metric in get_args(PaperMetric) if any(metric in row.paper for row in self.rows)]

    def columns(self) -> list[str]:
        """The columns of the CSV."""
        paper = [f"paper_{metric}" for metric in self.paper_metrics()]
        measured = [column for name in self.measured for column in (name, *([f"{name}_sd"] * COLUMNS[name].spread))]
        return [
            *("row_id", "group", "method", *self.ticks, "paper_nfe", "nfe"),
            *(*paper, *measured, "source", "preset", "dataset"),
            *(["latency_protocol"] if "latency_s" in self.measured else []),
            *("run", "iterations", "generator_updates", "checkpoint_step", "selection"),
            *("num_samples", "num_blocks", "training_seeds", "seeds", *TRAINING, "protocol", "features", "reference"),
            *("config_digest", "commit", "note"),
        ]

    def entries_of(self, row: Row, preset: str | None) -> list[str]:
        """See `Row.entries`, with the table's further seeds on `preset`."""
        return row.entries(preset, self.seeds.get(preset or "", ()))

    def rows_of(self, preset: str | None) -> tuple[Row, ...]:
        """The rows of the table on `preset`."""
        return tuple(row for row in self.rows if not row.only or preset in row.only)


class _Read(BaseModel):
    """Part of a record; other keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Measure(_Read):
    """Mean and standard deviation over the blocks."""

    mean: float
    sd: float | None = None


_OPTIONAL: dict[str, Any] = {name: (Measure | None, None) for name in COLUMNS if name not in ("fid", "resolution")}
Measured = create_model("Measured", __base__=_Read, fid=(Measure, ...), **_OPTIONAL)
"""The metrics of a set of samples; only the Frechet distance is required."""


class Times(_Read):
    """Seconds of single calls."""

    median: float
    sd: float


class Seconds(_Read):
    """Of one image and of its parts."""

    total: Times
    text: Times
    network: Times
    decoder: Times


class LatencyRecord(_Read):
    """The keys of a latency record that a table reads."""

    seconds: Seconds
    device: str
    precision: str
    warm_up: int
    repeats: int


class FeaturesUsed(_Read):
    """The extractor, the SHA-256 of its weights, and the origin of the real images' moments."""

    name: str
    sha256: str
    reference: str


class ModelUsed(_Read):
    """The sampled model and the cost of its training."""

    run: str
    iterations: int | None = None
    generator_updates: int | None = None
    checkpoint_step: int | None = None
    selection: Literal["last", "best", "snapshot"] | None = None
    seed: int | None = None
    train_cpu_s: float | None = None
    train_wall_s: float | None = None
    gpu_s: float | None = None


class MadeBy(_Read):
    """The configuration and code that wrote the record."""

    digest: str
    commit: str


class MetricsRecord(_Read):
    """The keys of a metrics record that a table reads; the floor's has no `nfe` or `model`."""

    metrics: Measured
    nfe: int | None = None
    num_samples: int
    num_blocks: int
    seed: int
    protocols: dict[str, dict[str, str]] = Field(min_length=1, description="choices by name, that of `fid` first")
    features: FeaturesUsed
    model: ModelUsed | None = None
    latency_protocol: str | None = None
    provenance: MadeBy
