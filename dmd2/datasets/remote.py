"""Files that are elsewhere: fetched whole into a cache on this machine's disk, checked, and read from there.

A location is a path, or a URL of http(s), s3 or another file system of fsspec. Only this module knows the difference.
HTTP is fetched by `dmd2.downloads.fetch` (continued where a connection broke), everything else in pieces by fsspec.

DMD2_CACHE names the cache's folder, which should lie on a node's own disk (default: a folder of the user's in the
folder for temporary files), DMD2_CACHE_GB its largest size in GB (1e9 bytes; default 50). Any number of processes may
share it: one fetches a file while the others wait for it, and the files used longest ago are removed first. A removed
file stays readable for a process that has it open.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

from filelock import FileLock

from dmd2 import files
from dmd2.config.data import is_url
from dmd2.datasets import stores
from dmd2.datasets.stores import Identity, identify, matching, shown
from dmd2.downloads.fetch import Fetch, Refused
from dmd2.errors import UserError

PIECE = 2**23
"""Bytes that are requested at a time from what is not HTTP."""
STALE_S = 24 * 3600
"""Seconds after which the part of a file that a killed process left behind is removed."""
DEFAULT_GB = 50.0
__all__ = ["Cache", "cache", "checksums", "discard", "identify", "join", "matching", "open_location", "shown"]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s,;)]+")


def join(manifest: Path | str, name: str) -> str:
    """The location of the file `name` beside a manifest; `name` may itself be a location."""
    if is_url(name) or os.path.isabs(name):
        return name
    base = str(manifest)
    return f"{base.rpartition('/')[0]}/{name}" if is_url(base) else str(Path(base).parent / name)


def open_location(location: str, sha256: str | None = None, size: int | None = None) -> BufferedReader:
    """Opens a file for reading, wherever it is. `sha256` and `size` (bytes) of a remote one are checked, if known.

    Raises FileNotFoundError for a local path without a file, and UserError naming the URL for a remote file that
    cannot be fetched, is another one or does not fit.
    """
    return cache().open(location, sha256, size) if is_url(location) else open(location, "rb")


def discard(location: str, sha256: str) -> None:
    """Removes a remote file from the cache, so that the next `open_location` fetches it again."""
    cache().path(location, sha256).unlink(missing_ok=True)


@dataclass(frozen=True)
class Cache:
    """Fetched files in `folder`, of at most `limit` bytes together."""

    folder: Path
    limit: int

    def path(self, url: str, sha256: str | None) -> Path:
        """Where a file is kept: by its checksum or, if that is not known, by its URL and the server's version of it."""
        if sha256 is None:
            found = _identity(url)
            sha256 = hashlib.sha256(f"{url} {found.size} {found.version}".encode()).hexdigest()
        return self.folder / "files" / sha256

    def open(self, url: str, sha256: str | None = None, size: int | None = None) -> BufferedReader:
        """The open file, fetched if it is not there."""
        try:
            path = self.path(url, sha256)
            size = size if size is not None or sha256 is not None else _identity(url).size
        except FileNotFoundError:
            raise UserError(f"{shown(url)}: no such file; upload it or correct the path") from None
        while True:
            self._provide(path, url, sha256, size)
            try:
                file = path.open("rb")
                os.utime(path)
                return file
            except FileNotFoundError:  # another process has just made room
                continue

    def _provide(self, path: Path, url: str, sha256: str | None, size: int | None) -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with FileLock(locks / path.name):
            if path.exists():
                return
            if size is not None and size > self.limit:
                raise UserError(
                    f"{shown(url)}: has {size / 1e9:.3g} GB, the cache {self.folder} at most {self.limit / 1e9:.3g}; "
                    f"raise DMD2_CACHE_GB"
                )
            self._make_room(size or 0)
            try:
                _fetch(url, path, sha256, size)
            except UserError as error:
                message = _URL.sub(lambda found: shown(found[0]), str(error).removeprefix(f"{path}: "))
                raise UserError(message if shown(url) in message else f"{shown(url)}: {message}") from None
        self._make_room(0, keep=path)

    def _make_room(self, size: int, keep: Path | None = None) -> None:
        """Removes the files used longest ago until `size` more bytes fit."""
        with FileLock(self.folder / "locks" / "room"):
            found = []
            for path in (self.folder / "files").iterdir():
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                found.append((status.st_mtime, status.st_size, path))
            total = sum(held for _, held, _ in found) + size
            for used, held, path in sorted(found):
                unfinished = len(path.name) != 64  # a part, which another process may be writing
                if path != keep and (time.time() - used > STALE_S if unfinished else total > self.limit):
                    path.unlink(missing_ok=True)
                    total -= held


