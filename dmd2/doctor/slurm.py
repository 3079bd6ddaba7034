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
KEYS = {
    **{key: key for key in ("slurm_partition", "slurm_account", "runtime", "gres", "gpu", "gpu_model")},
    "partition": "slurm_partition",
    "account": "slurm_account",
    "minutes": "runtime",
    "model": "gpu_model",
}
"""Keys of site files and profiles, and the resource of Snakemake's Slurm executor that each sets."""
TYPE = re.compile(r"gpu:([A-Za-z][\w.-]*)")
UNSET = re.compile(r"change.?me|^<.*>$|^$", re.IGNORECASE)


class Settings(NamedTuple):
    """What one mapping of a YAML file asks for, by the executor's resource, and the key that says it."""

    file: str
    place: str
    values: dict[str, str]
    keys: dict[str, str]

    def where(self, resource: str) -> str:
        """The key to change, with its file."""
        key = self.keys.get(resource, resource)
        return f"{self.place}.{key} in {self.file}" if self.place else f"{key} in {self.file}"


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
        yield note("slurm site", f"no settings in {profile}", "copy the site file that the page on clusters describes")
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


def site_settings(profile: Path) -> list[Settings]:
    """Every mapping in a profile's YAML files that has keys of Slurm's resources."""
    found: list[Settings] = []

    def search(value: Any, file: str, place: str) -> None:
        if not isinstance(value, dict):
            return
        said = {key: item for key, item in value.items() if key in KEYS and isinstance(item, str | int)}
        if said:
            values = {KEYS[key]: str(item) for key, item in said.items()}
            found.append(Settings(file, place, values, {KEYS[key]: key for key in said}))
        for key, item in value.items():
            search(item, file, f"{place}.{key}" if place else str(key))

    for path in sorted(profile.glob("*.y*ml")) if profile.is_dir() else ():
        try:
            search(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), "")
        except (OSError, yaml.YAMLError):
            continue
    return found


def against(wanted: list[Settings], partitions: dict[str, Partition], accounts: list[str] | None) -> Iterator[Check]:
    """Site settings against what Slurm has; `accounts` are None where there is no data base of them."""
    for settings in wanted:
        name = f"slurm {settings.place}".rstrip()
        if problems := list(_problems(settings, partitions, accounts)):
            yield from (failed(name, *problem) for problem in problems)
        else:
            yield ok(name, ", ".join(f"{settings.keys[key]} {value}" for key, value in settings.values.items()))


def _problems(
    settings: Settings, partitions: dict[str, Partition], accounts: list[str] | None
) -> Iterator[tuple[str, str]]:
    """What is wrong and what to change, for one mapping."""
    for resource in ("slurm_partition", "slurm_account"):
        if UNSET.search(value := settings.values.get(resource, "set")):
            yield f"{settings.keys[resource]} is {value!r}", f"set {settings.where(resource)}"
    account = settings.values.get("slurm_account")
    if account is not None and accounts is not None and not UNSET.search(account) and account not in accounts:
        yield (
            f"account {account} is not yours",
            f"set {settings.where('slurm_account')}: {suggestion(account, accounts)}",
        )
    named = settings.values.get("slurm_partition")
    for part in named.split(",") if named is not None and not UNSET.search(named) else ():
        if part not in partitions:
            change = f"set {settings.where('slurm_partition')}: {suggestion(part, partitions)}"
            yield f"there is no partition {part}", change
        else:
            yield from _of_partition(settings, part, partitions[part])


def _of_partition(settings: Settings, name: str, found: Partition) -> Iterator[tuple[str, str]]:
    values = settings.values
    if not found.up:
        yield f"partition {name} is down", f"wait, or set {settings.where('slurm_partition')} to another"
    asked, gres = values.get("runtime", ""), values.get("gres", "")
    if found.minutes is not None and asked.isdigit() and int(asked) > found.minutes:
        yield (
            f"{settings.keys['runtime']} {asked} min is above the limit of {name}, {found.minutes:g} min",
            f"lower {settings.where('runtime')}: a training that needs longer goes on in the next job",
        )
    kinds = set(TYPE.findall(found.gres))
    model = values.get("gpu_model") or next(iter(TYPE.findall(gres)), "")
    if model and model not in kinds:
        resource = "gpu_model" if "gpu_model" in values else "gres"
        yield f"partition {name} has no GPU {model}", f"set {settings.where(resource)}: {suggestion(model, kinds)}"
    elif "gpu" not in found.gres and (values.get("gpu", "0") != "0" or "gpu" in gres or settings.place == "gpu"):
        yield f"partition {name} has no GPUs", f"set {settings.where('slurm_partition')} to one that has"


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
