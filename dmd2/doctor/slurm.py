"""Slurm: whether it answers, and whether the partitions, accounts, GPUs and times of profiles/slurm exist in it."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dmd2.doctor import Check, failed, note, ok
from dmd2.errors import suggestion

TIMEOUT_S = 30
KEYS = ("slurm_partition", "slurm_account", "runtime", "gres", "gpu", "gpu_model", "slurm_constraint")
UNSET = re.compile(r"change.?me|^<.*>$|^$", re.IGNORECASE)


class Partition(NamedTuple):
    """A partition as sinfo shows it: whether it is up, its time limit in minutes (None: none), its GPUs per node."""

    up: bool
    minutes: float | None
    gres: str


def slurm(profile: Path) -> Iterator[Check]:
    """The scheduler of this machine against the site settings in the YAML files of `profile`."""
    if shutil.which("sinfo") is None:
        yield note("slurm", "no Slurm on this machine: jobs run here")
        return
    done = _run("sinfo", "--noheader", "--format=%R|%a|%l|%G")
    if done.returncode:
        said = " ".join(done.stderr.split())[:160]
        yield failed("slurm", f"sinfo: {said}", "wait until slurmctld answers, or see SLURM_CONF; nothing is lost")
        return
    partitions = read_sinfo(done.stdout)
    yield ok("slurm", f"partitions {', '.join(partitions) or 'none'}")
    wanted = site_settings(profile)
    if not wanted:
        yield note("slurm site", f"no settings in {profile}", "copy the site file that docs/clusters.md describes")
        return
    yield from against(wanted, partitions, _accounts())


def read_sinfo(text: str) -> dict[str, Partition]:
    """Partitions by name, from lines `NAME|up|1-00:00:00|gpu:a100:8`."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, up, limit, gres = [*line.split("|"), "", "", ""][:4]
        before = found.get(name.rstrip("*"))
        both = gres if before is None else f"{before.gres},{gres}"
        found[name.rstrip("*")] = Partition(up == "up", minutes_of(limit), both)
    return found


def minutes_of(limit: str) -> float | None:
    """Minutes of a time limit of Slurm's: `30`, `30:00`, `12:00:00`, `2-12`, `2-12:00:00`; None for `infinite`."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return None
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    if len(parts) == 3:
        return parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)


def site_settings(profile: Path) -> list[tuple[str, str, dict[str, str]]]:
    """(file, place, settings) of every mapping in a profile's YAML files that has keys of Slurm's resources."""
    found: list[tuple[str, str, dict[str, str]]] = []

    def search(value: Any, file: str, place: str) -> None:
        if not isinstance(value, dict):
            return
        if settings := {key: str(value[key]) for key in KEYS if key in value}:
            found.append((file, place, settings))
        for key, item in value.items():
            search(item, file, f"{place}.{key}" if place else str(key))

    for path in sorted(profile.glob("*.y*ml")) if profile.is_dir() else ():
        try:
            search(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), "")
        except (OSError, yaml.YAMLError):
            continue
    return found


def against(
    wanted: list[tuple[str, str, dict[str, str]]], partitions: dict[str, Partition], accounts: list[str] | None
) -> Iterator[Check]:
    """Site settings against what Slurm has; `accounts` are None where there is no data base of them."""
    default = next((s["slurm_partition"] for _, _, s in wanted if "slurm_partition" in s), None)
    for file, place, settings in wanted:
        name = f"slurm {place}"
        problems = []
        for key in ("slurm_partition", "slurm_account"):
            if key in settings and UNSET.search(settings[key]):
                problems.append((f"{key} is {settings[key]!r}", f"set {place}.{key} in {file}"))
        named = settings.get("slurm_partition", default)
        if named is not None and not UNSET.search(named):
            problems += _partition_problems(settings, named, partitions, f"{place} in {file}")
        account = settings.get("slurm_account")
        if account is not None and accounts is not None and not UNSET.search(account) and account not in accounts:
            change = f"set {place}.slurm_account in {file}: {suggestion(account, accounts)}"
            problems.append((f"account {account} is not yours", change))
        if problems:
            yield from (failed(name, *problem) for problem in problems)
        else:
            yield ok(name, ", ".join(f"{key} {value}" for key, value in settings.items()))


def _partition_problems(
    settings: dict[str, str], named: str, partitions: dict[str, Partition], where: str
) -> Iterator[tuple[str, str]]:
    for part in named.split(","):
        if part not in partitions:
            yield f"there is no partition {part}", f"set slurm_partition of {where}: {suggestion(part, partitions)}"
            continue
        found = partitions[part]
        if not found.up:
            yield f"partition {part} is down", f"wait, or set slurm_partition of {where} to another"
        asked = settings.get("runtime", "")
        if found.minutes is not None and asked.isdigit() and int(asked) > found.minutes:
            yield (
                f"runtime {asked} min is above the limit of {part}, {found.minutes:g} min",
                f"lower runtime of {where}: a training that needs longer goes on in the next job",
            )
        kinds = set(re.findall(r"gpu:([A-Za-z][\w.-]*)", found.gres))
        model = settings.get("gpu_model") or next(
            iter(re.findall(r"gpu:([A-Za-z][\w.-]*)", settings.get("gres", ""))), ""
        )
        if model and model not in kinds:
            yield f"partition {part} has no GPU {model}", f"set the GPU type of {where}: {suggestion(model, kinds)}"
        elif "gpu" not in found.gres and (settings.get("gpu", "0") != "0" or "gpu" in settings.get("gres", "")):
            yield f"partition {part} has no GPUs", f"set slurm_partition of {where} to one that has"


def _accounts() -> list[str] | None:
    """The accounts that the user may charge; None without Slurm's accounting."""
    if shutil.which("sacctmgr") is None:
        return None
    query = ("show", "associations", f"user={getpass.getuser()}", "format=account")
    done = _run("sacctmgr", "--noheader", "--parsable2", *query)
    return sorted({line.strip() for line in done.stdout.splitlines() if line.strip()}) if done.returncode == 0 else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {TIMEOUT_S} s")