def cache() -> Cache:
    """The cache that the environment names. Raises UserError for a size that is no positive number of GB."""
    text = os.environ.get("DMD2_CACHE_GB") or str(DEFAULT_GB)
    try:
        limit = int(float(text) * 1e9)
        if limit <= 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"DMD2_CACHE_GB is {text!r}; set it to a positive number of GB") from None
    name = os.environ.get("DMD2_CACHE") or os.path.join(tempfile.gettempdir(), f"dmd2-cache-{os.getuid()}")
    folder = Path(name)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        raise UserError(f"DMD2_CACHE: the folder {folder} cannot be written; name one on this machine's own disk")
    return Cache(folder, limit)


@lru_cache(maxsize=100_000)
def _identity(url: str) -> Identity:
    """`identify`, once per process: a file that changes while it is read stays the one that was listed."""
    return identify(url)


def _fetch(url: str, path: Path, sha256: str | None, size: int | None) -> None:
    """Writes the remote file to `path` once it is whole and has the right checksum."""

    def accept(part: Path) -> None:
        if size is not None and (found := part.stat().st_size) != size:
            raise Refused(f"sent {found} bytes instead of {size}")
        if sha256 is not None and (digest := files.sha256(part)) != sha256:
            raise Refused(f"was altered: its SHA-256 is {digest}, expected {sha256}; upload it again")

    if url.startswith("http"):
        Fetch(
            path, accept, size=size, pinned=sha256 is not None, retries=stores.RETRIES, backoff_s=stores.BACKOFF_S
        ).run([url])
        return
    with files.atomic(path) as temporary:
        _copy(url, temporary)
        try:
            accept(temporary)
        except Refused as error:
            raise UserError(f"{url}: {error}") from None


def _copy(url: str, target: Path) -> None:
    """Copies a file of fsspec's piece by piece, so that a broken connection costs a piece."""
    system, path = stores.file_system(url)
    size = _identity(url).size
    if size is None:
        raise UserError(f"{url}: its size is unknown; keep it on a file system that says it")
    with target.open("wb") as file:
        while (start := file.tell()) < size:
            stop = min(start + PIECE, size)

            def piece(start: int = start, stop: int = stop) -> bytes:
                data: bytes = system.cat_file(path, start=start, end=stop)
                if len(data) != stop - start:
                    raise ConnectionError(f"{len(data)} of {stop - start} bytes")
                return data

            try:
                file.write(stores.retried(url, piece))
            except FileNotFoundError:
                raise UserError(f"{url}: is gone while it is being fetched; upload it again") from None


def checksums(urls: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of remote files by URL, from the file SHA256SUMS beside them (as `sha256sum` writes it), if any."""
    found: dict[str, str] = {}
    for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        listing = f"{folder}/SHA256SUMS"
        try:
            identify(listing)
        except FileNotFoundError:
            continue
        with open_location(listing) as file:
            lines = file.read().decode("utf-8", "replace").splitlines()
        for line in lines:
            digest, _, name = line.partition(" ")
            found[f"{folder}/{name.strip().removeprefix('*')}"] = digest.lower()
    return {url: found[url] for url in urls if url in found}
