"""Commands about finished and running work: what it cost, the page of results, and a view of running jobs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dmd2.commands.planning import WORKFLOW, JsonOption, OverOption, PresetOption, WorkflowOption
from dmd2.config.reading import overrides, read_yaml
from dmd2.lineage.plan import Plan

FolderOption = Annotated[Path, typer.Option(help="where Snakemake ran")]


def costs(
    folder: FolderOption = Path(),
    cores: Annotated[int, typer.Option(min=1, help="Snakemake's --cores; default: all of this machine")] = (
        os.cpu_count() or 1
    ),
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that could be used; default: most at one time")] = None,
    as_json: JsonOption = False,
) -> None:
    """Report what finished jobs took: GPU-hours, CPU-hours, energy, idle share; writes results/costs.csv."""
    from dmd2.cost import finished, spending

    jobs = finished.required(folder)
    spending.write_csv(jobs, folder / "results/costs.csv")
    report = spending.report(jobs, cores, gpus)
    typer.echo(json.dumps(report, indent=1) if as_json else spending.text(report))


def write_page(folder: Path, workflow: Path) -> Path:
    """Writes results/costs.csv and results/index.html of the workflow that ran in `folder`; returns the page's path."""
    from dmd2.cost import finished, spending
    from dmd2.report import page

    jobs = finished.read_finished(folder)
    if jobs:
        spending.write_csv(jobs, folder / "results/costs.csv")
    report = spending.report(jobs, os.cpu_count() or 1) if jobs else None
    return page.write(folder / "results", workflow, report)


def report(folder: FolderOption = Path(), workflow: WorkflowOption = WORKFLOW) -> None:
    """Write results/index.html: tables, pictures, curves, sheets, diagnostics, costs and provenance in one file."""
    typer.echo(f"open {write_page(folder, workflow)}")


def watch(
    preset: PresetOption = "digits",
    folder: FolderOption = Path(),
    workflow: WorkflowOption = WORKFLOW,
    configfile: OverOption = None,
    samples: Annotated[bool, typer.Option(help="draw the newest snapshots' samples, on the CPU")] = True,
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines too")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 7861,
) -> None:
    """Serve a page about running jobs: progress, curves, and samples of the newest snapshots. Changes nothing."""
    from dmd2.stages import watch as stage

    over = read_yaml(configfile) if configfile else {}
    plan = Plan(workflow, preset, overrides(over))
    with stage.server(stage.Watch(folder, plan, samples=samples), host, port) as server:
        typer.echo(f"open http://{host}:{server.server_port}; Ctrl-C ends it")
        server.serve_forever()


COMMANDS = (costs, report, watch)
