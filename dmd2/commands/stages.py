"""One command per workflow rule: `dmd2 STAGE --spec ... --input ... --output ...`; no logic here.

Each imports its stage when it runs, so that a command does not import other stages' dependencies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dmd2.config import Runtime
from dmd2.config.reading import parse, read_mapping
from dmd2.errors import UserError
from dmd2.lineage.spec import Spec, read_spec

SpecOption = Annotated[str, typer.Option("--spec", help="the stage's spec as JSON, or @FILE")]
RuntimeOption = Annotated[
    str, typer.Option(envvar="DMD2_RUNTIME", help="settings of execution as JSON or YAML (config.Runtime)")
]
PathOption = Annotated[Path, typer.Option()]
OptionalPath = Annotated[Path | None, typer.Option()]


def _runtime(text: str) -> Runtime:
    return parse(Runtime, read_mapping(text, "--runtime"), "--runtime")


def _spec(text: str, stage: str) -> Spec:
    spec = read_spec(text).located(read_mapping(os.environ.get("DMD2_FILES", "{}"), "DMD2_FILES"))
    if spec.stage != stage:
        raise UserError(f"--spec is for the stage {spec.stage}, not {stage}")
    return spec


def shards(
    spec: SpecOption,
    manifest: PathOption,
    source: Annotated[str, typer.Option(help="folder, archive or pattern, for sources that read one")] = "",
    max_unreadable: Annotated[int, typer.Option(min=0, help="maximum number of unreadable images to skip")] = 0,
    max_passed_over: Annotated[
        int, typer.Option(min=0, help="maximum number of files that may be images and are not taken")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Write the source's images as shards."""
    from dmd2.stages import data

    limits = {"max_unreadable": max_unreadable, "max_passed_over": max_passed_over}
    data.shards(_spec(spec, "shards"), manifest, source or None, limits, workers)


def components(spec: SpecOption, record: PathOption, images: OptionalPath = None) -> None:
    """Train or copy the autoencoder and text encoders of a text-to-image teacher."""
    from dmd2.stages import components as stage

    stage.components(_spec(spec, "components"), images, record)


def latents(
    spec: SpecOption,
    images: PathOption,
    manifest: PathOption,
    components: OptionalPath = None,
    runtime: RuntimeOption = "{}",
) -> None:
    """Write the images in the teacher's space, with the tokens of their labels."""
    from dmd2.stages import data

    data.latents(_spec(spec, "latents"), images, manifest, _runtime(runtime), components)


def pairs(
    spec: SpecOption,
    teacher: PathOption,
    manifest: PathOption,
    components: OptionalPath = None,
    runtime: RuntimeOption = "{}",
) -> None:
    """Write the teacher's noise-image pairs."""
    from dmd2.stages import data

    data.pairs(_spec(spec, "pairs"), teacher, manifest, _runtime(runtime), components)


def teacher(
    spec: SpecOption,
    state: PathOption,
    weights: PathOption,
    train_log: PathOption,
    latents: OptionalPath = None,
    components: OptionalPath = None,
    runtime: RuntimeOption = "{}",
) -> None:
    """Train the teacher on latents, or import its weights from the file that the spec names."""
    from dmd2.stages import train as stage

    stage.teacher(_spec(spec, "teacher"), latents, state, weights, train_log, _runtime(runtime), components)


def train(
    spec: SpecOption,
    teacher: PathOption,
    latents: PathOption,
    state: PathOption,
    generator: PathOption,
    networks: PathOption,
    snapshots: PathOption,
    train_log: PathOption,
    pairs: OptionalPath = None,
    start: OptionalPath = None,
    components: OptionalPath = None,
    runtime: RuntimeOption = "{}",
) -> None:
    """Train a student."""
    from dmd2.stages import train as stage

    out = stage.TrainOutputs(generator, networks, snapshots, train_log)
    stage.train(_spec(spec, "train"), teacher, latents, pairs, start, state, out, _runtime(runtime), components)


def import_student(
    spec: SpecOption, generator: OptionalPath = None, networks: OptionalPath = None, teacher: OptionalPath = None
) -> None:
    """Import a released student from the file or folder that the spec names."""
    from dmd2.stages import imports

    imports.student(_spec(spec, "import"), generator, networks, teacher)


def features(spec: SpecOption, weights: PathOption, images: OptionalPath = None) -> None:
    """Train or copy the feature extractor of the Frechet distance."""
    from dmd2.stages import measure

    measure.features(_spec(spec, "features"), images, weights)


