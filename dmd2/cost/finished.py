"""Finished jobs of a workflow with their time and devices, from Snakemake's records and those beside the outputs.

Nothing here enters a digest: times are facts about a run, not about its result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmd2.cost.job_times import RECORDS
from dmd2.errors import UserError
from dmd2.lineage.replanning import digest_in, output_named, records_of

LAUNCHED = re.compile(r'DMD2_LAUNCH" (cpu:)?(\d+)')
THREADS = re.compile(r"--threads (\d+)")
CPU = "cpu"


@dataclass(frozen=True)
class Finished:
    """One finished job; `seconds` are of wall time, of a training those of all attempts."""

    preset: str  # "" for a job that belongs to no preset, such as a table
    rule: str
    name: str  # what its log is called: a run, or MODEL-SAMPLER; "" for a job of the whole preset
    start: float  # of the last attempt, in seconds of the epoch
    seconds: float
    last_s: float  # of the last attempt, which Snakemake timed
    threads: int
    gpus: int
    device: str  # the GPU's name as torch gives it, "cuda" where no record names it, "cpu" without one
    energy_j: float | None  # of the GPUs, where NVML measures it
    digest: str | None
    spec: dict[str, Any] | None

    @property
    def model(self) -> str:
        """What the job is for: `teacher` or a run; "" for a job that several runs share."""
        if not self.preset or self.rule in SHARED:
            return ""
        return self.name if self.rule in TRAININGS else self.name.rpartition("-")[0] or self.name

    @property
    def device_hours(self) -> float:
        """GPU-hours of a job with GPUs, CPU-hours of another."""
        return self.seconds * (self.gpus or self.threads) / 3600


TRAININGS, SHARED = ("train", "teacher"), ("real_grid", "floor")


def read_finished(folder: Path) -> list[Finished]:
    """The finished jobs of the workflow that ran in `folder`, by start; none where nothing has run."""
    found: dict[tuple[str, str, str], Finished] = {}
    for path in sorted((folder / RECORDS).rglob("*")):
        if path.is_file() and (job := _job(folder, path)):
            key = (job.preset, job.rule, job.name)
            known = found.setdefault(key, job)
            found[key] = max(known, job, key=lambda each: (each.spec is not None, each.seconds))
    names = list(gpu_names(found.values()))
    device = names[0] if len(names) == 1 else "cuda"  # the trainings' records name it, and all jobs had the same
    jobs = (replace(job, device=device) if job.device == "cuda" else job for job in found.values())
    return sorted(jobs, key=lambda job: (job.start, job.name))


def _job(folder: Path, path: Path) -> Finished | None:
    """The job of one output's record in Snakemake's memory; None where it is unreadable, unfinished or no stage's."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        output = output_named(path.relative_to(folder / RECORDS))
    except (ValueError, OSError):
        return None
    start, end, command = record.get("starttime"), record.get("endtime"), record.get("shellcmd") or ""
    launched = LAUNCHED.search(command)
    if record.get("incomplete") or start is None or end is None or launched is None:
        return None
    threads, gpus = int((THREADS.search(command) or "01")[1]), 0 if launched[1] else int(launched[2])
    made = next((made for made in records_of([str(folder / output)]) if digest_in(made)), {})
    preset, name = _place(record.get("log") or [""], record["rule"])
    device = made.get("device_name") or made.get("device") or ("cuda" if gpus else CPU)
    return Finished(
        preset=preset,
        rule=record["rule"],
        name=name,
        start=start,
        seconds=max(end - start, made.get("train_wall_s") or 0.0),
        last_s=end - start,
        threads=max(threads, int(launched[2]) if launched[1] else 1),
        gpus=gpus,
        device=device if gpus else CPU,
        energy_j=made.get("energy_j"),
        digest=digest_in(made),
        spec=(made.get("provenance") or {}).get("spec"),
    )


def _place(log: list[str], rule: str) -> tuple[str, str]:
    """Preset and name of a job by its log: `logs/PRESET/RULE.log` or `logs/PRESET/RULE/NAME.log`."""
    parts = Path(log[0]).with_suffix("").parts[1:]
    if parts[:1] in (("tables",), ("downloads",)) or not parts:
        return "", parts[-1] if parts else rule
    return parts[0], parts[-1] if len(parts) > 2 else ("teacher" if rule == "teacher" else "")


def gpu_names(jobs: Iterable[Finished]) -> Iterator[str]:
    """The names of the GPUs that trainings ran on, each once."""
    yield from dict.fromkeys(job.device for job in jobs if job.device not in (CPU, "cuda"))


def required(folder: Path) -> list[Finished]:
    """As `read_finished`. Raises UserError where nothing has run."""
    if jobs := read_finished(folder):
        return jobs
    raise UserError(f"{folder / RECORDS}: no record of a finished job; run the workflow in this folder first")
