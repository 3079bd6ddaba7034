"""What jobs ask Slurm for: the site file of `profiles/slurm`, and its comparison with the cluster.

Does not import torch (used by the workflow).
"""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

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
ASKED = (
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
        """The resources of a job of `rule` with `gpus` in all on `nodes`, a subset of `ASKED`."""
        part = self.gpu if gpus else self.cpu
        asked = {"slurm_account": self.account, "slurm_partition": part.partition, "qos": self.qos}
        asked |= self._of_gpus(rule, gpus, nodes) if gpus else self._of_cpus(rule, threads)
        if nodes > 1:  # the rule's command starts a task on each node with srun; see workflow/launch.sh
            asked |= {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}
        return {name: value for name, value in asked.items() if value is not None}

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
    if gpus > site.gpu.per_node:
        raise UserError(
            f"{where}: gpu.per_node is {site.gpu.per_node}, but a job asks for {gpus} GPUs on a node; say"
            f" `--config gpus={site.gpu.per_node}`, with `nodes=N` for more in all, or correct gpu.per_node"
        )
    answer = run("sinfo", "--noheader", "--format=%R|%G|%l|%c|%m")
    if answer is None:
        raise UserError("Slurm does not answer: `sinfo` fails here; run this again where and when it works")
    rows = [tuple(line.split("|")) for line in answer.split() if line.count("|") == 4]
    for part, key in ((site.cpu, "cpu"), (site.gpu, "gpu")):
        if key == "gpu" and not gpus:
            continue
        names = sorted({row[0] for row in rows})
        if part.partition is not None and part.partition not in names:
            raise UserError(
                f"{where}: {key}.partition is {part.partition!r}, which this cluster does not have;"
                f" {suggestion(part.partition, names)}"
            )
        offered = [row for row in rows if part.partition in (None, row[0])]
        _check_time(part.minutes, offered, f"{where}: {key}.minutes")
    if gpus:
        _check_gpus(site.gpu, gpus, [row for row in rows if site.gpu.partition in (None, row[0])], where)
    _check_account(site.account, where, run)


def minutes_of(limit: str) -> float:
    """Slurm's time limit (`infinite`, `MM:SS`, `HH:MM:SS`, `D-HH:MM:SS`) in minutes."""
    if limit == "infinite":
        return float("inf")
    days, _, rest = limit.rpartition("-")
    hours, minutes, seconds = ([0, 0, 0] + [int(part) for part in rest.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _check_time(minutes: int, rows: list[tuple[str, ...]], key: str) -> None:
    limits = [minutes_of(row[2]) for row in rows if re.fullmatch(r"infinite|[0-9:-]+", row[2])]
    if limits and minutes > max(limits):
        raise UserError(f"{key} is {minutes}, but the partition allows {max(limits):.0f}; use at most that")


def _check_gpus(gpu: GpuJobs, gpus: int, rows: list[tuple[str, ...]], where: str) -> None:
    """The nodes of `rows` have that many GPUs of that type, with processors and memory for them."""
    found = [
        (kind, int(num), int(row[3].rstrip("+")), int(row[4].rstrip("+")))
        for row in rows
        for kind, num in re.findall(r"gpu:(?:([\w.]+):)?(\d+)", row[1])
    ]
    kinds = sorted({kind for kind, *_ in found if kind})
    if not found:
        raise UserError(f"{where}: gpu.partition is {gpu.partition!r}, whose nodes have no GPU; name another partition")
    if gpu.model is not None and gpu.model not in kinds:
        have = suggestion(gpu.model, kinds) if kinds else "its GPUs have no type: use null"
        raise UserError(f"{where}: gpu.model is {gpu.model!r}, which the partition does not have; {have}")
    found = [node for node in found if gpu.model in (None, node[0])]
    for key, i, asked in (("per_node", 1, gpus), ("cpus", 2, gpus * gpu.cpus), ("mem_mb", 3, gpus * gpu.mem_mb)):
        most = max(node[i] for node in found)
        if asked > most:
            raise UserError(
                f"{where}: gpu.{key}: a job of {gpus} GPUs asks for {asked}, but a node has {most}; use at most"
                f" {most if key == 'per_node' else most // gpus}"
            )


def _check_account(account: str | int | None, where: str, run: Run) -> None:
    """The account is one of the user's, where there is an accounting database that knows."""
    command = ("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}")
    known = sorted(set((run(*command, "format=account") or "").split()))
    if account is not None and known and str(account).lower() not in map(str.lower, known):
        raise UserError(f"{where}: account is {account!r}, which is not yours; {suggestion(str(account), known)}")
