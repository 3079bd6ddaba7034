"""What a workflow's finished jobs took: GPU-hours, CPU-hours, energy and idle devices, as CSV and as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dmd2.cost.finished import Finished
from dmd2.cost.job_times import JobTime, running_seconds
from dmd2.files import write_text

JOULES_PER_KWH = 3.6e6
COLUMNS = (
    "preset",
    "stage",
    "name",
    "model",
    "device",
    "gpus",
    "threads",
    "wall_s",
    "gpu_hours",
    "cpu_hours",
    "energy_kwh",
)
Row = dict[str, Any]


def rows(jobs: Sequence[Finished]) -> list[Row]:
    """One row per job with the keys COLUMNS; hours are devices times wall time, energy is None where it is unknown."""
    return [
        {
            "preset": job.preset,
            "stage": job.rule,
            "name": job.name,
            "model": job.model,
            "device": job.device,
            "gpus": job.gpus,
            "threads": job.threads,
            "wall_s": round(job.seconds, 1),
            "gpu_hours": job.seconds * job.gpus / 3600,
            "cpu_hours": job.seconds * job.threads / 3600,
            "energy_kwh": None if job.energy_j is None else job.energy_j / JOULES_PER_KWH,
        }
        for job in jobs
    ]


def write_csv(jobs: Sequence[Finished], out: Path) -> None:
    """Writes the rows as CSV, hours with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows(jobs):
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for k, v in row.items()})
    write_text(out, text.getvalue())


def report(jobs: Sequence[Finished], cores: int, gpus: int | None = None) -> dict[str, Any]:
    """What JSON holds: sums by stage and by model, and the idle share of `cores` and of `gpus`.

    Without `gpus` it is the greatest number that was in use at one time.
    """
    every, used = rows(jobs), gpus or busiest(jobs)
    wall = running_seconds(
        [JobTime(job.rule, job.name, job.start, job.start + job.last_s, job.threads) for job in jobs]
    )
    busy_gpu, busy_core = (sum(job.last_s * count for job, count in zip(jobs, counts, strict=True)) for counts in (
        [job.gpus for job in jobs], [min(job.threads, cores) for job in jobs]
    ))  # fmt: skip
    return {
        "jobs": len(jobs),
        "wall_s": wall,
        "cores": cores,
        "gpus": used,
        "idle_core_share": _idle(busy_core, wall * cores),
        "idle_gpu_share": _idle(busy_gpu, wall * used),
        "total": _sums(every),
        "by_stage": _grouped(every, "stage"),
        "by_model": _grouped(every, "model"),
    }


def _idle(busy: float, capacity: float) -> float | None:
    return max(0.0, 1 - busy / capacity) if capacity else None


def busiest(jobs: Iterable[Finished]) -> int:
    """The greatest number of GPUs in use at one time."""
    events = sorted(e for job in jobs if job.gpus for e in ((job.start, job.gpus), (job.start + job.last_s, -job.gpus)))
    found = now = 0
    for _, change in events:
        now += change
        found = max(found, now)
    return found


def _sums(some: Sequence[Row]) -> Row:
    known = [row["energy_kwh"] for row in some if row["energy_kwh"] is not None]
    hours = {key: sum(row[key] for row in some) for key in ("wall_s", "gpu_hours", "cpu_hours")}
    return {"jobs": len(some), **hours, "energy_kwh": sum(known) if known else None}


def _grouped(every: Sequence[Row], key: str) -> list[Row]:
    ordered = sorted(every, key=lambda row: (row["preset"], row[key]))
    groups = groupby(ordered, key=lambda row: (row["preset"], row[key]))
    found = [{"preset": preset, key: name, **_sums(list(group))} for (preset, name), group in groups]
    return sorted(found, key=lambda row: (-row["gpu_hours"], -row["cpu_hours"]))


def text(content: dict[str, Any]) -> str:
    """The report for reading."""
    total = content["total"]
    lines = [
        f"{total['jobs']} jobs, {content['wall_s']:,.0f} s with at least one running: "
        f"{total['gpu_hours']:.4g} GPU-hours, {total['cpu_hours']:.4g} CPU-hours (threads x wall time); "
        f"{energy(total)}.",
        f"Idle while any job ran: {share(content['idle_core_share'])} of {content['cores']} core(s), "
        f"{share(content['idle_gpu_share'])} of {content['gpus']} GPU(s).",
    ]
    for key in ("stage", "model"):
        table = [
            [row["preset"], row[key] or "shared", row["jobs"], row["gpu_hours"], row["cpu_hours"], row["energy_kwh"]]
            for row in content[f"by_{key}"]
        ]
        headers = ["preset", key, "jobs", "GPU-hours", "CPU-hours", "kWh"]
        formats = ("", "", "", ".4g", ".4g", ".4g")
        lines += ["", tabulate(table, headers, floatfmt=formats, missingval="not known")]
    return "\n".join(lines)


def energy(total: Row) -> str:
    """The GPUs' energy as text."""
    if total["energy_kwh"] is None:
        return "energy not known (NVML gives that of GPUs, in training)"
    return f"{total['energy_kwh']:.4g} kWh of the GPUs in training (NVML)"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "none" if value is None else f"{value:.0%}"
