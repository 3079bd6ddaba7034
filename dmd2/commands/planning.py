"""Commands besides the stages: cost, planning, job times, external files, and images of finished runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dmd2.config.reading import overrides, read_yaml
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan

WORKFLOW = Path(__file__).parent.parent.parent / "workflow"

PresetOption = Annotated[str, typer.Option(help="a file of workflow/presets")]
WorkflowOption = Annotated[Path, typer.Option(help="folder with presets, runs and tables")]
OverOption = Annotated[
    Path | None, typer.Option("--configfile", help="YAML that overrides the preset, as for Snakemake")
]
MirrorOption = Annotated[str | None, typer.Option(envvar="DMD2_MIRROR", help="base URL; MIRROR/NAME is tried first")]
Layout = Literal["replicate", "shard"]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON output")]


def load_plan(workflow: Path, preset: str, configfile: Path | None) -> Plan:
    over = read_yaml(configfile) if configfile else {}
    return Plan(workflow, preset, overrides(over))


def _print(report: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(report, indent=1) if as_json else text)


def cost(
    preset: PresetOption = "imagenet64",
    run: Annotated[list[str] | None, typer.Option(help="repeatable; dmd2 by default")] = None,
    workflow: WorkflowOption = WORKFLOW,
    configfile: OverOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report the FLOPs of a training step per image, by part, counted on a dry run with meta tensors."""
    from dmd2.cost import report as cost_report
    from dmd2.cost import text as cost_text

    report = cost_report.cost(load_plan(workflow, preset, configfile), run or ["dmd2"])
    _print(report, cost_text.cost(report), as_json)


