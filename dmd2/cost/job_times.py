"""Where a workflow's time went: its jobs by rule, and the core seconds that nothing used, from Snakemake's own records.

Snakemake keeps a record of every output in `.snakemake/metadata`, with the rule and the times of its job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dmd2.errors import UserError

RECORDS = Path(".snakemake/metadata")
LONGEST = 10
"""Jobs that the text names one by one."""


@dataclass(frozen=True)
class JobTime:
    """One finished job: its rule, its log as a name, start and end in seconds of the epoch, and its threads."""

    rule: str
    name: str
    start: float
    end: float
    threads: int

    @property
    def seconds(self) -> float:
        """Wall seconds."""
        return self.end - self.start


def read_jobs(folder: Path, pattern: str = "") -> list[JobTime]:
    """The finished jobs of a working folder, by start; of those whose log's path contains `pattern`.

    Raises UserError where there is no record.
    """
    found: dict[tuple[str, str], JobTime] = {}  # a job has a record for each output, with times that differ a little
    for path in (folder / RECORDS).rglob("*"):
        if path.is_file() and (job := _job(json.loads(path.read_text(encoding="utf-8")))) and pattern in job.name:
            known = found.setdefault((job.rule, job.name), job)
            found[job.rule, job.name] = max(known, job, key=lambda each: each.end)
    if not found:
        what = f" whose log's path contains {pattern!r}" if pattern else ""
        raise UserError(f"{folder / RECORDS}: no record of a finished job{what}; run the workflow in this folder first")
    return sorted(found.values(), key=lambda job: (job.start, job.name))


def _job(record: dict[str, Any]) -> JobTime | None:
    """The job of an output's record; None where it has not finished."""
    start, end = record.get("starttime"), record.get("endtime")
    if record.get("incomplete") or start is None or end is None:
        return None
    threads = re.search(r"--threads (\d+)", record.get("shellcmd") or "")
    return JobTime(record["rule"], " ".join(record.get("log") or []), start, end, int(threads[1]) if threads else 1)


def running_seconds(jobs: Iterable[JobTime]) -> float:
    """Wall seconds in which at least one job ran: pauses between two calls of Snakemake do not count."""
    total, until = 0.0, float("-inf")
    for job in sorted(jobs, key=lambda job: job.start):
        total += max(0.0, job.end - max(job.start, until))
        until = max(until, job.end)
    return total


def report(jobs: Sequence[JobTime], cores: int) -> dict[str, Any]:
    """What JSON holds: seconds of each rule and job, and how the cores were used."""
    rules = []
    for rule, group in groupby(sorted(jobs, key=lambda job: job.rule), key=lambda job: job.rule):
        seconds = [job.seconds for job in group]
        rules.append({"rule": rule, "jobs": len(seconds), "seconds": sum(seconds), "longest_s": max(seconds)})
    wall, busy = running_seconds(jobs), sum(job.seconds * min(job.threads, cores) for job in jobs)
    return {
        "cores": cores,
        "wall_s": wall,
        "busy_core_s": busy,
        "idle_core_s": max(0.0, wall * cores - busy),
        "rules": sorted(rules, key=lambda rule: -rule["seconds"]),
        "jobs": [{**asdict(job), "start": job.start - jobs[0].start, "seconds": job.seconds} for job in jobs],
    }


def text(content: dict[str, Any]) -> str:
    """The report for reading."""
    wall, capacity = content["wall_s"], content["wall_s"] * content["cores"]
    rules = [
        [rule["rule"], rule["jobs"], rule["seconds"], rule["seconds"] / content["busy_core_s"], rule["longest_s"]]
        for rule in content["rules"]
    ]
    longest = sorted(content["jobs"], key=lambda job: -job["seconds"])[:LONGEST]
    jobs = [[job["rule"], job["name"], job["start"], job["seconds"], job["threads"]] for job in longest]
    return "\n".join(
        [
            f"{len(content['jobs'])} jobs, {wall:.0f} s with at least one running on {content['cores']} core(s): "
            f"{content['busy_core_s']:.0f} core seconds used, {content['idle_core_s']:.0f} idle "
            f"({content['idle_core_s'] / capacity:.0%})",
            tabulate(rules, ["rule", "jobs", "seconds", "share", "longest"], floatfmt=("", "", ".0f", ".1%", ".0f")),
            f"\nThe longest {len(jobs)} jobs:",
            tabulate(jobs, ["rule", "log", "started at", "seconds", "threads"], floatfmt=("", "", ".0f", ".0f", "")),
        ]
    )
