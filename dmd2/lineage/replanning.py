"""Which jobs run again by the records beside their outputs: planning that does not depend on Snakemake's memory.

Snakemake keeps what a job was started with in `.snakemake`. Without it (deleted, or a tree that was copied) it compares
time stamps alone. `plan_by_records` therefore compares, before Snakemake decides, the digests in the records with those
of the configuration. Does not import torch or Snakemake, whose objects it is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dmd2.errors import UserError
from dmd2.files import read_json
from dmd2.lineage.records import record_path
from dmd2.lineage.spec import read_spec

Differs = Callable[[Any], bool]
"""Whether a job's outputs, which are there, are of something else than the job would make."""


def records_of(outputs: Iterable[str]) -> list[dict[str, Any]]:
    """The records and manifests among and beside the outputs of a job; damaged ones are left to the stages."""
    paths = {Path(path) if path.endswith(".json") else record_path(path) for path in map(str, outputs)}
    found = []
    for path in sorted(paths):
        try:
            found.append(read_json(path))
        except (UserError, OSError):
            continue
    return found


def digest_in(record: Mapping[str, Any]) -> str | None:
    """The digest of a record, a manifest or a list of snapshots."""
    made = record.get("provenance")
    digest = made.get("digest") if isinstance(made, Mapping) else record.get("digest")
    return digest if isinstance(digest, str) else None


def agrees(spec: str, content: str | None, outputs: Iterable[str]) -> bool | None:
    """Whether the records of outputs are of the stage that `spec` (canonical form) describes; None without a record.

    `content` identifies what else determines them, where a record names it.
    """
    records = [record for record in records_of(outputs) if digest_in(record)]
    if not records:
        return None
    wanted = read_spec(spec).digest
    return all(digest_in(record) == wanted and record.get("content", content) == content for record in records)


def is_configuration(preset: str, runs: str, path: str) -> bool:
    """Whether a file of the rule `configuration` shows this preset and these runs, given as JSON."""
    try:
        shown = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return bool(shown == {"preset": json.loads(preset), "runs": json.loads(runs)})


async def plan_by_records(dag: Any, differs: Differs, moment: Callable[[float], Any]) -> None:
    """Before Snakemake decides which jobs of its graph run: takes the records into account.

    A job whose records have another digest than its spec, or for which `differs`, runs again. A job that Snakemake does
    not remember is not started by a newer input that it does not remember either: copying made that time stamp.
    `moment` makes a time stamp of Snakemake's from seconds.
    """
    memory, times = dag.workflow.persistence, dag.workflow.iocache.mtime
    await dag.workflow.iocache.mtime_inventory(dag.jobs)
    unknown: dict[str, bool] = {}

    def is_unknown(path: Any) -> bool:
        if path not in unknown:
            unknown[path] = memory.metadata(path) is None
        return unknown[path]

    for level in dag.toposorted():
        for job in level:
            there = [path for path in job.output if await path.exists()]
            if not there:
                continue
            spec = job.params.get("spec")
            made = agrees(spec, job.params.get("content"), there) if spec else not differs(job)
            if made is False or (spec and differs(job)):
                dag.forcefiles.update(job.output)
            elif made and len(there) == len(job.output) and all(map(is_unknown, job.output)):
                given = [path for path in job.input if not path.is_ancient and is_unknown(path) and await path.exists()]
                newest = max([await _time(path) for path in given], default=0.0)
                for path in there:
                    times[path] = moment(max(newest, await _time(path)))


async def _time(path: Any) -> float:
    """The time stamp of a file as Snakemake takes it, in seconds."""
    return float((await path.mtime()).local_or_storage(follow_symlinks=True))