def plan(
    table: Annotated[list[str], typer.Argument(help="table1, table3, ...")],
    preset: Annotated[str | None, typer.Option(help="a file of workflow/presets; default: the tables' own")] = None,
    gpu: Annotated[str, typer.Option(help="kind of GPU, such as a100-80gb")] = "h100-80gb",
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a training job; default: the preset's")] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="layout of networks on several GPUs; default: the preset's")
    ] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="sustained TFLOP/s of a GPU in bf16")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="maximum samples in a micro-batch; default: the preset's")
    ] = None,
    workflow: WorkflowOption = WORKFLOW,
    configfile: OverOption = None,
    folder: Annotated[Path, typer.Option(help="where Snakemake ran: finished jobs there give rates")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Report the cost of tables: jobs, GPU-hours per row, memory per rank, disk, and files to supply."""
    from dmd2.cost import report as cost_report
    from dmd2.cost import text as cost_text
    from dmd2.cost.finished import read_finished

    found = load_plan(workflow, preset or _presets_of(workflow, table), configfile)
    gpus, layout = gpus or found.preset.gpus or 1, layout or found.preset.runtime.layout
    report = cost_report.tables(
        found, table, cost_report.Machines(gpu, gpus, layout, tflops, micro_batch), read_finished(folder)
    )
    _print(report, cost_text.tables(report), as_json)
    if cramped := [run for run, memory in report["memory"].items() if not memory["fits"]]:
        raise UserError(
            f"{', '.join(cramped)}: needs more memory than a {gpu} has; {_remedy(report, cramped, layout, gpus)}"
        )


def _presets_of(workflow: Path, tables: list[str]) -> str:
    """The default preset of the tables. Raises UserError if they have several or none."""
    from dmd2.report.tables import load_table

    presets = {load_table(workflow / "tables" / f"{table}.yaml").preset for table in tables}
    if len(presets) != 1 or None in presets:
        raise UserError(f"{', '.join(tables)}: not of one preset; choose with --preset, or plan them one by one")
    return str(presets.pop())


def _remedy(report: dict[str, Any], cramped: list[str], layout: str, gpus: int) -> str:
    largest = min(report["memory"][run]["largest_micro_batch"] for run in cramped)
    if largest:
        return f"set runtime.micro_batch_size to at most {largest}"
    if layout == "replicate":
        return f"use --layout shard{'' if gpus > 1 else ' with several --gpus'}, or a larger --gpu"
    return "use more --gpus, or a larger --gpu"


def download(
    name: str,
    entry: Annotated[str, typer.Option(help="the file's entry in workflow/downloads.yaml, as JSON or YAML")],
    record: Annotated[Path, typer.Option()],
    mirror: MirrorOption = None,
) -> None:
    """Check or fetch an external file."""
    from dmd2.stages import download as stage

    stage.download(name, entry, record, mirror)


def downloads(
    preset: Annotated[str | None, typer.Argument(help="name of a preset; none: all known files")] = None,
    workflow: WorkflowOption = WORKFLOW,
    fetch: Annotated[bool, typer.Option("--fetch", help="fetch and check what the preset needs first")] = False,
    mirror: MirrorOption = None,
    configfile: OverOption = None,
) -> None:
    """List the external files of a preset and their state."""
    from dmd2.stages import download as stage

    if fetch and preset is None:
        raise UserError("--fetch needs the name of a preset")
    try:
        if fetch and preset is not None:
            stage.fetch(workflow, preset, mirror, configfile)
    finally:
        typer.echo(stage.listing(workflow, preset, configfile))


def times(
    folder: Annotated[Path, typer.Option(help="where Snakemake ran")] = Path(),
    only: Annotated[str, typer.Option(help="jobs whose log's path contains this text, such as logs/digits")] = "",
    cores: Annotated[int, typer.Option(min=1, help="Snakemake's --cores; default: all of this machine")] = (
        os.cpu_count() or 1
    ),
    as_json: JsonOption = False,
) -> None:
    """Report the time of a workflow: seconds of its jobs by rule, and idle core-seconds."""
    from dmd2.cost import job_times

    report = job_times.report(job_times.read_jobs(folder, only), cores)
    _print(report, job_times.text(report), as_json)


def generate(
    weights: Annotated[Path, typer.Option(help="a run's folder such as results/digits-t2i/dmd2_4step, or its weights")],
    prompt: Annotated[list[str] | None, typer.Option(help="repeatable; for a text-to-image model")] = None,
    classes: Annotated[list[int] | None, typer.Option("--class", help="repeatable; for a model of classes")] = None,
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("generated"),
    num: Annotated[int, typer.Option(min=1, help="images per prompt or class")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int, typer.Option(min=1, help="of a teacher; a student has its run's")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=1, help="of a text-to-image teacher")] = 2.0,
) -> None:
    """Write images of a student or teacher for prompts or classes."""
    from dmd2.stages import generate as stage

    if bool(prompt) == bool(classes):
        raise UserError("name either --prompt or --class, once or several times")
    stage.generate(
        weights, prompt or classes or [], out, num=num, seed=seed, steps=steps, guidance_scale=guidance_scale
    )


def export(
    weights: Annotated[
        Path, typer.Option(help="the folder of a text-to-image run, such as results/digits-t2i/dmd2_4step")
    ],
    out: Annotated[Path, typer.Option(help="folder for the pipeline")],
    lora: Annotated[bool, typer.Option("--lora", help="only the adapters of a run that trains them")] = False,
) -> None:
    """Write a text-to-image student as a folder that a stock DiffusionPipeline loads offline."""
    from dmd2.stages import generate as stage

    stage.export(weights, out, lora=lora)


def demo(
    results: Annotated[Path, typer.Option(help="a text-to-image preset's results")] = Path("results/digits-t2i"),
    run: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: teacher, dmd2_1step and dmd2_4step")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines too")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: the first free one from 7860 on")] = None,
    steps: Annotated[int, typer.Option(min=1, help="of a teacher; a student has its run's")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=1, help="of a teacher")] = 2.0,
) -> None:
    """Serve a page that shows teacher and students side by side for a typed prompt (needs the extra `demo`)."""
    from dmd2.stages import demo as stage

    stage.serve(results, run or list(stage.RUNS), host=host, port=port, steps=steps, guidance_scale=guidance_scale)


COMMANDS = (download, downloads, cost, plan, times, generate, export, demo)
