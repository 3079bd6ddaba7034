"""Commands that plan: what a step costs, and what tables take in jobs, GPU-hours, memory, disk and supplies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dmd2.config import Train
from dmd2.cost import gpu_hours
from dmd2.cost.disk import NetworkBytes, Supply, disk, supplies
from dmd2.cost.flops import pass_cost, same_operations, step_cost
from dmd2.cost.gpus import UTILISATION, gpu
from dmd2.cost.memory import Memory, State, measure_memory, sizes_around
from dmd2.cost.placement import Layout, Placement, capacity, check_share, place
from dmd2.lineage.jobs import Job, Jobs, chain, rules
from dmd2.lineage.plan import Plan
from dmd2.report.table_schema import FLOOR, Table
from dmd2.report.tables import load_table, measured_entries

Report = dict[str, Any]
"""What JSON holds."""


@dataclass(frozen=True)
class Machines:
    """Where the jobs would run."""

    gpu: str
    gpus: int
    layout: Layout
    tflops: float | None = None  # sustained in bf16; None takes the assumed share of the peak
    micro_batch: int | None = None  # samples passed at a time; None is the preset's

    def rates(self) -> gpu_hours.Rates:
        """What a GPU sustains; in fp32 it is less by the ratio of its peaks."""
        known = gpu(self.gpu)
        bf16 = self.tflops or UTILISATION * known.bf16
        return gpu_hours.Rates(bf16, bf16 * known.tf32 / known.bf16)


def cost(plan: Plan, runs: Sequence[str]) -> Report:
    """What an image and iteration of each run costs, in FLOPs."""
    teacher, data = plan.preset.teacher, plan.preset.data
    steps = {run: step_cost(teacher, data, plan.run(run).train) for run in runs}
    return {
        "preset": plan.preset.name,
        "pass": asdict(pass_cost(teacher, data)),
        "runs": {
            run: {
                "critic_steps_per_generator": plan.run(run).train.critic_steps_per_generator,
                "parts": dict(step.parts),
                "total": step.total,
                "recomputed": step.recomputed,
            }
            for run, step in steps.items()
        },
    }


def tables(plan: Plan, names: Sequence[str], machines: Machines) -> Report:
    """What the tables `names` take from nothing to the last row."""
    loaded = {name: load_table(plan.folder / "tables" / f"{name}.yaml") for name in names}
    jobs = Jobs(plan)
    entries = dict.fromkeys(entry for table in loaded.values() for entry in measured_entries(table, plan.preset.name))
    keys = {entry: jobs.metrics(entry).key for entry in entries}
    every, costs, rates = jobs.closure(keys.values()), gpu_hours.Costs(plan.preset), machines.rates()
    runs = [job.spec.name for job in every if job.spec.stage == "train"]
    for run in runs:
        check_share(run, plan.run(run).train.batch_size, machines.gpus)
    placements = _placements(plan, runs, machines)
    taken = {job.key: rates.hours(gpu_hours.work(job, plan, costs)) for job in every}
    by_stage: dict[str, float] = {}
    for job in every:
        by_stage[job.spec.stage] = by_stage.get(job.spec.stage, 0.0) + taken[job.key]
    wanted = supplies(plan, every)
    return {
        "preset": plan.preset.name,
        "machines": {**asdict(machines), "rates": asdict(rates), "rates_assumed": machines.tflops is None},
        "jobs": {"download": sum(supply.by_rule for supply in wanted), **rules(every), "table": len(loaded)},
        "rows": _rows(plan, loaded, jobs, keys, taken),
        "gpu_hours": {"total": sum(taken.values()), "by_stage": by_stage},
        "memory": {run: _memory(placement, capacity(gpu(machines.gpu))) for run, placement in placements.items()},
        "supplies": [asdict(supply) for supply in wanted],
        "disk": _disk(plan, every, wanted, placements),
    }


def _rows(
    plan: Plan, loaded: Mapping[str, Table], jobs: Jobs, keys: Mapping[str, str], taken: Mapping[str, float]
) -> list[Report]:
    """Each measured row with the chain of what it needs, its GPU-hours, and those that no row above it has taken."""
    seen: set[str] = set()
    rows = []
    for table in loaded.values():
        for row in table.rows_of(plan.preset.name):
            entry = row.entry(plan.preset.name)
            if entry is None:
                continue
            closure = [job.key for job in jobs.closure([keys[entry]])]
            rows.append(
                {
                    "row": row.id,
                    "method": row.method,
                    "paper_fid": row.paper.get("fid"),
                    "entry": entry,
                    "chain": _chain(plan, entry),
                    "gpu_hours": sum(taken[key] for key in closure),
                    "added_gpu_hours": sum(taken[key] for key in closure if key not in seen),
                }
            )
            seen.update(closure)
    return rows


def _chain(plan: Plan, entry: str) -> list[str]:
    """What is trained or made for an entry, in order."""
    if entry == FLOOR:
        return []
    model, _ = plan.split(entry)
    if model == "teacher":
        return ["teacher"]
    runs = chain(plan, model)
    return [*(["pairs"] if any(plan.run(run).train.regression_weight for run in runs) else []), *runs]


def _micro_batch(plan: Plan, machines: Machines) -> int | None:
    """Samples passed at a time, as given or as the preset says; None for as many as fit."""
    return machines.micro_batch or plan.preset.runtime.micro_batch_size


def _placements(plan: Plan, runs: Iterable[str], machines: Machines) -> dict[str, Placement]:
    """How each run fits on the devices."""
    teacher, data, room = plan.preset.teacher, plan.preset.data, capacity(gpu(machines.gpu))
    recompute = plan.preset.runtime.activation_checkpointing

    def measured(train: Train, parts: int, samples: int) -> Memory:
        sizes = sizes_around(samples)
        return measure_memory(teacher, data, same_operations(train), parts=parts, recompute=recompute, sizes=sizes)

    found = {}
    for run in runs:
        train = plan.run(run).train
        size = _micro_batch(plan, machines)
        found[run] = place(partial(measured, train), room, machines.layout, machines.gpus, train.batch_size, size)
    return found


def _memory(placement: Placement, room: float) -> Report:
    """A run's memory on one rank, in bytes."""
    memory, samples = placement.memory, placement.micro_batch
    return {
        **asdict(memory.state),
        "generator_turn": memory.generator_turn(samples),
        "critic_turn": memory.critic_turn(samples),
        "peak": memory.peak(samples),
        "room": room,
        "share": placement.share,
        "micro_batch": samples,
        "parts": placement.parts,
        "largest_micro_batch": placement.largest,
        "fits": placement.fits,
    }


def _disk(
    plan: Plan, jobs: Sequence[Job], wanted: Sequence[Supply], placements: Mapping[str, Placement]
) -> dict[str, dict[str, float]]:
    if not placements:
        return {}
    downloads = {"downloads": float(sum(supply.bytes or 0 for supply in wanted))}
    room = disk(plan, jobs, gpu_hours.num_images(plan), _stored(placements))
    return room | {"data": (downloads if downloads["downloads"] else {}) | room["data"]}


def _stored(placements: Mapping[str, Placement]) -> NetworkBytes:
    """The largest of the runs' networks, whole."""
    states: list[State] = [placement.whole for placement in placements.values()]
    names = ("generator", "critic", "optimizers", "average")
    return NetworkBytes(**{name: max(getattr(state, name) for state in states) for name in names})
