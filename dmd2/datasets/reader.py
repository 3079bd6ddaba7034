"""Random access to tar shards by sample id; damaged shards are errors.

A field costs one seek and one small read, so a shuffled epoch over local disks needs no shuffle buffer, and an exact
resume no replay. A process reads a shard once from end to end on first use, to check its SHA-256 (0.6 GB/s on one
core). A shard of a manifest may be elsewhere (`dmd2.datasets.remote`): it is fetched to a cache on its first use.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np

from dmd2.config.data import is_url
from dmd2.datasets import members, remote
from dmd2.datasets.shards import read_manifest
from dmd2.errors import UserError

MAX_OPEN_FILES = 256
MAX_OPEN_REMOTE = 8
"""Of remote shards fewer: an open file takes space also after the cache has removed it."""
_checked: set[tuple[str, str, int, int, int]] = set()
"""Shards that this process has checked: path, checksum, and the file's inode, size and mtime."""


def open_local(path: Path) -> BufferedReader:
    """Opens a shard on a mounted disk."""
    return path.open("rb")


class ShardReader:
    """Reads samples of a manifest as decoded arrays; thread-safe.

    Raises UserError if the set was written under another configuration than `digest`.
    """

    def __init__(
        self,
        manifest_path: Path | str,
        digest: str | None = None,
        *,
        open_shard: Callable[[Path], BufferedReader] = open_local,
    ):
        self.path = Path(manifest_path)
        self.manifest = read_manifest(self.path, digest)
        self.fields = {members.name_of(field): field for field in self.manifest["fields"]}
        self._order = sorted(self.manifest["fields"])
        self._starts = np.array([shard["start"] for shard in self.manifest["shards"]])
        self._open_shard = open_shard
        self._files: dict[int, BufferedReader] = {}  # the first opened first
        self._indexes: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.manifest["num_samples"])

    def num_bytes(self, names: Sequence[str] | None = None) -> int:
        """The size of all decoded samples in bytes."""
        layouts = [self.manifest["fields"][field] for field in self._chosen(names).values()]
        return len(self) * sum(members.num_bytes(layout) for layout in layouts)

    def read(
        self, ids: Sequence[int] | range | np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The samples `ids` in that order: arrays (len(ids), *shape) by name, of all fields or those in `names`.

        Raises UserError for an unknown id or name, and with the remedy for a missing, truncated or altered shard.
        """
        chosen = self._chosen(names)
        wanted = np.asarray(ids, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise UserError(f"{self.path}: samples {wanted.min()} to {wanted.max()} requested, it has {len(self)}")
        data: dict[str, list[bytes]] = {name: [b""] * len(wanted) for name in chosen}
        columns = {name: self._order.index(field) for name, field in chosen.items()}
        with self._lock:
            shards = np.searchsorted(self._starts, wanted, side="right") - 1  # the last of equal starts is not empty
            positions = wanted - self._starts[shards]
            for row in np.argsort(wanted, kind="stable"):  # each shard is opened once, and read forwards
                for name, column in columns.items():
                    data[name][row] = self._member(int(shards[row]), int(positions[row]), column)
        layouts = self.manifest["fields"]
        return {name: members.stack(field, data[name], layouts[field]) for name, field in chosen.items()}

    def batches(self, batch_size: int, names: Sequence[str] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """All samples in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.read(range(start, min(start + batch_size, len(self))), names)

    def verify(self) -> None:
        """Checks all shards now, instead of at their first use. Raises UserError for a damaged one."""
        with self._lock:
            for shard in range(len(self.manifest["shards"])):
                self._open(shard)

    def close(self) -> None:
        """Closes the open shards; a later read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _chosen(self, names: Sequence[str] | None) -> dict[str, str]:
        missing = [name for name in names or () if name not in self.fields]
        if missing:
            raise UserError(f"{self.path}: has no `{missing[0]}`, only {', '.join(self.fields)}; is it the right set?")
        return {name: self.fields[name] for name in (self.fields if names is None else names)}

    def _member(self, shard: int, position: int, column: int) -> bytes:
        file = self._open(shard)
        offset, size = (int(number) for number in self._indexes[shard][position, column])
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise self._damaged(shard, "became shorter while it was being read")
        return data

    def _open(self, shard: int) -> BufferedReader:
        if shard in self._files:
            return self._files[shard]
        location = self._location(shard)
        file = self._open_checked(shard, location)
        try:
            if shard not in self._indexes:
                self._indexes[shard] = self._read_index(shard, f"{location.removesuffix('.tar')}.json")
        except BaseException:
            file.close()
            raise
        while len(self._files) >= (MAX_OPEN_REMOTE if is_url(location) else MAX_OPEN_FILES):
            self._files.pop(next(iter(self._files))).close()
        self._files[shard] = file
        return file

    def _open_checked(self, shard: int, location: str) -> BufferedReader:
        """The open shard after a comparison with the manifest; one that was damaged in the cache is fetched again."""
        entry, fetched_again = self.manifest["shards"][shard], False
        while True:
            try:
                if is_url(location):
                    file = remote.open_location(location, entry["sha256"], entry["bytes"])
                else:
                    file = self._open_shard(Path(location))
            except FileNotFoundError:
                raise self._damaged(shard, "is missing") from None
            try:
                self._check(shard, Path(file.name), file)
                return file
            except UserError:
                file.close()
                if fetched_again or not is_url(location):
                    raise
                remote.discard(location, entry["sha256"])
                fetched_again = True
            except BaseException:
                file.close()
                raise

    def _location(self, shard: int) -> str:
        return remote.join(self.path, self.manifest["shards"][shard]["name"])

    def _check(self, shard: int, path: Path, file: BufferedReader) -> None:
        """Compares size and SHA-256 with the manifest's, once per process."""
        entry, status = self.manifest["shards"][shard], os.fstat(file.fileno())
        if status.st_size != entry["bytes"]:
            raise self._damaged(shard, f"has {status.st_size} bytes instead of {entry['bytes']}")
        identity = (str(path.resolve()), entry["sha256"], status.st_ino, status.st_size, status.st_mtime_ns)
        if identity in _checked:
            return
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise self._damaged(shard, "was altered: its SHA-256 is not the manifest's")
        _checked.add(identity)

    def _read_index(self, shard: int, location: str) -> np.ndarray:
        """Offsets and sizes of a shard's members in bytes: (samples, fields, 2) int64."""
        entry, name = self.manifest["shards"][shard], location.rpartition("/")[2]
        try:
            with remote.open_location(location, entry["index_sha256"]) as file:
                text = file.read()
        except FileNotFoundError:
            raise self._damaged(shard, f"has lost its index {name}") from None
        if hashlib.sha256(text).hexdigest() != entry["index_sha256"]:
            raise self._damaged(shard, f"has an altered index {name}")
        index = np.asarray(json.loads(text)["index"], np.int64)
        return index.reshape(entry["count"], len(self._order), 2)

    def _damaged(self, shard: int, what: str) -> UserError:
        location = self._location(shard)
        if is_url(location):
            return UserError(f"{remote.shown(location)} {what}; read it again, or upload it again")
        return UserError(
            f"{location} {what}; delete {self.path} and run the rule that writes it: undamaged shards are kept"
        )
