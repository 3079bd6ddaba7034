"""The reports of `cost.report` as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from dmd2.cost.gpus import UTILISATION
from dmd2.cost.memory import GIB
from dmd2.cost.placement import FRAGMENTATION, RESERVED_GIB

TERA, GB = 1e12, 1e9


def cost(report: dict[str, Any]) -> str:
    """What a pass and a step cost."""
    one = report["pass"]
    lines = [
        f"{report['preset']}, TFLOP an image: a pass of the network F = {one['forward'] / TERA:.4g}, of its encoder "
        f"E = {one['encoder'] / TERA:.4g}, of a realism head {one['head'] / TERA:.4g}."
    ]
    for run, step in report["runs"].items():
        rows = [[part, flops / TERA, flops / one["forward"]] for part, flops in step["parts"].items()]
        rows.append(["all", step["total"] / TERA, step["total"] / one["forward"]])
        lines += [
            f"\n{run}: an image and iteration, mean over R = {step['critic_steps_per_generator']}",
            tabulate(rows, ["part", "TFLOP", "in F"], floatfmt=("", ".4g", ".3f")),
            f"({step['recomputed'] / TERA:.2g} more at work: fused attention forms its scores again to go back)",
        ]
    return "\n".join(lines)


def tables(report: dict[str, Any]) -> str:
    """What tables take."""
    return "\n".join([*_rows(report), "", *_jobs(report), "", *_memory(report), "", *_supplies(report), *_disk(report)])


def _rows(report: dict[str, Any]) -> Iterator[str]:
    machines = report["machines"]
    rates = machines["rates"]
    origin = f"ASSUMED: {UTILISATION:.0%} of the peak" if report["machines"]["rates_assumed"] else "as given"
    yield (
        f"{report['preset']} on {machines['gpus']} x {machines['gpu']}: GPU-hours at {rates['bf16']:.0f} TFLOP/s "
        f"sustained in bf16 and {rates['fp32']:.0f} in fp32 ({origin}), counted operations over rate."
    )
    headers = ["row", "method", "paper FID", "entry", "chain", "GPU-hours", "added"]
    rows = [
        [
            *(row[key] for key in ("row", "method", "paper_fid", "entry")),
            " > ".join(row["chain"]),
            _hours(row["gpu_hours"]),
            _hours(row["added_gpu_hours"]),
        ]
        for row in report["rows"]
    ]
    total = report["gpu_hours"]["total"]
    rows.append(["all", "", None, "", "", "", _hours(total)])
    yield tabulate(rows, headers, colalign=("left", "left", "right", "left", "left", "right", "right"))
    yield "`GPU-hours` is all that the row needs; `added` leaves out what a row above it has made already."
    if machines["gpus"] > 1:
        yield f"On {machines['gpus']} GPUs without loss: {_hours(total / machines['gpus'])} hours."


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def _jobs(report: dict[str, Any]) -> Iterator[str]:
    counts, taken = report["jobs"], report["gpu_hours"]["by_stage"]
    rows = [[rule, num, _hours(taken[rule]) if taken.get(rule) else ""] for rule, num in counts.items() if num]
    rows.append(["all", sum(counts.values()), _hours(report["gpu_hours"]["total"])])
    yield "Jobs from nothing to the tables:"
    yield tabulate(rows, ["rule", "jobs", "GPU-hours"], colalign=("left", "right", "right"))


def _memory(report: dict[str, Any]) -> Iterator[str]:
    machines = report["machines"]
    names = ("generator", "critic", "teacher", "optimizers", "average", "generator_turn", "critic_turn", "peak")
    rows = []
    for run, memory in report["memory"].items():
        rows.append(
            [
                run,
                *(memory[name] / GIB for name in names),
                f"{memory['micro_batch']} of {memory['share']}",
                memory["parts"],
                memory["largest_micro_batch"] or "none",
                "yes" if memory["fits"] else "NO",
            ]
        )
    if not rows:
        yield "No run is trained."
        return
    room = next(iter(report["memory"].values()))["room"] / GIB
    yield (
        f"GiB of one rank, layout {machines['layout']}; a {machines['gpu']} has room for {room:.1f} (ASSUMED: "
        f"{RESERVED_GIB:g} reserved, {FRAGMENTATION:.0%} lost by the allocator):"
    )
    turns = ("generator's turn", "critic's turn")
    headers = ["run", *names[:5], *turns, "peak", "samples at a time", "passes", "largest", "fits"]
    yield tabulate(rows, headers, floatfmt=".2f", colalign=("left", *["right"] * 12))
    yield "A turn is gradients, what is kept for the backward pass, and passing values; weights are float32."
    if machines["layout"] == "shard" and machines["gpus"] > 1:
        yield "Sharded figures are an estimate: whole networks' measured ones, with state and gradients divided."


def _supplies(report: dict[str, Any]) -> Iterator[str]:
    rows = [[supply["what"], supply["path"], _state(supply)] for supply in report["supplies"]]
    if rows:
        yield "From outside:"
        yield tabulate(rows, ["what", "file", "state"])
        yield from (f"{supply['path']}: {supply['advice']}" for supply in report["supplies"] if _asks(supply))
        yield ""


def _asks(supply: dict[str, Any]) -> bool:
    """Whether the user has to put the file there."""
    return not supply["there"] and supply["advice"] is not None


def _state(supply: dict[str, Any]) -> str:
    return "there" if supply["there"] else "MISSING, see below" if _asks(supply) else "a job fetches it"


def _disk(report: dict[str, Any]) -> Iterator[str]:
    rows = [
        [place, kind, f"{size / GB:,.1f}"] for place, kinds in report["disk"].items() for kind, size in kinds.items()
    ]
    if rows:
        yield "Disk at most (images at their raw size; state is emptied run by run):"
        yield tabulate(rows, ["folder", "what", "GB"], colalign=("left", "left", "right"))
