"""Rows of the step benchmark: what was measured of a run, as CSV and for reading."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dmd2.config import Train
from dmd2.cost import gpus
from dmd2.cost.flops import step_cost
from dmd2.cost.memory import GIB
from dmd2.cost.step_parts import DATA, PARTS
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import commit, versions
from dmd2.method.distillation import Distillation
from dmd2.training import ranks
from dmd2_kernels import implementation

Row = dict[str, Any]


def column(part: str) -> str:
    """The column with the milliseconds of a part."""
    return f"ms_{part.replace(chr(39), '').replace(' ', '_')}"


TIMES = {part: column(part) for part in (*PARTS, "rest")}
COLUMNS = (
    *("preset", "run", "device", "kernels", "ranks", "threads", "precision", "layout", "compile", "recompute", "batch"),
    *("micro_batch", "iterations", "ms", "ms_pass", "images_per_s", "tflop_per_image", "tflops", "percent_of_peak"),
    *("ms_busy", "peak_memory_gib", *TIMES.values()),
    *("torch", "triton", "commit", "timestamp"),
)


def row_of(
    plan: Plan, name: str, train: Train, run: Distillation, times: tuple[float, float, Mapping[str, float]], bare: float
) -> Row:
    """What was measured of a run, by column; empty where nothing is known."""
    plain, whole, parts = times
    device, flops = run.device, step_cost(plan.preset.teacher, plan.preset.data, train).total
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rate = run.micro_batches.num * run.micro_batches.size / plain * 1000  # of this rank
    gpu, tflops = gpus.known(label), flops * rate / 1e12
    beside = parts.get(DATA, 0.0) if device.type == "cuda" else 0.0
    return {
        "preset": plan.preset.name,
        "run": name,
        "device": label,
        "kernels": implementation(torch.empty(0, device=device)),
        "ranks": ranks.world_size(),
        "threads": torch.get_num_threads(),
        "precision": train.precision,
        "batch": train.batch_size,
        "micro_batch": run.micro_batches.size,
        "ms": f"{plain:.2f}",
        "ms_pass": f"{bare:.2f}",
        "images_per_s": f"{rate * ranks.world_size():.1f}",
        "tflop_per_image": f"{flops / 1e12:.6g}",
        "tflops": f"{tflops:.4g}",
        "percent_of_peak": f"{100 * tflops / gpu.peak(train.precision):.1f}" if gpu else "",
        "peak_memory_gib": f"{torch.cuda.max_memory_allocated(device) / GIB:.2f}" if device.type == "cuda" else "",
        **{TIMES[part]: f"{ms:.3f}" for part, ms in parts.items()},
        "ms_rest": f"{max(whole - sum(parts.values()) + beside, 0.0):.3f}",
        "torch": torch.__version__,
        "triton": versions().get("triton", ""),
        "commit": commit(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _in_passes(row: Row) -> float:
    """The step in units of a bare pass over all samples that it takes on this rank."""
    parts = row["batch"] // row["ranks"] // row["micro_batch"]
    return float(row["ms"]) / (parts * float(row["ms_pass"]))


def text_of(row: Row) -> str:
    """A row for reading."""
    share = f" ({row['percent_of_peak']} % of its peak)" if row["percent_of_peak"] else ""
    memory = f", peak memory {row['peak_memory_gib']} GiB" if row["peak_memory_gib"] else ""
    lines = [
        f"{row['preset']}/{row['run']} on {row['ranks']} x {row['device']} ({row['kernels']} kernels), "
        f"{row['threads']} thread(s), "
        f"{row['precision']}, batch {row['batch']}, {row['micro_batch']} at a time: {row['ms']} ms/iteration, "
        f"{row['images_per_s']} images/s, {row['tflops']} TFLOP/s{share}{memory}",
        f"  {_in_passes(row):.2f} times a bare forward and backward pass of the generator over the same samples; "
        f"{row['micro_batch']} take it {row['ms_pass']} ms",
    ]
    times = {part: float(row[name]) for part, name in TIMES.items() if row.get(name)}
    whole = sum(times.values())
    lines += [f"  {part:24s}{ms:10.2f} ms {100 * ms / whole:6.1f} %" for part, ms in times.items()]
    return "\n".join(lines)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV. Raises UserError where it has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and path.read_text().partition("\n")[0] != ",".join(COLUMNS):
        raise UserError(f"{path}: has other columns than this version writes; move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
