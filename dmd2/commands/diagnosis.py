"""`dmd2 doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmd2.commands.planning import WORKFLOW, JsonOption, OverOption, WorkflowOption, load_plan


def doctor(
    preset: Annotated[str | None, typer.Option(help="whose files from outside are looked for")] = None,
    state: Annotated[Path, typer.Option(help="the state folder")] = Path("state"),
    checksums: Annotated[
        bool, typer.Option("--checksums", help="read the files from outside and compare them")
    ] = False,
    profile: Annotated[Path, typer.Option(help="the profile with the site's Slurm settings")] = Path("profiles/slurm"),
    workflow: WorkflowOption = WORKFLOW,
    configfile: OverOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check software, GPUs, disks, clocks, Slurm and files from outside; exit status 1 if one is to be changed."""
    from dmd2 import doctor as report
    from dmd2.doctor import folders, slurm, software

    places = (state, Path("data"), Path("results"))
    has_slurm = slurm.shutil.which("sinfo") is not None
    gpus = load_plan(workflow, preset, configfile).preset.gpus if preset else 1
    checks = [
        ("python", software.python),
        ("packages", software.packages),
        ("driver", software.driver),
        ("kernel", software.kernel),
        ("nccl", software.exchange),
        ("room", lambda: folders.room(places)),
        ("state folder", lambda: folders.state_folder(state, several_machines=has_slurm)),
        ("slurm", lambda: slurm.slurm(profile, gpus)),
        ("downloads", lambda: folders.downloads(workflow, preset, configfile, checksums=checksums)),
    ]
    found = []
    for check in report.run(checks):
        found.append(check)
        if not as_json:
            typer.echo(report.text([check]))
    if as_json:
        typer.echo(report.as_json(found))
    if any(check.state == "failed" for check in found):
        raise typer.Exit(1)


COMMANDS = (doctor,)
