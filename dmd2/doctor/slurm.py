"""Slurm: whether it answers, and whether the site file of `profiles/slurm` fits it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from dmd2.config.reading import read_yaml
from dmd2.doctor import Check, failed, note, ok
from dmd2.errors import UserError
from dmd2.slurm import check_status_command, problems, read_nodes, read_site

SITE, OPTIONS = "site.yaml", "profile.v9+.yaml"


def slurm(profile: Path, gpus: int = 1) -> Iterator[Check]:
    """The scheduler of this machine against the site file of `profile`, for jobs of `gpus` GPUs on a node."""
    if shutil.which("sinfo") is None:
        yield note("slurm", "no Slurm on this machine: jobs run here")
        return
    nodes = read_nodes()
    if nodes is None:
        yield failed("slurm", "`sinfo` fails", "run it to see why: slurmctld may be down; nothing is lost")
        return
    yield ok("slurm", f"partitions {', '.join(dict.fromkeys(node.partition for node in nodes)) or 'none'}")
    path = profile / SITE
    found = list(problems(read_site(path), str(path), gpus))
    for problem in found:
        fault, _, change = problem.rpartition("; ")
        yield failed("slurm site", fault, change)
    if not found:
        yield ok("slurm site", f"{path} fits this cluster")
    yield _status(profile / OPTIONS)


def _status(options: Path) -> Check:
    """Whether Slurm's answer about jobs can be had by the command that the profile names."""
    command = read_yaml(options).get("slurm-status-command", "sacct")
    try:
        check_status_command(command)
    except UserError as error:
        fault, _, change = str(error).rpartition("; ")
        return failed("slurm status", fault, change)
    return ok("slurm status", f"{command} says how jobs ended")
