"""What jobs request from Slurm: the site file of `profiles/slurm`, and its comparison with the cluster.

Does not import torch (used by the workflow).
"""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from dmd2.config.base import Model
from dmd2.config.reading import parse, read_yaml
from dmd2.errors import UserError, suggestion

SMALL = frozenset({"compare", "configuration", "curves", "floor", "grid", "real_grid", "select", "table"})
"""Rules that take seconds or few minutes on any preset."""
TRAINING = frozenset({"curve", "pairs", "teacher", "train"})
"""Rules that go on where an earlier job was ended, and may last longer than any time limit."""
SMALL_MINUTES, SHORT_MINUTES = 30, 480
"""Time limits of `SMALL` rules, and of GPU rules that are neither small nor `TRAINING`."""
SMALL_MB, CPU_MB = 4000, 8000
"""Memory of `SMALL` rules, and the least of other CPU jobs."""
THREAD_MB = 2000
REQUESTED = (
    "slurm_account",
    "slurm_partition",
    "slurm_extra",
    "qos",
    "constraint",
    "runtime",
    "mem_mb",
    "gpu_model",
    "cpus_per_gpu",
    "cpus_per_task",
    "tasks",
    "tasks_per_gpu",
    "mpi",
)
"""The resources that `Site.request` may set, by the names of Snakemake's Slurm executor."""


class CpuJobs(Model):
    """Jobs without a GPU."""

    partition: str | None = None
    minutes: int = Field(240, gt=0, description="longest time limit")


class GpuJobs(Model):
    """Jobs with GPUs; `cpus` and `mem_mb` (MB) are for each GPU."""

    partition: str | None = None
    minutes: int = Field(1440, gt=0, description="longest time limit, that of trainings")
    model: str | None = Field(None, pattern="^[a-zA-Z0-9_.]+$", description="type of GPU; none: any")
    per_node: int = Field(8, gt=0, description="GPUs of a node")
    cpus: int = Field(8, gt=0)
    mem_mb: int = Field(60000, gt=0)
    constraint: str | None = None
    warning_seconds: int = Field(120, ge=0, lt=65536, description="SIGTERM comes this long before the time limit")


class Site(Model):
    """The keys of a site file."""

    account: str | int | None = None
    qos: str | None = None
    state: str = "state"
    cpu: CpuJobs = CpuJobs()
    gpu: GpuJobs = GpuJobs()

    def request(self, rule: str, gpus: int, nodes: int, threads: int) -> dict[str, str | int]:
        """The resources of a job of `rule` with `gpus` in all on `nodes`, a subset of `REQUESTED`."""
        part = self.gpu if gpus else self.cpu
        wanted = {"slurm_account": self.account, "slurm_partition": part.partition, "qos": self.qos}
        wanted |= self._of_gpus(rule, gpus, nodes) if gpus else self._of_cpus(rule, threads)
        if nodes > 1:  # the rule's command starts a task on each node with srun; see workflow/launch.sh
            wanted |= {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}
        return {name: value for name, value in wanted.items() if value is not None}

    def _of_cpus(self, rule: str, threads: int) -> dict[str, str | int | None]:
        if rule in SMALL:
            return {"runtime": min(SMALL_MINUTES, self.cpu.minutes), "mem_mb": SMALL_MB}
        return {"runtime": self.cpu.minutes, "mem_mb": max(CPU_MB, THREAD_MB * threads)}

    def _of_gpus(self, rule: str, gpus: int, nodes: int) -> dict[str, str | int | None]:
        gpu, on_a_node = self.gpu, gpus // nodes
        minutes = gpu.minutes if rule in TRAINING else min(SHORT_MINUTES, gpu.minutes)
        cpus = {"cpus_per_task": gpu.cpus * on_a_node} if nodes > 1 else {"cpus_per_gpu": gpu.cpus}
        extra = [f"--signal=TERM@{gpu.warning_seconds}"] if gpu.warning_seconds else []
        if nodes > 1:  # else Slurm may give one node more of them
            extra.append(f"--gpus-per-node={gpu.model + ':' if gpu.model else ''}{on_a_node}")
        return {
            "runtime": minutes,
            "mem_mb": gpu.mem_mb * on_a_node,  # Slurm counts it on each node
            "gpu_model": gpu.model,
            "constraint": gpu.constraint,
            "slurm_extra": " ".join(extra) or None,
            **cpus,
        }


def read_site(path: Path) -> Site:
    """Reads a site file. Raises UserError naming file, key and remedy."""
    return parse(Site, read_yaml(path), str(path))


Run = Callable[..., str | None]


class Node(NamedTuple):
    """Nodes that `sinfo` lists in one line: a partition's, with equal GPUs."""

    partition: str
    is_default: bool
    is_up: bool
    minutes: float
    gpus: list[tuple[str, int]]  # (type or nothing, number)
    cpus: int
    mem_mb: int

    def is_in(self, partitions: str | None) -> bool:
        """Whether it is in one of the partitions, separated by commas as for `sbatch`; None is the default one."""
        return self.is_default if partitions is None else self.partition in partitions.split(",")


def ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_site(site: Site, where: str, gpus: int, run: Run = ask) -> None:
    """Compares a site file with the cluster, before anything is submitted. `gpus` is the largest number on a node.

    Raises UserError naming the key of the site file to change, or if Slurm does not answer.
    """
    if (problem := next(problems(site, where, gpus, run), None)) is not None:
        raise UserError(problem)


def check_status_command(command: str | None, run: Run = ask) -> None:
    """Raises UserError if the command that the profile queries jobs with, `sacct` unless it says so, fails here."""
    if command != "squeue" and run("sacct", "--noheader", "--allocations", "--starttime=now") is None:
        raise UserError(
            "`sacct` fails here, so that the end of no job would be seen; set slurm-status-command: squeue in"
            " profiles/slurm/profile.v9+.yaml"
        )


def problems(site: Site, where: str, gpus: int, run: Run = ask) -> Iterator[str]:
    """What in a site file does not fit the cluster: the key with its file, what is wrong and what to write instead."""
    if gpus > site.gpu.per_node:
        yield (
            f"{where}: gpu.per_node is {site.gpu.per_node}, but a job requests {gpus} GPUs on a node; say"
            f" `--config gpus={site.gpu.per_node}`, with `nodes=N` for more in all, or correct gpu.per_node"
        )
    if (nodes := read_nodes(run)) is None:
        yield "Slurm does not answer: `sinfo` fails here; run this again where and when it works"
        return
    parts: dict[str, CpuJobs | GpuJobs] = {"cpu": site.cpu} | ({"gpu": site.gpu} if gpus else {})
    for key, part in parts.items():
        if problem := _of_partition(part.partition, nodes):
            yield f"{where}: {key}.partition {problem}"
            continue
        offered = [node for node in nodes if node.is_in(part.partition)]
        if not any(node.is_up for node in offered):
            yield f"{where}: {key}.partition {part.partition or ''} is down; wait, or name another"
        if part.minutes > (limit := max(node.minutes for node in offered)):
            name = part.partition or offered[0].partition
            yield f"{where}: {key}.minutes is {part.minutes}, but partition {name} allows {limit:.0f}; use at most that"
        if key == "gpu":
            yield from _of_gpus(site.gpu, gpus, offered, where)
    yield from _of_account(site.account, where, run)


def read_nodes(run: Run = ask) -> list[Node] | None:
    """The nodes of each partition; None if Slurm does not answer."""
    answer = run("sinfo", "--noheader", "--format=%P|%a|%l|%G|%c|%m")
    if answer is None:
        return None
    nodes = []
    for line in answer.split():
        if line.count("|") == 5:
            name, up, limit, gres, cpus, memory = line.split("|")
            gpus = [(kind, int(num)) for kind, num in re.findall(r"gpu:(?:([\w.]+):)?(\d+)", gres)]
            counts = int(cpus.rstrip("+")), int(memory.rstrip("+"))
            nodes.append(Node(name.rstrip("*"), name.endswith("*"), up == "up", minutes_of(limit), gpus, *counts))
    return nodes


def minutes_of(limit: str) -> float:
    """Slurm's time limit (`MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM:SS`) in minutes; infinity if it is none."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return float("inf")
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _of_partition(partitions: str | None, nodes: list[Node]) -> str | None:
    """What is wrong unless the cluster has each of the partitions."""
    names = {node.partition for node in nodes}
    if partitions is None:
        wanted = f"is null, and the cluster has no default partition; use one of {', '.join(sorted(names))}"
        return None if any(node.is_default for node in nodes) else wanted
    missing = next((name for name in partitions.split(",") if name not in names), None)
    return missing and f"is {partitions!r}, which this cluster does not have; {suggestion(missing, names)}"


def _of_gpus(gpu: GpuJobs, gpus: int, nodes: list[Node], where: str) -> Iterator[str]:
    """Unless a node has that many GPUs of that type, with processors and memory for them."""
    found = [(kind, (num, node.cpus, node.mem_mb)) for node in nodes for kind, num in node.gpus]
    kinds = sorted({kind for kind, _ in found if kind})
    if not found:
        yield f"{where}: gpu.partition is {gpu.partition!r}, whose nodes have no GPU; name another partition"
        return
    if gpu.model is not None and gpu.model not in kinds:
        have = suggestion(gpu.model, kinds) if kinds else "its GPUs have no type: use null"
        yield f"{where}: gpu.model is {gpu.model!r}, which the partition does not have; {have}"
        return
    sizes = [size for kind, size in found if gpu.model in (None, kind)]
    for i, (key, wanted) in enumerate({"per_node": gpus, "cpus": gpus * gpu.cpus, "mem_mb": gpus * gpu.mem_mb}.items()):
        if wanted > (most := max(size[i] for size in sizes)):
            yield (
                f"{where}: gpu.{key}: a job of {gpus} GPUs requests {wanted}, but a node has {most}; use at most"
                f" {most if key == 'per_node' else most // gpus}"
            )


def _of_account(account: str | int | None, where: str, run: Run) -> Iterator[str]:
    """Unless the account is one of the user's, where there is an accounting database that knows."""
    command = ("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}")
    known = sorted(set((run(*command, "format=account") or "").split()))
    if account is not None and known and str(account).lower() not in map(str.lower, known):
        yield f"{where}: account is {account!r}, which is not yours; {suggestion(str(account), known)}"