def reference(
    spec: SpecOption, images: PathOption, extractor: PathOption, out: PathOption, runtime: RuntimeOption = "{}"
) -> None:
    """Compute the statistics of the real images."""
    from dmd2.stages import measure

    measure.reference(_spec(spec, "reference"), images, extractor, out, _runtime(runtime))


def sample(
    spec: SpecOption,
    weights: PathOption,
    manifest: PathOption,
    components: OptionalPath = None,
    runtime: RuntimeOption = "{}",
) -> None:
    """Sample from the teacher or a student."""
    from dmd2.stages import sample as stage

    stage.sample(_spec(spec, "sample"), weights, manifest, _runtime(runtime), components)


def metrics(
    spec: SpecOption,
    reference: PathOption,
    extractor: PathOption,
    out: PathOption,
    samples: OptionalPath = None,
    weights: OptionalPath = None,
    components: OptionalPath = None,
    state: PathOption = Path("state"),
    runtime: RuntimeOption = "{}",
) -> None:
    """Measure a set of samples, or samples of a model's weights; without either the floor."""
    from dmd2.stages import measure

    measured = measure.SampleSource(samples, weights, components)
    measure.metrics(_spec(spec, "metrics"), measured, reference, extractor, state, out, _runtime(runtime))


def latency(
    spec: SpecOption,
    weights: PathOption,
    out: PathOption,
    components: OptionalPath = None,
    runtime: RuntimeOption = "{}",
) -> None:
    """Time one image of a teacher or a student, and count its network passes."""
    from dmd2.stages import latency as stage

    stage.latency(_spec(spec, "latency"), weights, out, _runtime(runtime), components)


def curve(
    spec: SpecOption,
    snapshots: PathOption,
    reference: PathOption,
    extractor: PathOption,
    out: PathOption,
    components: OptionalPath = None,
    state: PathOption = Path("state"),
    runtime: RuntimeOption = "{}",
) -> None:
    """Measure a run's snapshots."""
    from dmd2.stages import curves

    curves.curve(_spec(spec, "curve"), snapshots, reference, extractor, state, out, _runtime(runtime), components)


def select(
    spec: SpecOption, snapshots: PathOption, generator: PathOption, weights: PathOption, curve: OptionalPath = None
) -> None:
    """Copy a run's snapshot of one iteration, or the best by FID on its curve."""
    from dmd2.stages import curves

    curves.select(_spec(spec, "select"), curve, snapshots, generator, weights)


def _named(items: list[str]) -> dict[str, Path]:
    """NAME=FILE options as a mapping."""
    return {name: Path(path) for name, _, path in (item.partition("=") for item in items)}


def curves(
    log: Annotated[list[str], typer.Option(help="RUN=FILE, repeated")],
    curve: Annotated[list[str], typer.Option(help="RUN=FILE, repeated")],
    real: PathOption,
    folder: PathOption,
) -> None:
    """Draw training logs and quality curves."""
    from dmd2.stages import figures

    figures.curves(_named(log), _named(curve), real, folder)


def grid(manifest: PathOption, out: PathOption) -> None:
    """Draw a sheet of samples, one class per column."""
    from dmd2.stages import figures

    figures.grid(manifest, out)


def compare(panels: Annotated[list[str], typer.Argument(help="TITLE=FILE ...")], out: PathOption) -> None:
    """Draw sets of samples side by side."""
    from dmd2.stages import figures

    figures.compare(_named(panels), out)


def configuration(preset: str, runs: str, out: PathOption) -> None:
    """Write the resolved configuration."""
    from dmd2.stages import figures

    figures.configuration(preset, runs, out)


def table(
    spec: SpecOption,
    source: PathOption,
    csv: PathOption,
    markdown: PathOption,
    metrics: Annotated[list[str] | None, typer.Option(help="ENTRY=FILE, repeated")] = None,
    latency: Annotated[list[str] | None, typer.Option(help="ENTRY=FILE, repeated")] = None,
    content: Annotated[str, typer.Option(help="what identifies the source and the entries in the record")] = "",
) -> None:
    """Fill a table with metric records."""
    from dmd2.stages import tables

    records = tables.Records(_named(metrics or []), _named(latency or []))
    tables.table(_spec(spec, "table"), source, records, csv, markdown, content)


COMMANDS = (
    *(shards, components, latents, pairs, teacher, train, import_student, features, reference, sample, metrics),
    *(latency, curve, select, curves, grid, compare, configuration, table),
)
