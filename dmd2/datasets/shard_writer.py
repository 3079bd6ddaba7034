"""One shard: a tar of samples, and a JSON sidecar with its checksum and the offsets of its members."""

from __future__ import annotations

import errno
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dmd2 import files
from dmd2.datasets import members
from dmd2.errors import UserError

Fields = Mapping[str, Sequence[Any] | np.ndarray]
"""Values of consecutive samples by field (see `members`), all of one length."""


class LeftOut(NamedTuple):
    """A sample that could not be read: its position, what the user knows it by, and the reason."""

    position: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Consecutive samples of which some are left out: the values of the others."""

    fields: Fields
    left_out: Sequence[LeftOut]


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shard_path(manifest_path: Path, number: int) -> Path:
    """The path of shard `number` of a set."""
    return manifest_path.parent / f"shard-{number:05d}.tar"


class Done(NamedTuple):
    """A shard that has been written."""

    num_positions: int
    left_out: list[LeftOut]


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shard of a given number unless it exists already. Picklable if its arguments are."""

    manifest_path: Path
    plan: Sequence[range]
    batch_size: int
    make: Callable[[range], Fields | Batch]
    check: Callable[[range, Fields], Mapping[str, Any]] | None
    origin: Mapping[str, str]

    def __call__(self, number: int) -> Done:
        path, ids = shard_path(self.manifest_path, number), self.plan[number]
        if (sidecar := _finished(path, ids, self.origin)) is None:
            sidecar = self._write(path, ids)
        return Done(len(ids), [LeftOut(*item) for item in sidecar["left_out"]])

    def _write(self, path: Path, ids: range) -> dict[str, Any]:
        """Writes one shard and then its sidecar, each atomically: where there is a sidecar, the tar is complete."""
        for leftover in path.parent.glob(f".{path.stem}.*.tmp"):
            leftover.unlink()  # of a writer that was killed
        with new_file(path) as temporary:
            with temporary.open("wb") as stream, _tar_writer(stream) as tar:
                content = self._fill(tar, ids)
            index = _member_index(temporary)
            size, checksum = temporary.stat().st_size, files.sha256(temporary)
        positions = [ids.start, ids.stop]
        written = {"positions": positions, "bytes": size, "sha256": checksum, "index": index}
        sidecar = {**self.origin, **content, **written}
        with new_file(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(sidecar, allow_nan=False), encoding="utf-8")
        return sidecar

    def _fill(self, tar: Any, ids: range) -> dict[str, Any]:
        """Makes the samples and writes them to the tar; returns the sidecar's entries about them."""
        layouts: dict[str, members.Layout] = {}
        facts: Mapping[str, Any] = {}
        left_out: list[LeftOut] = []
        for start in range(ids.start, ids.stop, self.batch_size):
            positions = range(start, min(start + self.batch_size, ids.stop))
            made = self.make(positions)
            batch = made if isinstance(made, Batch) else Batch(made, [])
            if self.check is not None and start == ids.start:
                facts = self.check(positions, batch.fields)
            left_out += batch.left_out
            for key, sample in _encoded(positions, batch, layouts):
                tar.write({"__key__": key, **sample})
        fields = {field: layouts[field] for field in sorted(layouts)}
        return {"count": len(ids) - len(left_out), "fields": fields, "facts": dict(facts), "left_out": left_out}


@contextmanager
def _tar_writer(stream: IO[bytes]) -> Iterator[Any]:
    """A `webdataset.TarWriter` of encoded samples whose headers hold no time, user or group, so that the same samples
    always give the same bytes.
    """
    from webdataset import TarWriter  # imports torch: 2 s of processor time, which only a process that writes pays

    with TarWriter(stream, encoder=False, user="", group="", mtime=0) as tar:
        yield tar


def _finished(path: Path, ids: range, origin: Mapping[str, str]) -> dict[str, Any] | None:
    """The sidecar of a shard that covers `ids`, was made under the same configuration and inputs, and is undamaged."""
    sidecar = path.with_suffix(".json")
    if not (path.exists() and sidecar.exists()):
        return None
    try:
        found = files.read_json(sidecar)
    except UserError:
        return None  # a damaged sidecar proves nothing: the shard is written again
    wanted = {**origin, "positions": [ids.start, ids.stop], "bytes": path.stat().st_size}
    same = {key: found.get(key) for key in wanted} == wanted and "left_out" in found
    return found if same and files.sha256(path) == found.get("sha256") else None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """`files.atomic`, with the file's name in the error when the disk is full."""
    try:
        with files.atomic(path) as temporary:
            yield temporary
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(
            f"{path}: could not be written ({error.strerror}); make room and run again, finished shards are kept"
        ) from error


def _encoded(
    positions: range, batch: Batch, layouts: dict[str, members.Layout]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and fields of each sample of a batch. Fills `layouts` by the first and holds the others to it."""
    fields, absent = batch.fields, {item.position for item in batch.left_out}
    ids = [position for position in positions if position not in absent]
    if not ids:
        return
    for field, values in fields.items():
        if len(values) != len(ids):
            raise ValueError(f"{field}: {len(values)} values for samples {ids[0]} to {ids[-1]}")
    if layouts and set(layouts) != set(fields):
        raise ValueError(f"samples from {ids[0]} on have fields {sorted(fields)}, those before {sorted(layouts)}")
    for row, number in enumerate(ids):
        sample: dict[str, bytes] = {}
        for field, values in fields.items():
            value = np.asarray(values[row])
            layout = layouts.setdefault(field, members.layout_of(value))
            try:
                if members.layout_of(value) != layout:
                    raise ValueError(f"{value.dtype} of shape {value.shape}, the samples before are {dict(layout)}")
                sample[field] = members.encode(field, value)
            except ValueError as error:
                raise UserError(f"sample {number}: `{field}`: {error}; correct its source and run again") from None
        yield f"{number:09d}", sample


def _member_index(path: Path) -> list[list[int]]:
    """Offset and size of the data of every member, samples in order of id and fields in alphabetical order."""
    with tarfile.open(path) as tar:
        return [[member.offset_data, member.size] for member in tar]
