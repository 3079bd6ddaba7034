"""Disks: room, the state folder's rights and locks, whether it is shared, clocks, and files from outside."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dmd2 import files
from dmd2.config.data import is_url
from dmd2.datasets import remote
from dmd2.doctor import Check, failed, note, ok
from dmd2.downloads.catalogue import FOLDER, load_catalogue, record_of, state
from dmd2.errors import UserError
from dmd2.stages.download import needed

LEAST_GB = 5.0
"""Free space below which no preset should be started."""
SKEW_S = 2.0
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "wekafs", "fuse.glusterfs", "pvfs2")
"""Types of file systems that several machines can mount."""


def room(folders: tuple[Path, ...]) -> Iterator[Check]:
    """Free space below each folder, and in the cache of remote data."""
    for folder in folders:
        free = shutil.disk_usage(existing(folder)).free / 1e9
        if free < LEAST_GB:
            change = f"free {LEAST_GB:g} GB, or make {folder} a link to a larger disk"
            yield failed(f"room in {folder}", f"{free:.1f} GB free", change)
        else:
            yield ok(f"room in {folder}", f"{free:.0f} GB free; `dmd2 plan` says what a table needs")
    try:
        cache = remote.cache()
    except UserError as error:
        yield failed("cache", str(error), "see docs/data_elsewhere.md")
        return
    kind = file_system(cache.folder)
    found = f"{cache.folder}: {kind}, limit {cache.limit / 1e9:g} GB, {_free(cache.folder):.0f} GB free"
    if kind in SHARED:
        yield note("cache", found, "a node's own disk is faster: set DMD2_CACHE")
    else:
        yield ok("cache", found)


def state_folder(folder: Path, *, several_machines: bool) -> Iterator[Check]:
    """Whether the state folder can be written and locked, is shared where that is needed, and has this clock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
    except OSError as error:
        change = f"give yourself the right to write it, or make {folder} a link to a folder of yours"
        yield failed("state folder", f"{folder}: {error.strerror}", change)
        return
    probe = Path(name)
    try:
        before = time.time()
        os.write(handle, b"x")
        os.fsync(handle)
        after = time.time()
        yield from _lock(probe)
        stamp = os.stat(probe).st_mtime
    finally:
        os.close(handle)
        for left in (probe, probe.with_suffix(".lock")):
            left.unlink(missing_ok=True)
    kind = file_system(folder)
    if several_machines and kind not in SHARED:
        change = f"if other nodes do not see {folder.resolve()}, make it a link to a shared file system"
        yield note("state folder", f"{kind}, which looks like a local disk", change)
    else:
        yield ok(
            "state folder", f"{folder} can be written ({kind}; a flushed write took {1e3 * (after - before):.0f} ms)"
        )
    yield from clock(stamp, before, after)


def clock(stamp: float, before: float, after: float) -> Iterator[Check]:
    """The time stamp of a file that was written between two moments of this machine's clock, in seconds."""
    skew = max(before - stamp, stamp - after, 0.0)
    if skew > SKEW_S:
        change = "synchronise the clocks of this machine and the file server (chrony or NTP)"
        yield failed("clock", f"{skew:.0f} s between this machine and its file system", change)
    else:
        yield ok("clock", f"within {SKEW_S:g} s of the file system's")


def _lock(probe: Path) -> Iterator[Check]:
    first, second = (FileLock(probe.with_suffix(".lock")) for _ in range(2))
    try:
        files.take_lock(first)
    except UserError as error:
        yield failed("locks", str(error), "see docs/data_elsewhere.md")
        return
    try:
        files.take_lock(second).release()
        yield failed("locks", "two holders of one lock", "have the file system mounted with locks (no `nolock`)")
    except Timeout:
        yield ok("locks", "a second holder is refused")
    finally:
        first.release()


def downloads(workflow: Path, preset: str | None, over: Path | None, *, checksums: bool) -> Iterator[Check]:
    """The files from outside that a preset needs; with `checksums` the content of those that are there."""
    if preset is None:
        yield note("downloads", "not checked", "name a preset: --preset imagenet64")
        return
    catalogue = load_catalogue(workflow / "downloads.yaml")
    paths = needed(workflow, preset, over)
    if not paths:
        yield ok("downloads", f"preset {preset} needs nothing from outside")
    for path in paths:
        entry = catalogue.get(Path(path).name) if Path(path).parent == FOLDER else None
        found = state(path, catalogue)
        if found in ("missing", "to be supplied"):
            yield failed(f"file {path}", found, entry.advice(Path(path).name) if entry else "put it there")
        elif is_url(path):
            yield from _elsewhere(path)
        elif checksums and found == "there" and record_of(Path(path).name).exists() and Path(path).is_file():
            yield _compared(path)
        else:
            yield ok(f"file {path}", found)


def _compared(path: str) -> Check:
    record = record_of(Path(path).name)
    wanted = files.read_json(record).get("sha256")
    if files.sha256(path) == wanted:
        return ok(f"file {path}", "there, SHA-256 equals its record's")
    return failed(
        f"file {path}", f"its SHA-256 is not that of {record}", f"delete {path} and {record}, and fetch again"
    )


def _elsewhere(path: str) -> Iterator[Check]:
    if any(sign in path for sign in "*{"):
        yield note(f"file {path}", "a pattern of URLs, which the job that reads them checks")
        return
    try:
        yield ok(f"file {path}", f"elsewhere, {remote.identify(path).size} bytes")
    except (UserError, FileNotFoundError) as error:
        yield failed(f"file {path}", f"cannot be read: {error}", "correct data.path, or upload it")


def file_system(folder: Path) -> str:
    """The type of the file system of a folder, such as ext4 or nfs4; "unknown" where the system does not say."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    place, best = f"{existing(folder)}/", ("", "unknown")
    for line in lines:
        _, point, kind = line.split()[:3]
        if place.startswith(f"{point.rstrip('/')}/") and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _free(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 1e9
